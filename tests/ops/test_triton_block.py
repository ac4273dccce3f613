"""A whole block as one operator against the block composed of plain operators: outputs, and the gradients of what trains."""

import collections
import dataclasses

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from omnimamba.config import PRESETS, Task
from omnimamba.model.mamba2 import Mamba2Block
from omnimamba.ops import block as ops
from omnimamba.ops.triton import block as kernel
from omnimamba.ops.triton import lora

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TINY = PRESETS["tiny"]


def block_of(device, *, rank=4, dropout=0.0, **sizes):
    torch.manual_seed(0)
    lora = dataclasses.replace(TINY.lora, rank=rank, dropout=dropout)
    block = Mamba2Block(dataclasses.replace(TINY.backbone, **sizes), lora).train()
    for parameter in block.parameters():  # B of LoRA is 0, norms are 1
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() == 2 else parameter.data.add_(0.1 * torch.randn_like(parameter))
    return block.to(device)


def learn(block, residual, task=Task.MMU, *, hidden_dtype=torch.float32, lengths=None, **saving):
    """The outputs and the gradients of both inputs and of all parameters that train."""
    inputs = {"residual": residual.detach().requires_grad_()}
    if hidden_dtype is not None:  # not the first block
        inputs["hidden"] = (residual.detach().flip(-1) / 2).to(hidden_dtype).requires_grad_()
    outs = block(inputs["residual"], inputs.get("hidden"), task, lengths, saving=ops.Saving(**saving))
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad} | inputs
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outs]
    grads = torch.autograd.grad(outs, list(trained.values()), ways, allow_unused=True)
    return {"total": outs[0], "out": outs[1]} | dict(zip(trained, grads, strict=True))


@pytest.fixture
def whole(monkeypatch):
    """Switches between the operator and the composition; counts the operator's calls."""
    calls = []
    apply = kernel.Block.apply

    def counted(*arguments):
        calls.append(arguments)
        return apply(*arguments)

    monkeypatch.setattr(kernel.Block, "apply", counted)

    def switch(is_whole):
        monkeypatch.setattr(ops, "runs_kernel", lambda x: is_whole)
        monkeypatch.setattr("omnimamba.ops.conv.runs_kernel", lambda x: False)
        monkeypatch.setattr("omnimamba.ops.norm.runs_kernel", lambda x: False)
        monkeypatch.setattr("omnimamba.ops.ssd.runs_kernel", lambda x: False)
        return calls

    return switch


def assert_equal_gradients(found, expected, tolerance=3e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert found[name].dtype == value.dtype, name
            error = (found[name] - value).abs().max() / value.abs().max()
            assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lengths", [None, [35, 7]])
def test_gradients(kernel_device, whole, lengths, recompute):
    block, residual = block_of(kernel_device), torch.randn(2, 35, TINY.backbone.d_model, device=kernel_device)
    given = None if lengths is None else torch.tensor(lengths, device=kernel_device)
    whole(False)
    expected = learn(block, residual, lengths=given)
    calls = whole(True)
    found = learn(block, residual, lengths=given, recompute=recompute)
    assert len(calls) == 1
    assert_equal_gradients(found, expected)


def test_first_block(kernel_device, whole):
    block, residual = block_of(kernel_device), torch.randn(2, 9, TINY.backbone.d_model, device=kernel_device)
    whole(False)
    expected = learn(block, residual, hidden_dtype=None)
    whole(True)
    assert_equal_gradients(learn(block, residual, hidden_dtype=None), expected)


def test_weights_are_made_ready_once(kernel_device, whole, monkeypatch):
    block, residual = block_of(kernel_device), torch.randn(2, 9, TINY.backbone.d_model, device=kernel_device)
    made = []
    make = kernel.make_ready

    def counted(*arguments):
        made.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(kernel, "make_ready", counted)
    whole(True)
    weights = ops.ReadyWeights()
    for num, task in enumerate((Task.MMU, Task.MMU, Task.T2I, Task.MMU)):
        expected = learn(block, residual, task)
        assert_equal_gradients(learn(block, residual, task, ready=weights), expected)
        assert len(made) == 2 * (num + 1) + max(1, num)  # forwards and backwards where nothing is kept; once for a task in a row
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, fused=True)
    sum(p.sum() for p in block.parameters()).backward()
    optimizer.step()
    weights.clear()
    expected = learn(block, residual)
    assert_equal_gradients(learn(block, residual, ready=weights), expected)
    optimizer.step()
    stale = learn(block, residual, ready=weights)
    assert not torch.allclose(stale["out"], learn(block, residual)["out"], rtol=0.01)


