"""The image tokenizer: against tensors recorded from the authors' code (case 7 of golden/README.md), and by itself."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from omnimamba.config import VQConfig, preset
from omnimamba.model import vq
from omnimamba.model.vq import VQModel, cosines, entropy_loss, unit_rows

TINY = preset("tiny").vq
PREFIX = "llm_backbone.vqvae."


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VQModel(TINY)


def images(b=2, height=32, width=32, seed=1):
    return torch.rand(b, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_golden(recorded):
    case, model = recorded.case("vq"), recorded.vq
    grid = tuple(recorded.sizes["vq"]["grid"])
    for run in sorted({name.split(".")[0] for name in case.tensors}):
        if f"{run}.image" not in case:
            case.check(f"{run}.decoded", model.decode_ids(case[f"{run}.indices"], grid), "vq_maxabs")
            continue
        codes = model.encode(case[f"{run}.image"])
        best, second = cosines(unit_rows(codes.pre_quant), model.quantize.codes()).topk(2).values.unbind(-1)
        case.check(f"{run}.indices", codes.ids, "exact")
        case.check(f"{run}.quantised", codes.quantised, "vq_maxabs")
        case.check(f"{run}.pre_quant", codes.pre_quant, "vq_maxabs")
        case.check(f"{run}.distance_gap", 2 * (best - second).view_as(codes.ids), "vq_maxabs")
        case.check(f"{run}.decoded", model.decode_ids(codes.ids.flatten(1), tuple(codes.ids.shape[1:])), "vq_maxabs")
    assert case.num_checked


def test_full_size_names_and_shapes(golden):
    path = golden / "full_size_keys.json"
    if not path.exists():
        pytest.skip("this golden folder has no full_size_keys.json")
    shapes = json.loads(path.read_text())["shapes"]
    expected = {key.removeprefix(PREFIX): tuple(shape) for key, shape in shapes.items() if key.startswith(PREFIX)}
    del expected["quantize.codebook_used"]
    with torch.device("meta"):
        model = VQModel(preset("1.3b").vq)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_attention_is_in_the_lowest_level_and_the_middle_only():
    with torch.device("meta"):
        model = VQModel(VQConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=16, codebook_size=8))
    assert {key.removesuffix(".q.weight") for key in model.state_dict() if key.endswith(".q.weight")} == {
        *("encoder.conv_blocks.2.attn.0", "encoder.mid.1"),
        *("decoder.conv_blocks.0.attn.0", "decoder.conv_blocks.0.attn.1", "decoder.mid.1"),
    }


@pytest.mark.parametrize(("height", "width"), [(4, 4), (12, 20), (36, 4), (32, 32)])
@torch.no_grad()
def test_any_multiple_of_the_downsampling_works(model, height, width):
    codes = model.encode(images(2, height, width))
    h, w, c = height // 4, width // 4, TINY.codebook_dim
    assert codes.ids.shape == (2, h, w) and codes.ids.dtype == torch.int64
    assert codes.quantised.shape == codes.pre_quant.shape == (2, c, h, w)
    decoded = model.decode(codes.quantised)
    assert decoded.shape == (2, 3, height, width)
    assert torch.equal(model.decode_ids(codes.ids.flatten(1), (h, w)), decoded)


@torch.no_grad()
def test_an_image_is_decoded_the_same_whatever_else_is_in_the_batch(model):
    num_tokens = model.config.grid_size**2
    ids = torch.randint(0, model.config.codebook_size, (5, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = model.decode_ids(ids)
        for num in (1, 2, 3):
            assert torch.equal(model.decode_ids(ids[:num]), images[:num])


def test_decode_ids_is_square_by_default_and_takes_any_integer_type(model):
    codes = model.encode(images())
    decoded = model.decode(codes.quantised)
    assert torch.equal(model.decode_ids(codes.ids.flatten(1)), decoded)
    assert torch.equal(model.decode_ids(codes.ids.flatten(1).int()), decoded)
    torch.testing.assert_close(model.decode_ids(codes.ids[1:].flatten(1)), decoded[1:])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 3, 30, 32), "30x32 pixels.*multiples of 4"),
        (torch.zeros(1, 3, 32, 33), "32x33 pixels.*multiples of 4"),
        (torch.zeros(1, 3, 0, 32), "0x32 pixels"),
        (torch.zeros(1, 1, 32, 32), r"\[1, 1, 32, 32\]; pass \[b, 3, H, W\]"),
        (torch.zeros(3, 32, 32), r"\[3, 32, 32\]; pass \[b, 3, H, W\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8; pass floating point"),
    ],
)
def test_wrong_images(model, tensor, message):
    for method in (model.encode, model):
        with pytest.raises(ValueError, match=message):
            method(tensor)


@pytest.mark.parametrize(
    ("ids", "grid", "message"),
    [
        (torch.zeros(1, 63, dtype=torch.int64), None, r"\[1, 63\] do not fill a grid of 8x8; pass \[b, 64\]"),
        (torch.zeros(1, 64, dtype=torch.int64), (8, 9), "grid of 8x9"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), None, "grid of 8x8"),
        (torch.full((1, 64), 64), None, "image id 64 is not in the codebook; pass ids from 0 to 63"),
        (torch.full((1, 64), -1), None, "image id -1 is not in the codebook"),
        (torch.zeros(1, 64), None, "torch.float32; pass integers"),
    ],
)
def test_wrong_ids(model, ids, grid, message):
    with pytest.raises(ValueError, match=message):
        model.decode_ids(ids, grid)


@torch.no_grad()
def test_search_finds_the_nearest_unit_code(model):
    codes = model.encode(images())
    rows = F.normalize(codes.pre_quant.movedim(1, -1), dim=-1)
    table = F.normalize(model.quantize.embedding.weight, dim=-1)
    distances = (rows[..., None, :] - table).square().sum(-1)
    assert torch.equal(codes.ids, distances.argmin(-1))
    torch.testing.assert_close(codes.quantised.movedim(1, -1), table[codes.ids])
    assert len(codes.ids.unique()) > 1


@torch.no_grad()
def test_length_of_codes_means_nothing(model):
    before = model.encode(images())
    model.quantize.embedding.weight.mul_(torch.linspace(0.1, 10, TINY.codebook_size)[:, None])
    after = model.encode(images())
    assert torch.equal(before.ids, after.ids)
    torch.testing.assert_close(model.decode_ids(after.ids.flatten(1)), model.decode_ids(before.ids.flatten(1)))


def test_codebook_starts_normalised(model):
    torch.testing.assert_close(model.quantize.embedding.weight.norm(dim=-1), torch.ones(TINY.codebook_size))


def test_search_and_entropy_in_chunks_equal_the_whole(model, monkeypatch):
    def run():
        model.zero_grad()
        out = model(images())
        out.entropy_loss.backward()
        return out.codes.ids, out.entropy_loss.detach(), model.quantize.embedding.weight.grad, model.encoder.conv_in.weight.grad

    whole = run()
    monkeypatch.setattr(vq, "MAX_SCORES", 7 * TINY.codebook_size)  # 128 rows: 18 chunks of 7 and one of 2
    chunked = run()
    assert torch.equal(whole[0], chunked[0])
    for a, b in zip(whole[1:], chunked[1:], strict=True):
        error = (a - b).abs().max() / a.abs().max()
        assert error <= 1e-5, error


def test_search_is_exact_under_autocast():
    rows = F.normalize(torch.randn(256, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        scores = cosines(rows, rows)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, cosines(rows, rows))


def test_reconstruction_gradient_reaches_the_encoder_as_if_quantisation_were_the_identity(model):
    x = images()
    target = torch.zeros_like(x)
    out = model(x)
    F.mse_loss(out.reconstruction, target).backward()
    assert model.quantize.embedding.weight.grad is None or not model.quantize.embedding.weight.grad.any()
    found = model.encoder.conv_in.weight.grad.clone()
    assert found.abs().max() > 0

    # by hand: the gradient at the decoder's input, put in at the unit features
    model.zero_grad()
    codes = model.encode(x)
    quantised = codes.quantised.detach().requires_grad_()
    (at_decoder,) = torch.autograd.grad(F.mse_loss(model.decode(quantised), target), quantised)
    F.normalize(codes.pre_quant, dim=1).backward(at_decoder)
    expected = model.encoder.conv_in.weight.grad
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_each_quantiser_loss_moves_its_own_side(model):
    out = model(images())
    torch.testing.assert_close(out.codebook_loss, out.commitment_loss)
    assert out.codebook_loss > 0

    out.codebook_loss.backward(retain_graph=True)
    moved = model.quantize.embedding.weight.grad.abs().sum(1) > 0
    used = torch.zeros(TINY.codebook_size, dtype=torch.bool)
    used[out.codes.ids.unique()] = True
    assert torch.equal(moved, used)
    assert model.encoder.conv_in.weight.grad is None

    model.zero_grad()
    out.commitment_loss.backward()
    assert model.quantize.embedding.weight.grad is None
    assert model.encoder.conv_in.weight.grad.abs().max() > 0


def test_training_output_is_what_encode_and_decode_give(model):
    x = images(2, 12, 20)
    out, codes = model(x), model.encode(x)
    assert torch.equal(out.codes.ids, codes.ids)
    torch.testing.assert_close(out.codes.quantised, codes.quantised)
    torch.testing.assert_close(out.codes.pre_quant, codes.pre_quant)
    torch.testing.assert_close(out.reconstruction, model.decode(codes.quantised))
    assert out.codebook_usage == len(codes.ids.unique()) / TINY.codebook_size
    rows = F.normalize(codes.pre_quant, dim=1)
    torch.testing.assert_close(out.codebook_loss, (codes.quantised - rows).square().mean())


def test_entropy_loss_rewards_sharp_assignments_that_use_all_codes():
    codes = torch.eye(4)
    between = F.normalize(torch.ones(1, 4), dim=-1)
    assert entropy_loss(codes.repeat(3, 1), codes).item() == pytest.approx(-math.log(4), abs=1e-3)
    assert entropy_loss(codes[:1].expand(12, 4), codes).item() == pytest.approx(0, abs=1e-3)
    assert entropy_loss(between.expand(12, 4), codes).item() == pytest.approx(0, abs=1e-3)


@torch.no_grad()
def test_bf16_weights_take_fp32_images(model):
    model.bfloat16()
    codes = model.encode(images())
    assert codes.quantised.dtype == codes.pre_quant.dtype == torch.bfloat16
    assert torch.equal(model.decode_ids(codes.ids.flatten(1)), model.decode(codes.quantised))


def test_a_few_steps_fit_one_batch(model):
    x = F.interpolate(images(4, 8, 8), scale_factor=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        out = model(x)
        losses.append(F.mse_loss(out.reconstruction, x))
        optimizer.zero_grad()
        (losses[-1] + out.codebook_loss + 0.25 * out.commitment_loss).backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
