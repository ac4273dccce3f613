"""The kernel of a whole step: on a CPU its source against `Mamba2Backbone.step`, threads emulated; its compilation; on a GPU the launch."""

import ctypes
import dataclasses
import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from omnimamba.config import BackboneConfig, LoraConfig, OmniMambaConfig, Task, preset
from omnimamba.engine.decoder import FusedDecoder
from omnimamba.engine.runner import Runner
from omnimamba.model.omnimamba import OmniMambaModel, cast
from omnimamba.model.quantize import quantize_model
from omnimamba.ops.cuda import backbone_step, compile
from omnimamba.ops.cuda.backbone_step import BackboneStep, Buffers, Shape, arguments_of
from omnimamba.ops.quant import QuantizedWeight

RandomModel = Callable[[OmniMambaConfig], OmniMambaModel]
NUM_SLOTS, NUM_BLOCKS, SHARED_BYTES = 4, 11, 227 * 1024
T2I, MMU = Task.T2I, Task.MMU
ROWS = {  # slot, task
    "one image": [(2, T2I)],
    "one text": [(0, MMU)],
    "both tasks": [(3, MMU), (1, T2I)],
    "padding": [(2, MMU), (-1, T2I)],
}


def config_of(d_model: int, d_state: int = 64, rank: int = 8) -> OmniMambaConfig:
    return dataclasses.replace(
        preset("tiny"),
        backbone=BackboneConfig(d_model=d_model, n_layer=2, d_state=d_state, headdim=64),
        lora=LoraConfig(rank=rank),
        text_vocab_size=208,
        base_vocab_size=198,
    )


def models(
    random_model: RandomModel, config: OmniMambaConfig, scheme: str | None, device: str = "cpu"
) -> tuple[OmniMambaModel, OmniMambaModel]:
    """In bf16, perhaps quantised, and in fp32 with the same numbers."""
    model = cast(random_model(config), torch.bfloat16).to(device).eval().requires_grad_(False)
    expected = cast(OmniMambaModel(config), torch.float32).to(device).eval().requires_grad_(False)
    expected.load_state_dict(model.state_dict())
    if scheme:
        quantize_model(model, scheme)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedWeight):
                expected.get_parameter(name).copy_(module.dequantize())
    return model, expected


def runner_of(model: OmniMambaModel, **options) -> Runner:
    """A runner whose slots all hold a past."""
    runner = Runner(model, NUM_SLOTS, **options)
    generator = torch.Generator().manual_seed(1)
    for part in (runner.state.conv, runner.state.ssm):
        part.copy_(torch.randn(part.shape, generator=generator).bfloat16())
    runner.state.position.copy_(torch.tensor([5, 8, 2, 9]))
    return runner


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, error  # not so for NaN


CASES = {
    "bf16": ({"d_model": 512}, None, torch.float32),
    "half states": ({"d_model": 512, "d_state": 128, "rank": 2}, None, torch.bfloat16),
    "int8": ({"d_model": 1024}, "int8", torch.float32),
    "fp8": ({"d_model": 512, "d_state": 128}, "fp8", torch.float32),
}


def assert_step(
    launch, random_model: RandomModel, case: str, name: str, device: str, num_blocks: int, shared_bytes: int, num_steps: int = 1
) -> None:
    """`launch` makes a function of a step's shape, weights and buffers, which computes the step; called again, the next."""
    sizes, scheme, ssm_dtype = CASES[case]
    model, reference = models(random_model, config_of(**sizes), scheme, device)
    runner, expected = runner_of(model, ssm_dtype=ssm_dtype), runner_of(reference)
    before = runner.state.clone()
    decoder = FusedDecoder(model, runner.state, runner.image_table)
    rows, heads = ROWS[name], list(decoder.heads.values())
    own = [i for i, (slot, _) in enumerate(rows) if slot >= 0]
    slots, is_t2i = torch.tensor([(slot, int(task is T2I)) for slot, task in rows], device=device).T.contiguous()
    embedded = torch.zeros(len(rows), model.config.backbone.d_model, device=device)
    logits = [torch.full((len(rows), head.values.shape[0]), torch.nan, device=device) for head in heads]
    shape = Shape.of(decoder.layers[0], heads, len(rows), num_blocks, shared_bytes)
    assert shape is not None
    step = launch(shape, decoder.layers, decoder.final_norm, heads, Buffers(slots, is_t2i, embedded, logits), eps=decoder.eps)
    for i in range(num_steps):
        embedded.copy_(torch.randn(embedded.shape, generator=torch.Generator().manual_seed(2 + i)))
        expected.state.ssm.copy_(runner.state.ssm)
        expected.state.conv.copy_(runner.state.conv)
        step()
        state = expected.state.slots([rows[i][0] for i in own])
        hidden = reference.backbone.step(embedded[own], is_t2i[own].bool(), state)
        expected.state.store([rows[i][0] for i in own], state)
        assert_near(logits[0][own], hidden @ reference.image_embedding.weight.T, 1e-2)
        assert_near(logits[1][own], hidden @ reference.text_embedding.weight.T, 1e-2)
        assert_near(runner.state.ssm, expected.state.ssm, 1e-2)
        assert_near(runner.state.conv, expected.state.conv, 1e-2)
    others = [slot for slot in range(NUM_SLOTS) if slot not in [rows[i][0] for i in own]]
    for part in ("conv", "ssm"):
        assert torch.equal(getattr(runner.state, part)[:, others], getattr(before, part)[:, others])