def test_several_chunks_and_spans(kernel_device, whole):
    """More positions than the scan's chunk and the span of a program of the convolution."""
    block, residual = block_of(kernel_device), torch.randn(1, 150, TINY.backbone.d_model, device=kernel_device)
    whole(False)
    expected = learn(block, residual)
    whole(True)
    assert_equal_gradients(learn(block, residual), expected)


@pytest.mark.parametrize(
    ("task", "sizes", "frozen"),
    [
        (Task.T2I, {}, ("in_proj.weight", "out_proj", "conv1d", "norm", "dt_bias", "A_log", "mixer.D")),  # LoRA alone
        (Task.T2I, {}, ("lora",)),
        (None, {}, ()),
        (Task.MMU, {"rank": 0}, ("out_proj",)),
        (Task.MMU, {"ngroups": 2}, ()),
        (Task.MMU, {}, ("",)),  # only the residual stream
    ],
)
def test_what_trains(kernel_device, whole, task, sizes, frozen):
    block, residual = block_of(kernel_device, **sizes), torch.randn(1, 5, TINY.backbone.d_model, device=kernel_device)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    whole(False)
    expected = learn(block, residual, task)
    whole(True)
    assert_equal_gradients(learn(block, residual, task, recompute=True), expected)


def test_under_autocast(kernel_device, whole):
    """The dtypes of the composition, and errors against fp32 not much above its errors, over several draws: some gradients are of four
    numbers, whose errors are a matter of chance."""
    block = block_of(kernel_device)
    squares = collections.defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for seed in range(6):
        residual = torch.randn(2, 20, TINY.backbone.d_model, generator=torch.Generator().manual_seed(seed)).to(kernel_device)
        results = {}
        for path, is_whole, is_bf16 in (("whole", True, True), ("composed", False, True), ("fp32", False, False)):
            whole(is_whole)
            with torch.autocast(kernel_device, torch.bfloat16, enabled=is_bf16):
                results[path] = learn(block, residual, hidden_dtype=torch.bfloat16, recompute=True)
        for name, expected in results["fp32"].items():
            found, composed = results["whole"][name], results["composed"][name]
            if expected is not None:
                assert found.dtype == composed.dtype, name
                errors = (m.double() - expected.double() for m in (found, composed))
                squares[name] += torch.tensor([m.square().sum().item() for m in (*errors, expected.double())])
    for name, (error, other, expected) in ((name, sums.sqrt().tolist()) for name, sums in squares.items()):
        assert error <= 1.5 * other + 2e-3 * expected, f"{name}: {error}, composed {other}"


def test_dropout_is_the_same_backwards(kernel_device, whole, monkeypatch):
    block, residual = block_of(kernel_device, dropout=0.3), torch.randn(2, 20, TINY.backbone.d_model, device=kernel_device)
    seed = torch.full((1,), 2**40 + 5, device=kernel_device)
    monkeypatch.setattr(torch, "randint", lambda *size, device: seed)
    dropped = []

    def same_dropout(u, p, training=True):
        keep, rows = torch.zeros_like(u), u.numel() // u.shape[-1]
        lora.add_up(keep.view(rows, -1), u.new_ones(rows, 1), u.new_ones(1, u.shape[-1]), lora.Dropout(seed, p))
        dropped.append((keep == 0).float().mean())
        return u * keep

    monkeypatch.setattr(F, "dropout", same_dropout)
    whole(False)
    expected = learn(block, residual)
    assert 0.25 < dropped[0] < 0.35
    for recompute in (False, True):
        whole(True)
        assert_equal_gradients(learn(block, residual, recompute=recompute), expected)
