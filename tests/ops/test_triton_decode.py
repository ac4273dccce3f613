"""The kernels of decoding against `Mamba2Backbone.step` and the engine's sampler, and whole blocks of steps against single plain ones."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from omnimamba.config import BackboneConfig, LoraConfig, Task, preset
from omnimamba.engine.decoder import DecodeOptions, FusedDecoder
from omnimamba.engine.request import SamplingParams
from omnimamba.engine.runner import DecodeSample, Runner
from omnimamba.engine.sampler import SamplingRows, guide, sample, stream_key
from omnimamba.model.omnimamba import OmniMambaModel, cast
from omnimamba.model.quantize import quantize_model
from omnimamba.ops.cuda import mix_rows, project_rows
from omnimamba.ops.quant import QuantizedWeight
from omnimamba.ops.triton import decode as kernel
from omnimamba.ops.triton import decode_sample as sampling

PATHS = {
    "vector": DecodeOptions(max_vector_rows=8),
    "matrix": DecodeOptions(max_vector_rows=0),
}
NUM_SLOTS = 6
SUPPRESSED, STOPS = (3, 4, 5), tuple(range(150, 200))
T2I, MMU = Task.T2I, Task.MMU
DRAWN, GREEDY, GUIDED = SamplingParams(seed=0), SamplingParams(seed=0, temperature=0.0), SamplingParams(seed=0, guidance_scale=3.0)


@pytest.fixture(scope="module")
def model(kernel_device, random_model) -> OmniMambaModel:
    """Sizes that no tile is: every mask is needed."""
    config = dataclasses.replace(
        preset("tiny"),
        backbone=BackboneConfig(d_model=40, n_layer=2, d_state=12, headdim=20, d_conv=3),
        lora=LoraConfig(rank=3),
        text_vocab_size=208,
        base_vocab_size=198,
        mmu_positions=60,
    )
    return random_model(config, initial=("A_log", "dt_bias", "D")).to(kernel_device).eval().requires_grad_(False)


def runner_of(model: OmniMambaModel, **options) -> Runner:
    """A runner whose slots all hold a past."""
    runner = Runner(model, NUM_SLOTS, **options)
    generator = torch.Generator().manual_seed(1)
    for part in (runner.state.conv, runner.state.ssm):
        part.copy_(torch.randn(part.shape, generator=generator))
    runner.state.position.copy_(torch.tensor([5, 58, 2, 9, 1, 17]))
    return runner


def samples(*chosen: tuple[tuple[int, int], Task, SamplingParams], remaining: int = 9) -> list[DecodeSample]:
    return [
        DecodeSample(slots, task, 7 + i, params, stream_key(0, i), 2 * i, remaining + i) for i, (slots, task, params) in enumerate(chosen)
    ]


def rows_of(batch: list[DecodeSample]) -> list[tuple[int, DecodeSample]]:
    return [(slot, s) for s in batch for slot in dict.fromkeys(s.slots)]


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, error  # not so for NaN


def poison(decoder: FusedDecoder, monkeypatch) -> None:
    """Its buffers are NaN before they are written."""
    buffer_of = decoder._buffer

    def poisoned(name: str, b: int, width: int, dtype: torch.dtype) -> Tensor:
        num = len(decoder.buffers())
        buffer = buffer_of(name, b, width, dtype)
        return buffer.fill_(torch.nan) if len(decoder.buffers()) > num else buffer

    monkeypatch.setattr(decoder, "_buffer", poisoned)


BATCHES = {
    "image": samples(((4, 4), T2I, DRAWN)),
    "text past the last position": samples(((1, 1), MMU, DRAWN)),
    "guided": samples(((4, 1), T2I, GUIDED)),
    "both tasks": samples(((5, 5), MMU, DRAWN), ((0, 0), T2I, DRAWN)),
    "padded": samples(((3, 0), T2I, GUIDED), ((5, 5), MMU, GREEDY)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BATCHES)
def test_a_step_equals_the_plain_one(model, monkeypatch, path, name, dtype):
    if dtype == torch.bfloat16:
        if name != "both tasks":
            pytest.skip("one batch shows the rounding")
        half = cast(OmniMambaModel(model.config).to(model.device), dtype).eval().requires_grad_(False)
        half.load_state_dict(model.state_dict())
        reference = cast(OmniMambaModel(model.config).to(model.device), torch.float32).eval().requires_grad_(False)
        reference.load_state_dict(half.state_dict())  # the same rounded weights
    else:
        half = reference = model
    batch = BATCHES[name]
    runner, expected = runner_of(half), runner_of(reference)
    expected.image_table.copy_(runner.image_table)
    expected.state.conv.copy_(runner.state.conv)
    decoder = FusedDecoder(half, runner.state, runner.image_table, options=PATHS[path])
    assert decoder.path(decoder.bucket(len(rows_of(batch))).b) == path
    poison(decoder, monkeypatch)
    before = runner.state.clone()
    found = decoder.logits(batch)
    rows = rows_of(batch)
    logits = expected.decode([slot for slot, _ in rows], [s.task for _, s in rows], [s.token for _, s in rows])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for task, wanted in logits.items():
        assert_near(found[task][[i for i, (_, s) in enumerate(rows) if s.task is task]], wanted, tolerance)
    assert_near(runner.state.ssm, expected.state.ssm, tolerance)
    assert_near(runner.state.conv, expected.state.conv, tolerance)
    assert torch.equal(runner.state.position, expected.state.position)
    idle = [slot for slot in range(NUM_SLOTS) if slot not in [slot for slot, _ in rows]]
    for part in ("conv", "ssm"):
        assert torch.equal(getattr(runner.state, part)[:, idle], getattr(before, part)[:, idle])


def plain_mix_rows(shape, projected, layer, slots, is_t2i, mixed, counter, *, pdl):
    b = len(projected)
    y = torch.full((b, mixed.gated.shape[1]), torch.nan, device=projected.device)
    kernel.mix(projected, layer.lora, layer.mixer, layer.conv, layer.ssm, slots, is_t2i, y, mixed.newest, pdl=pdl)
    mixed.gated[:b] = y * layer.gated_norm
    mixed.squares.copy_(y.square().unflatten(1, (shape.row_chunks, -1)).sum(2))
    counter += 1


def normed(rows: project_rows.Rows, eps: float) -> Tensor:
    return rows.values[: len(rows.squares)] / (rows.squares.sum(1, keepdim=True) / rows.values.shape[1] + eps).sqrt()


def plain_project_in(rows, weight, out, *, eps, pdl):
    out.copy_(normed(rows, eps) @ weight.T)


def plain_project_out(rows, weight, residual, norm, made, shift, *, eps, pdl):
    residual += normed(rows, eps) @ weight.T
    made.values[: len(residual)] = residual * norm
    made.squares.copy_(residual.square().unflatten(1, (made.squares.shape[1], -1)).sum(2))
    for slot, newest in zip(shift.slots.tolist(), shift.newest, strict=True):
        if slot >= 0:
            channels = shift.conv[slot, -len(newest) :]
            channels.copy_(torch.cat([channels[:, 1:], newest[:, None]], 1))


@pytest.mark.parametrize("path", ["matrix", "hopper"])
def test_a_step_whose_states_are_streamed(model, monkeypatch, path):
    """What is around `mix_rows` and `project_rows`, in whose place others make the same (tests/ops/cuda has their own tests)."""
    shape = mix_rows.Shape(model.config.backbone.d_inner, 4, 512, 3, False, 3)  # tiles of two channels
    monkeypatch.setattr(mix_rows, "device_shape", lambda layer, num_rows, device: shape)
    monkeypatch.setattr(mix_rows, "mix_rows", plain_mix_rows)
    monkeypatch.setattr(project_rows, "fits", lambda layer, heads, b, device: path == "hopper")
    monkeypatch.setattr(project_rows, "num_squares", lambda layer, b, device: 4)
    monkeypatch.setattr(project_rows, "project_in", plain_project_in)
    monkeypatch.setattr(project_rows, "project_out", plain_project_out)
    batch, options = BATCHES["padded"], DecodeOptions(max_vector_rows=0, min_streamed_rows=3)
    runner, expected = runner_of(model), runner_of(model)
    decoder = FusedDecoder(model, runner.state, runner.image_table, options=options)
    assert decoder.path(4) == path and decoder.path(2) == "matrix"
    poison(decoder, monkeypatch)
    found, rows = decoder.logits(batch), rows_of(batch)
    assert (decoder._counters == 1).all(), "each layer has its own"
    logits = expected.decode([slot for slot, _ in rows], [s.task for _, s in rows], [s.token for _, s in rows])
    for task, wanted in logits.items():
        assert_near(found[task][[i for i, (_, s) in enumerate(rows) if s.task is task]], wanted, 1e-5)
    assert_near(runner.state.ssm, expected.state.ssm, 1e-5)
    assert_near(runner.state.conv, expected.state.conv, 1e-5)


@pytest.mark.parametrize(("scheme", "path"), [("int8", "vector"), ("int8", "matrix"), ("fp8", "matrix")])
def test_a_step_of_a_quantised_model(model, scheme, path):
    quantised, reference = copy.deepcopy(model), copy.deepcopy(model)
    quantize_model(quantised, scheme)
    for name, module in quantised.named_modules():
        if isinstance(module, QuantizedWeight):
            reference.get_parameter(name).copy_(module.dequantize())
    batch = BATCHES["both tasks"]
    runner, expected = runner_of(quantised), runner_of(reference)
    expected.image_table.copy_(runner.image_table)
    found = FusedDecoder(quantised, runner.state, runner.image_table, options=PATHS[path]).logits(batch)
    rows = rows_of(batch)
    logits = expected.decode([slot for slot, _ in rows], [s.task for _, s in rows], [s.token for _, s in rows])
    for task, wanted in logits.items():
        assert_near(found[task][[i for i, (_, s) in enumerate(rows) if s.task is task]], wanted, 1e-5)
    assert_near(runner.state.ssm, expected.state.ssm, 1e-5)


def plain_tokens(runner: Runner, batch: list[DecodeSample], num_steps: int) -> list[list[int]]:
    """What single steps and the engine's sampler make of the batch."""
    drawn: list[list[int]] = [[] for _ in batch]
    for step in range(num_steps):
        live = [
            i for i, s in enumerate(batch) if len(drawn[i]) < s.remaining and not (s.task is MMU and drawn[i] and drawn[i][-1] in STOPS)
        ]
        rows = [(slot, i) for i in live for slot in dict.fromkeys(batch[i].slots)]
        if not rows:
            break
        last = {i: drawn[i][-1] if drawn[i] else batch[i].token for i in live}
        logits = runner.decode([slot for slot, _ in rows], [batch[i].task for _, i in rows], [last[i] for _, i in rows])
        for i in live:
            s = batch[i]
            own = [k for k, (_, owner) in enumerate(row for row in rows if batch[row[1]].task is s.task) if owner == i]
            settings = SamplingRows.of([s.params], [s.key], [s.step + step], runner.model.device)
            scores = guide(logits[s.task][own[:1]], logits[s.task][own[-1:]], settings.guidance_scale)
            if s.task is MMU:
                scores[:, SUPPRESSED] = -torch.inf
            drawn[i].append(int(sample(scores, settings)))
    return drawn


