"""The compiled decode step against the plain one: formats, shapes, tasks, slots, threads."""

import dataclasses
import threading

import pytest
import torch

from omnimamba.config import Task
from omnimamba.engine.cpu_decoder import CPUDecoder
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.engine.runner import Runner, missing_for_cpu_decoding
from omnimamba.model.omnimamba import OmniMambaModel, cast
from omnimamba.model.quantize import quantize_model
from omnimamba.ops import plain_path
from omnimamba.ops.cpu import decode

NUM_SLOTS = 7
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 3e-3, "fp8": 2e-2, "int4": 2e-2}
"""rms(error) / rms(expected); the plain step rounds activations to 14 bits for int8, to bf16 for the two after it."""


def relative(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def build(config, name="float32", **backbone):
    """A model whose LoRA pairs, decays and biases are not those of a start."""
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, **backbone))
    torch.manual_seed(3)
    model = OmniMambaModel(config).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith((".D", ".dt_bias")) or ".lora_B" in parameter_name:
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    if name == "bfloat16":
        cast(model, torch.bfloat16)
    elif name != "float32":
        quantize_model(model, name)
    return model


def runners(model, **options):
    """Plain and compiled, with the same past in all slots."""
    pair = Runner(model, NUM_SLOTS, **options), Runner(model, NUM_SLOTS, **options)
    for runner in pair:
        generator = torch.Generator().manual_seed(0)
        for part in (runner.state.conv, runner.state.ssm):
            part.copy_(torch.randn(part.shape, generator=generator))
        runner.state.position.copy_(torch.arange(NUM_SLOTS))
    pair[0].cpu_decoder = None
    assert pair[1].cpu_decoder is not None
    return pair


MIXED = {2: Task.MMU, 0: Task.T2I, 5: Task.T2I, 3: Task.MMU, 6: Task.T2I, 1: Task.T2I, 4: Task.T2I}


def assert_equal_steps(model, tolerance, tasks=MIXED, num_steps=3, **options):
    plain, compiled = runners(model, **options)
    slots = list(tasks)
    for step in range(num_steps):
        tokens = [(7 * slot + step) % 60 for slot in slots]
        expected, found = (runner.decode(slots, list(tasks.values()), tokens) for runner in (plain, compiled))
        assert expected.keys() == found.keys()
        for task in expected:
            assert found[task].shape == expected[task].shape
            assert relative(found[task], expected[task]) < tolerance, (task, step)
    for part in ("conv", "ssm"):
        assert relative(getattr(compiled.state, part), getattr(plain.state, part)) < tolerance, part
    assert torch.equal(compiled.state.position, plain.state.position)


@pytest.mark.parametrize("name", TOLERANCE)
def test_formats(config, name):
    assert_equal_steps(build(config, name), TOLERANCE[name])


def test_a_state_in_bf16(config):
    assert_equal_steps(build(config), 1e-2, ssm_dtype=torch.bfloat16)


@pytest.mark.parametrize("shape", [{"ngroups": 2}, {"headdim": 16, "d_state": 48}, {"d_conv": 2}, {"d_model": 80, "headdim": 32}])
def test_shapes(config, shape):
    assert_equal_steps(build(config, **shape), TOLERANCE["float32"])


@pytest.mark.parametrize("rank", [0, 16, 20])
def test_lora_ranks(config, rank):
    lora = dataclasses.replace(config.lora, rank=rank)
    assert_equal_steps(build(dataclasses.replace(config, lora=lora)), TOLERANCE["float32"])


@pytest.mark.parametrize("task", Task)
def test_one_task_alone(config, task):
    assert_equal_steps(build(config), TOLERANCE["float32"], tasks={4: task, 1: task})


def test_rows_of_zeros_with_lora(config):
    model = build(config)
    model.backbone.layers[0].mixer.in_proj.weight[::3] = 0
    quantize_model(model, "int8")
    assert_equal_steps(model, TOLERANCE["int8"])