@pytest.mark.parametrize(("case", "name", "seed"), [(c, n, s) for s, (c, n) in enumerate(itertools.product(CASES, ROWS))])
def test_the_emulated_kernel_equals_the_plain_step(emulated, random_model, case, name, seed):
    """seed: of the order in which threads go on."""

    def launch(shape, *values, eps):
        arguments, kept = arguments_of(*values, eps=eps)
        if seed % 2:  # the smallest ring, in which a thread that wants two stages at once would wait for ever
            shape = shape._replace(num_stages=backbone_step.NUM_WARPS // shape.slices)

        def step():
            assert emulated("backbone_step.cpp", shape.defines()).emulate(ctypes.byref(arguments), NUM_BLOCKS, seed), (
                "threads waited for each other"
            )
            assert kept[-1].tolist() == [1, 0, 0]  # tags: of the residual stream after three rounds, of all else after two

        return step

    assert_step(launch, random_model, case, name, "cpu", NUM_BLOCKS, SHARED_BYTES)


def test_a_step_of_padding_is_none(emulated, random_model):
    model, _ = models(random_model, config_of(512), None)
    runner = runner_of(model)
    before, decoder = runner.state.clone(), FusedDecoder(model, runner.state, runner.image_table)
    heads = list(decoder.heads.values())
    slots, is_t2i, embedded = torch.tensor([-1, -1]), torch.tensor([0, 1]), torch.zeros(2, 512)
    logits = [torch.full((2, head.values.shape[0]), torch.nan) for head in heads]
    shape = Shape.of(decoder.layers[0], heads, 2, NUM_BLOCKS, SHARED_BYTES)
    assert shape is not None
    arguments, kept = arguments_of(decoder.layers, decoder.final_norm, heads, Buffers(slots, is_t2i, embedded, logits), eps=1e-5)
    assert emulated("backbone_step.cpp", shape.defines()).emulate(ctypes.byref(arguments), NUM_BLOCKS, 0)
    assert kept[-1].tolist() == [0, 0, 0] and all(part.isnan().all() for part in logits)
    assert torch.equal(runner.state.conv, before.conv) and torch.equal(runner.state.ssm, before.ssm)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ROWS)
def test_the_launch_equals_the_plain_step(random_model, case, name):
    properties = torch.cuda.get_device_properties("cuda")
    assert_step(
        BackboneStep,
        random_model,
        case,
        name,
        "cuda",
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        num_steps=3,
    )


LARGE = Shape(2048, 4096, 64, 128, 8, 1, "Bf16", "Bf16", False, 2, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "sm_120"])  # Hopper and two of Blackwell
@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize(("weights", "half_state"), [("Bf16", False), ("Int8", True), ("Fp8", False)])
def test_it_compiles(architecture, num_rows, weights, half_state):
    """At the 1.3B shape, with hardly a register spilled: there is little cache beside the ring."""
    num_stages = 10 - 2 * num_rows
    shape = LARGE._replace(num_rows=num_rows, num_stages=num_stages, layer_weights=weights, head_weights=weights, half_state=half_state)
    _, log = compile.compile_cubin(backbone_step.SOURCES, shape.defines(), architecture)
    assert "warning" not in log, log
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled and int(spilled[1]) <= 8, log


def test_what_the_compiler_refuses_is_an_error():
    with pytest.raises(RuntimeError, match=r"backbone_step.cu does not compile for sm_90:\n(.|\n)*error"):
        compile.compile_cubin(backbone_step.SOURCES, LARGE._replace(head_weights="Bf17").defines(), "sm_90")


def test_without_nvrtc_it_is_said_once(monkeypatch, caplog):
    def library():
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(compile, "library", library)
    compile.is_available.cache_clear()
    assert not compile.is_available() and not compile.is_available()
    assert [record.message for record in caplog.records] == [
        "decoding takes several launches a layer, for NVRTC, which torch's CUDA wheels bring, is missing: "
        "libnvrtc.so.13: cannot open shared object file"
    ]
    compile.is_available.cache_clear()


def test_shapes_that_it_leaves_to_others(random_model):
    """Other numbers, sizes and devices."""

    def shape_of(model: OmniMambaModel, num_rows: int = 1, **options) -> Shape | None:
        runner = runner_of(model, **options)
        decoder = FusedDecoder(model, runner.state, runner.image_table)
        assert backbone_step.device_shape(decoder.layers[0], list(decoder.heads.values()), num_rows, torch.device("cpu")) is None
        return Shape.of(decoder.layers[0], list(decoder.heads.values()), num_rows, 132, 227 * 1024)

    half, single = models(random_model, config_of(512), None)
    assert shape_of(half) == Shape(512, 1024, 16, 64, 8, 1, "Bf16", "Bf16", False, 1, 2, 32)
    assert shape_of(half, 2) is not None
    assert shape_of(half, 3) is None
    assert shape_of(half, ssm_dtype=torch.bfloat16) is None  # four bytes a lane
    assert shape_of(single) is None
    assert shape_of(models(random_model, config_of(768), None)[0]) is None
