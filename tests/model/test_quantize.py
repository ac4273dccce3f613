"""Quantised models: what is replaced, folders, both tasks, and wrong input."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from omnimamba.config import OmniMambaConfig, Quantization, Task, preset
from omnimamba.engine.engine import Engine
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.model import weights
from omnimamba.model.convert import convert
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.quantize import parameters, quantize_model
from omnimamba.ops import quant_cpu
from omnimamba.ops.quant import QuantizedWeight

SCHEMES = list(Quantization)
NUM_QUANTIZED = 2 * 2 + 2  # in_proj and out_proj of two blocks, two embeddings


@pytest.fixture(scope="module")
def folder(tmp_path_factory, redraw):
    """A tiny model in which every term matters."""
    omni = OmniMamba.from_config(preset("tiny"))
    redraw(omni.bundle.model)
    path = tmp_path_factory.mktemp("models") / "tiny"
    omni.save_pretrained(path)
    return path


def load(source, quantize=None, dtype=torch.float32):
    return weights.load(source, dtype=dtype, quantize=quantize)


def generate(model: OmniMambaModel, num_slots=3) -> list[list[int]]:
    config = model.config
    requests = [
        Request(Task.T2I, tuple(range(config.t2i_prompt_length)), sampling=SamplingParams(seed=3, max_new_tokens=6), num_samples=2),
        Request(Task.MMU, tuple(range(8)), sampling=SamplingParams(temperature=0, max_new_tokens=6)),
    ]
    return [sample.tokens for samples in Engine(model, num_slots=num_slots).run(requests) for sample in samples]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_replaced(folder, scheme):
    whole, model = load(folder).model, load(folder, scheme).model
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    assert len(replaced) == NUM_QUANTIZED and model.config.quantization is scheme
    floats = dict(whole.named_parameters())
    for name, weight in replaced.items():
        expected = floats.pop(name)
        assert weight.scheme == scheme and (weight.dequantize() - expected).norm() < 0.1 * expected.norm()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, floats.pop(name))
    assert not floats
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.025), ("fp8", 0.1), ("int4", 0.3)])
@torch.no_grad()
def test_logits_of_both_tasks(folder, scheme, limit):
    whole, model = load(folder).model, load(folder, scheme).model
    ids = torch.arange(40).view(2, 20)
    for task, embed in ((Task.T2I, whole.embed_caption), (Task.MMU, whole.text_embedding)):
        x = embed(ids)
        expected = whole.logits(whole(x, task), task)
        assert (model.logits(model(x, task), task) - expected).norm() < limit * expected.norm()
    assert (model.embed_caption(ids) - whole.embed_caption(ids)).norm() < limit * whole.embed_caption(ids).norm()
    assert (model.embed_image_tokens(ids) - whole.embed_image_tokens(ids)).norm() < limit * whole.embed_image_tokens(ids).norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generation_does_not_depend_on_the_batch(folder, scheme):
    model = load(folder, scheme).model
    assert generate(model) == generate(model, num_slots=2)


@pytest.mark.skipif(not quant_cpu.is_available(), reason="needs oneDNN on x86")
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_requests_leave_matrices_quantised(folder, scheme, monkeypatch):
    """Neither reading nor writing expands one, which takes longer than the product with it."""
    model = load(folder, scheme).model
    monkeypatch.delattr(QuantizedWeight, "dequantize")
    generate(model)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_is_the_model_that_was_saved(folder, tmp_path, scheme, dtype):
    bundle = load(folder, scheme, dtype)
    weights.save(bundle, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["quantization"] == scheme
    again = load(tmp_path / "saved", dtype=dtype)
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert again.fingerprint == bundle.fingerprint != load(folder, dtype=dtype).fingerprint
    assert generate(again.model) == generate(bundle.model)
    assert load(tmp_path / "saved", scheme, dtype).fingerprint == bundle.fingerprint


@pytest.mark.parametrize("scheme", SCHEMES)
def test_convert_writes_what_loading_makes(folder, tmp_path, scheme):
    convert(folder, tmp_path / "out", quantize=scheme)
    assert load(tmp_path / "out").fingerprint == load(folder, scheme).fingerprint


@pytest.mark.parametrize("scheme", SCHEMES)
def test_8_bit_storage_leaves_quantised_weights_alone(folder, tmp_path, scheme):
    convert(folder, tmp_path / "out", quantize=scheme, dtype="int8")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored["caption_mlp.fc1.weight"].dtype is torch.int8
    again, expected = load(tmp_path / "out").model, load(folder, scheme).model
    for name, weight in expected.named_modules():
        if isinstance(weight, QuantizedWeight):
            assert torch.equal(again.get_submodule(name).scale, weight.scale)
            assert torch.equal(again.get_submodule(name).dequantize(), weight.dequantize())


def test_a_model_of_8_bit_storage_can_be_quantised(folder, tmp_path):
    convert(folder, tmp_path / "packed", dtype="int8")
    packed, quantised = load(tmp_path / "packed").model, load(tmp_path / "packed", "int8").model
    torch.testing.assert_close(quantised.text_embedding(torch.arange(9)), packed.text_embedding(torch.arange(9)), rtol=1e-6, atol=0)


def test_counts_and_bytes(folder):
    count = sum(parameter.numel() for parameter in load(folder).model.parameters())
    sizes = {}
    for scheme in SCHEMES:
        figures = list(parameters(load(folder, scheme).model))
        assert sum(num for _, num, _ in figures) == count
        sizes[scheme] = sum(num_bytes for *_, num_bytes in figures)
    assert sizes["int4"] < sizes["int8"] == sizes["fp8"] < count * 4


def test_a_config_makes_a_quantised_model():
    omni = OmniMamba.from_config(dataclasses.replace(preset("tiny"), quantization="int8"))
    assert omni.config.quantization is Quantization.INT8
    assert OmniMambaConfig.from_dict(omni.config.to_dict()) == omni.config
    assert "quantization" not in preset("tiny").to_dict()
    assert len(generate(omni.bundle.model)[0]) == 6


def test_wrong_input(folder, tmp_path):
    with pytest.raises(ValueError, match="unknown quantization 'int3'; did you mean 'int8'?"):
        load(folder, "int3")
    with pytest.raises(ValueError, match="unknown quantization 'q8'"):
        convert(folder, tmp_path / "out", quantize="q8")
    convert(folder, tmp_path / "int8", quantize="int8")
    with pytest.raises(ValueError, match="int8 is quantised as int8; for int4 quantise the model it was made from"):
        load(tmp_path / "int8", "int4")
    for source, options in ((tmp_path / "int8", {}), (folder, {"quantize": "int8"})):
        with pytest.raises(ValueError, match="quantised as int8; official checkpoints have no such weights"):
            convert(source, tmp_path / "official.pth", to="official", **options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "official.pth").exists()


def test_group_that_does_not_divide():
    config = preset("tiny")
    narrow = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, d_model=96))
    with pytest.raises(ValueError, match=r"text_embedding.weight: int4 .* 96 columns are not a multiple; use int8 or fp8"):
        quantize_model(OmniMambaModel(narrow), "int4")


def test_strict_folders(folder, tmp_path):
    convert(folder, tmp_path / "int8", quantize="int8")
    config_file = tmp_path / "int8/config.json"
    config = json.loads(config_file.read_text())
    for wrong, message in (
        ({"quantization": "int9"}, "config.json: unknown quantization 'int9'; did you mean 'int8'?"),
        ({"quantization": "int4"}, "tensors do not fit the config: .* wrongly shaped: .*values"),
        ({"quantization": "fp8"}, "of the wrong type: .*in_proj.weight.values torch.int8 instead of torch.float8_e4m3fn"),
        ({"quantization": None}, "tensors do not fit the config: .* missing: .*in_proj.weight"),
    ):
        config_file.write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "int8")