def logits_of(model, tasks, num_threads):
    _, runner = runners(model)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        runner.cpu_decoder = CPUDecoder(model, runner.state)
    finally:
        torch.set_num_threads(torch_threads)
    logits = runner.decode(list(tasks), list(tasks.values()), [7 * slot % 60 for slot in tasks])
    rows = {task: iter(logits[task]) for task in logits}
    return {slot: next(rows[task]) for slot, task in tasks.items()}, runner


def test_neither_neighbours_nor_threads_change_a_row(config, monkeypatch):
    monkeypatch.setattr("omnimamba.engine.cpu_decoder.NUMBERS_PER_THREAD", 1)
    model = build(config, "int8")
    together, runner = logits_of(model, MIXED, 3)
    assert runner.cpu_decoder.num_threads == 3
    for slot, task in MIXED.items():
        alone, _ = logits_of(model, {slot: task}, 1)
        assert torch.equal(alone[slot], together[slot]), slot


def test_a_thread_that_ends_early_leaves_nobody_waiting(config, monkeypatch):
    monkeypatch.setattr("omnimamba.engine.cpu_decoder.NUMBERS_PER_THREAD", 1)
    model = build(config)
    _, runner = logits_of(model, MIXED, 2)
    kernel = decode.run
    finished = threading.Event()

    def interrupted(layers, heads, shape, rows, thread):
        if thread.number == 0:
            raise KeyboardInterrupt
        kernel(layers, heads, shape, rows, thread)
        finished.set()

    monkeypatch.setattr("omnimamba.ops.cpu.decode.run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.decode([0], [Task.MMU], [1])
    assert finished.wait(30)


def test_small_models_take_one_thread(model):
    assert Runner(model, 1).cpu_decoder.num_threads == 1


def test_the_engine_paints_and_answers_the_same(model, monkeypatch):
    requests = [
        Request(Task.T2I, tuple(range(1, model.config.t2i_prompt_length + 1)), sampling=SamplingParams(seed=1, top_k=20), num_samples=2),
        Request(Task.MMU, (5, 6, 7, 8, 9), sampling=SamplingParams(temperature=0, max_new_tokens=9)),
    ]
    found = Engine(model, num_slots=4).run(requests)
    monkeypatch.setattr("omnimamba.engine.runner.missing_for_cpu_decoding", lambda *_: "turned off")
    engine = Engine(model, num_slots=4)
    assert engine.runner.cpu_decoder is None
    assert [[sample.tokens for sample in samples] for samples in found] == [[s.tokens for s in samples] for samples in engine.run(requests)]


@pytest.mark.parametrize(
    ("shape", "dtype", "ssm_dtype", "reason"),
    [
        ({}, torch.float32, torch.float32, None),
        ({}, torch.bfloat16, torch.bfloat16, None),
        ({"d_state": 24}, torch.float32, torch.float32, "d_state=24"),
        ({"headdim": 8}, torch.float32, torch.float32, "headdim=8"),
        ({"d_model": 72, "headdim": 16}, torch.float32, torch.float32, "d_model=72"),
        ({}, torch.float16, torch.float32, "float16"),
        ({}, torch.float32, torch.float16, "float16"),
    ],
)
def test_what_has_a_kernel(config, shape, dtype, ssm_dtype, reason):
    found = missing_for_cpu_decoding(cast(build(config, **shape), dtype), ssm_dtype)
    assert (reason is None and found is None) or reason in found


def test_where_kernels_are_off_it_is_said(config, monkeypatch, caplog):
    monkeypatch.setenv("OMNIMAMBA_KERNELS", "0")
    plain_path.missing_for_kernels.cache_clear()
    plain_path._announce.cache_clear()
    runner = Runner(build(config), 1)
    monkeypatch.undo()
    plain_path.missing_for_kernels.cache_clear()
    assert runner.cpu_decoder is None
    assert "decoding runs as plain PyTorch on CPU (OMNIMAMBA_KERNELS=0" in caplog.text