@pytest.mark.parametrize(("num_rows", "k", "parts"), [(1, 64, 4), (3, 96, 2), (33, 256, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_in_parts(kernel_device, num_rows, k, parts, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, k, generator=generator).to(kernel_device, dtype) for n in (num_rows, 70))
    assert kernel.matrix_parts(k) == parts
    out, whole = torch.full((parts, num_rows, 70), torch.nan, device=kernel_device), x.new_full((1, num_rows, 70), torch.nan)
    kernel.multiply_parts(x, weight, out)
    kernel.multiply_parts(x, weight, whole)
    expected = x.double() @ weight.double().T
    assert_near(out.sum(0), expected, 1e-5)  # sums are fp32
    assert_near(whole[0], expected, 1e-5 if dtype == torch.float32 else 4e-3)


def test_columns_that_are_not_split():
    assert kernel.matrix_parts(80) == kernel.matrix_parts(17) == 0
    assert (kernel.matrix_tile(80, 1), kernel.matrix_tile(80, 2), kernel.matrix_tile(17, 1), kernel.matrix_tile(96, 5)) == (16, 0, 0, 0)


@pytest.mark.parametrize("num_addends", [1, 3])
def test_a_norm_whose_addend_has_yet_to_be_normed(kernel_device, num_addends):
    generator = torch.Generator().manual_seed(0)
    x, addends, sums, weight = (
        torch.rand(shape, generator=generator).to(kernel_device) for shape in ((3, 40), (num_addends, 3, 40), (3, 7), (40,))
    )
    expected = x + addends.sum(0) / (sums.sum(1, keepdim=True) / 50 + 1e-5).sqrt()
    out = torch.full((3, 40), torch.nan, device=kernel_device)
    kernel.norm(x, weight, out, eps=1e-5, addend=addends, squares=kernel.Squares(sums, 50))
    assert_near(x, expected, 1e-6)
    assert_near(out, torch.nn.functional.rms_norm(expected, (40,), weight, 1e-5), 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_blocks_of_steps_equal_single_steps(model, path):
    """Samples end within a block by length and by a stop id; a filtered batch and a following block too."""
    batch = samples(((4, 4), T2I, DRAWN), ((5, 5), MMU, DRAWN), remaining=1)
    batch += samples(((3, 0), T2I, dataclasses.replace(GUIDED, top_k=5)))
    runner, expected = runner_of(model), runner_of(model)
    decoder = FusedDecoder(model, runner.state, runner.image_table, stop_ids=STOPS, suppressed_ids=SUPPRESSED, options=PATHS[path])
    first = decoder.run(batch, 2)
    going = [
        dataclasses.replace(s, token=tokens[-1], step=s.step + len(tokens), remaining=s.remaining - len(tokens))
        for s, tokens in zip(batch, first, strict=True)
        if len(tokens) < s.remaining and not (s.task is MMU and tokens[-1] in STOPS)
    ]
    found = {s.slots: tokens for s, tokens in zip(batch, first, strict=True)}
    for s, tokens in zip(going, decoder.run(going, 1) if going else [], strict=True):
        found[s.slots] = found[s.slots] + tokens
    assert list(found.values()) == plain_tokens(expected, batch, 3)
    assert_near(runner.state.ssm, expected.state.ssm, 1e-5)
    assert torch.equal(runner.state.position, expected.state.position)


def test_blocks_that_go_on(model):
    """Until the last sample has ended, and no step more than it needs."""
    batch = samples(((4, 4), T2I, DRAWN), ((5, 5), MMU, DRAWN), remaining=1) + samples(((3, 0), T2I, GUIDED), remaining=5)
    runner, expected = runner_of(model), runner_of(model)
    options = DecodeOptions(max_vector_rows=0, max_steps=2)
    decoder = FusedDecoder(model, runner.state, runner.image_table, stop_ids=STOPS, suppressed_ids=SUPPRESSED, options=options)
    replay, num_steps = decoder.replay, []
    decoder.replay = lambda *args: (num_steps.append(1), replay(*args))
    block, found = decoder.start(batch, 2), [[] for _ in batch]
    while block is not None:
        following = decoder.go_on(block)
        for tokens, new in zip(found, decoder.tokens(block), strict=True):
            tokens += new
        block = following
    assert found == plain_tokens(expected, batch, 9)
    assert len(num_steps) == max(map(len, found)) == batch[-1].remaining
    assert_near(runner.state.ssm, expected.state.ssm, 1e-5)
    assert torch.equal(runner.state.position, expected.state.position)


def test_blocks_until_one_ends(model):
    batch = samples(((4, 4), T2I, DRAWN), ((3, 0), T2I, GUIDED), remaining=5)
    runner = runner_of(model)
    decoder = FusedDecoder(model, runner.state, runner.image_table, options=DecodeOptions(max_vector_rows=0, max_steps=4))
    expected = decoder.run(samples(*((s.slots, s.task, s.params) for s in batch), remaining=5), 4)
    restored = runner_of(model)
    decoder = FusedDecoder(model, restored.state, restored.image_table, options=DecodeOptions(max_vector_rows=0, max_steps=4))
    block = decoder.start(batch, 2)
    following = decoder.go_on_until_one_ends(block)
    assert following is not None
    first, second = decoder.tokens(block), decoder.tokens(following)
    assert [len(tokens) for tokens in second] == [3, 3], "to the end of the first sample"
    assert [(a + b)[:4] for a, b in zip(first, second, strict=True)] == expected
    assert decoder.go_on_until_one_ends(following) is None
    last = decoder.go_on(following)
    assert last is not None and [len(tokens) for tokens in decoder.tokens(last)] == [0, 1]
    assert decoder.go_on(last) is None


def test_steps_are_recorded_ahead(model, monkeypatch):
    """One graph for each bucket, tasks and whether there are filters; a lone row has one task."""
    runner = runner_of(model)
    decoder = FusedDecoder(model, runner.state, runner.image_table, options=DecodeOptions(use_graphs=False))
    decoder.capture_all(NUM_SLOTS)
    assert decoder._graphs == {}
    monkeypatch.setattr(decoder, "use_graphs", True)
    monkeypatch.setattr(decoder, "_capture", lambda bucket, tasks, is_filtered: (bucket.b, tasks, is_filtered))
    decoder.capture_all(NUM_SLOTS)
    assert {b: sum(key[0] == b for key in decoder._graphs) for b in (1, 2, 4, 8)} == {1: 4, 2: 6, 4: 6, 8: 6}
    assert all(decoder._graphs[key] == key for key in decoder._graphs) and len(decoder._graphs) == 22


def test_the_parameters_stay_what_they_were(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runner = runner_of(model)
    FusedDecoder(model, runner.state, runner.image_table)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(("dtype", "knows_float8"), [(torch.int8, True), (torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False)])
def test_quantised_weights(kernel_device, monkeypatch, num_rows, dtype, knows_float8):
    monkeypatch.setattr(kernel, "knows_float8", lambda device: knows_float8)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(num_rows, 24, generator=generator), torch.randn(37, 24, generator=generator)
    limit = 127 if dtype == torch.int8 else 448
    scale = weight.abs().amax(1) / limit
    values = (weight / scale[:, None]).round().to(dtype)
    out = torch.full((num_rows, 37), torch.nan, device=kernel_device)
    norm_weight = torch.rand(24, generator=generator)
    quantised = kernel.Weight(values.to(kernel_device), scale.to(kernel_device))
    kernel.project(x.to(kernel_device), norm_weight.to(kernel_device), quantised, out, eps=1e-5)
    expected = torch.nn.functional.rms_norm(x, (24,), norm_weight, 1e-5) @ (values.float() * scale[:, None]).T
    assert_near(out.cpu(), expected, 1e-5)


def test_every_float8_by_its_bits(kernel_device, monkeypatch):
    """On cards that do not know the type."""
    bits = torch.arange(256, dtype=torch.uint8).view(-1, 1).expand(256, 16).contiguous()
    table = bits[(bits[:, 0] & 0x7F) != 0x7F].view(torch.float8_e4m3fn).to(kernel_device)  # not NaN
    b = len(table)
    tokens, zeros = torch.arange(b, device=kernel_device), torch.zeros(b, dtype=torch.int64, device=kernel_device)
    positions, image_table = torch.zeros(2, 16, device=kernel_device), torch.full((1, 16), torch.nan, device=kernel_device)
    tables = kernel.Embedding(image_table, kernel.Weight(table, torch.full((b,), 2.0, device=kernel_device)), positions, positions)
    monkeypatch.setattr(kernel, "knows_float8", lambda device: False)
    out = torch.full((b, 16), torch.nan, device=kernel_device)
    kernel.embed(tokens, zeros, tokens, zeros.clone(), tables, out)
    assert torch.equal(out, 2 * table.float())


@pytest.mark.parametrize("seed", range(4))
def test_samples_are_those_of_the_sampler(kernel_device, seed):
    """Guidance, temperatures near 0, greedy rows, suppressed and stop ids, a row of padding, more than one part of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    image_logits, text_logits = (torch.randn(6, v, generator=generator).mul(2).to(kernel_device) for v in (64, 1300))
    temperatures, scales = (1.0, 0.0, 0.5, 1.0, 1e-6, 2.0), (1.0, 1.0, 1.0, 3.0, 1.0, 1.0)
    params = [SamplingParams(temperature=t, guidance_scale=s) for t, s in zip(temperatures, scales, strict=True)]
    settings = SamplingRows.of(params, [stream_key(seed, i) for i in range(6)], [3 * seed + i for i in range(6)], kernel_device)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, device=kernel_device)

    is_t2i, null_rows = ints(1, 0, 0, 1, 0, 1), ints(0, 1, 2, 5, 4, -1)
    flags = torch.zeros(1300, dtype=torch.int32, device=kernel_device)
    flags[3:9] |= sampling.SUPPRESSED.value
    flags[600:] |= sampling.STOPS.value
    rows = sampling.Rows(
        ints(*[0] * 6), ints(5, 4, 3, 2, -1, 0), is_t2i, null_rows, settings.keys.clone(), settings.steps.clone(), settings.top_k,
        settings.is_greedy.long(), ints(2, 5, 1, 9, 9, 9), ints(*[0] * 6), settings.temperature.clone(), settings.top_p.clone(),
        settings.guidance_scale.clone(),
    )  # fmt: skip
    parts = (sampling.num_parts(64), sampling.num_parts(1300))
    assert parts[1] > 1
    nan = torch.full((6, parts[1]), torch.nan, device=kernel_device)
    partial = sampling.Partial(nan, nan.clone(), torch.full((6, parts[1]), -7, device=kernel_device))
    drawn = torch.full((6, 4), -5, device=kernel_device)
    sampling.score(image_logits, text_logits, flags, rows, partial)
    sampling.finish(flags, rows, partial, drawn, parts=parts)

    text_logits[:, 3:9] = -torch.inf
    images = sample(guide(image_logits, image_logits[null_rows.clamp(min=0)], settings.guidance_scale), settings)
    expected = torch.where(is_t2i.bool(), images, sample(text_logits, settings)).tolist()
    assert drawn[:, 0].tolist() == [*expected[:4], -5, -5]
    assert rows.tokens.tolist() == [*expected[:4], 0, expected[3]]  # the last row is the null prompt of the fourth
    assert rows.slots.tolist() == [5, -1 if expected[1] >= 600 else 4, -1, 2, -1, 0]
    assert rows.emitted.tolist() == [1, 1, 1, 1, 0, 0]
    assert (rows.steps - settings.steps).tolist() == [1, 1, 1, 1, 0, 0]
