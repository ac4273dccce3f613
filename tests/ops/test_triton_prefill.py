"""The kernels that read a prompt against their definitions."""

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.config import PRESETS, Task
from omnimamba.model.mamba2 import Mamba2Backbone
from omnimamba.model.state import MambaState
from omnimamba.ops import conv, norm, prefill, ssd
from omnimamba.ops.norm import length_mask
from omnimamba.ops.triton import prefill as kernel

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("w", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("l", "lengths"),
    [(40, None), (40, [40, 33, 0, 2]), (2, None), (2, [2, 0, 1, 1]), (1, None)],
)
def test_scan_inputs(kernel_device, w, dtype, l, lengths):
    """Slices of a wider projection; rows without a position, and of fewer than a conv state holds."""
    b, c, h = 4, 40, 6
    weights = {"weight": randn(c, w, seed=1), "bias": randn(c, seed=2), "dt_bias": randn(h, seed=3) * 15}
    weights = {name: weight.to(kernel_device) for name, weight in weights.items()}
    _, xBC, dt = randn(b, l, 24 + c + h).to(kernel_device, dtype).split((24, c, h), -1)
    states = [randn(2, b, c, w, seed=4).to(kernel_device, dtype) for _ in range(2)]
    given = None if lengths is None else torch.tensor(lengths, device=kernel_device)
    (y, step_sizes), (expected_y, expected_step_sizes) = (
        function(xBC, dt, **weights, conv_state=state[1], lengths=given)
        for function, state in zip((kernel.scan_inputs, prefill.plain_scan_inputs), states, strict=True)
    )
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(y, expected_y, **tolerance)
    torch.testing.assert_close(step_sizes, expected_step_sizes, rtol=1e-5, atol=1e-6)
    assert torch.equal(*states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sums", [None, 0, 1, 5])
def test_add_rms_norm(kernel_device, dtype, num_sums):
    """Without an addend, with one, and with one that sums of squares have yet to divide."""
    residuals = [randn(2, 7, 40).to(kernel_device) for _ in range(2)]
    addend = None if num_sums is None else randn(2, 7, 40, seed=1).to(kernel_device, dtype)
    squares = norm.Squares(randn(2, 7, num_sums, seed=3).square().to(kernel_device), 30) if num_sums else None
    weight = randn(40, seed=2).to(kernel_device, dtype)
    found, expected = (
        function(residual, addend, weight, 1e-5, squares)
        for function, residual in zip((kernel.add_rms_norm, prefill.plain_add_rms_norm), residuals, strict=True)
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    torch.testing.assert_close(*residuals)
    assert (num_sums is not None) != torch.equal(residuals[0], randn(2, 7, 40).to(kernel_device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "l", "sizes"), [
    (1, 1, (4, 24, 20)), (2, 70, (4, 24, 20)), (3, 33, (2, 16, 16)), (1, 255, (2, 64, 64)), (1, 256, (2, 64, 64)), (1, 257, (2, 64, 128))
])  # fmt: skip
def test_gated_scan(kernel_device, assert_near, dtype, b, l, sizes):
    """From a state, z a slice of a wider projection, whole walks and spans; once divided, y is that of the definition."""
    h, p, n = sizes
    x, B, C = (randn(*shape, seed=seed).to(dtype) for seed, shape in enumerate(((b, l, h, p), (b, l, 1, n), (b, l, 1, n)), 1))
    tensors = {"x": x, "B": B, "C": C, "dt": randn(b, l, h, seed=4).square() / 4, "A": -randn(h, seed=5).exp(), "D": randn(h, seed=6)}
    tensors |= {"z": randn(b, l, h * p + 8, seed=7).to(dtype), "norm_weight": 1 + randn(h * p, seed=8) / 2}
    tensors["initial_state"] = randn(b, h, p, n, seed=9)
    tensors["dt"][-1, l // 2 :] = 0  # padding

    arguments = {name: tensor.to(kernel_device) for name, tensor in tensors.items()}
    y, squares, final = kernel.gated_scan(**arguments | {"z": arguments["z"][..., 8:]})
    exact = {name: tensor.float() for name, tensor in arguments.items()}
    z, norm_weight = exact.pop("z")[..., 8:], exact.pop("norm_weight")
    expected_y, expected_final = ssd.plain_ssd_chunk_scan(**exact, chunk_size=64)
    assert y.dtype == dtype and squares.k == h * p
    assert_near(y.float() / squares.rms(1e-5), norm.plain_gated_rms_norm(expected_y.flatten(-2), z, norm_weight, 1e-5), "y", dtype)
    assert_near(final, expected_final, "final state", dtype)


def test_what_a_later_division_is_not_for(monkeypatch):
    """Groups, each with an rms of its own, and fp16, which could overflow before."""
    monkeypatch.setattr(prefill, "runs_kernel", lambda x: True)
    for num_groups, dtype in ((2, torch.float32), (1, torch.float16)):
        x, B = randn(1, 5, 2, 16).to(dtype), randn(1, 5, 2, 16, seed=1).to(dtype)
        z, weight = randn(1, 5, 32, seed=2).to(dtype), torch.ones(32)
        options = {"D": torch.ones(2), "chunk_size": 64, "initial_state": randn(1, 2, 16, 16)}
        scan = x, torch.full((1, 5, 2), 0.1), -torch.ones(2), B, B
        y, squares, _ = prefill.gated_scan(*scan, z=z, norm_weight=weight, eps=1e-5, num_groups=num_groups, **options)
        expected, _ = ssd.ssd_chunk_scan(*scan, **options)
        assert squares is None
        assert torch.equal(y, norm.gated_rms_norm(expected.flatten(-2), z, weight, 1e-5, num_groups=num_groups))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, [20, 0, 7]])
def test_backbone(kernel_device, monkeypatch, lengths):
    """Two pieces of prompts through all kernels, with a state that is a slice of a pool."""
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    backbone = Mamba2Backbone(config.backbone, config.lora).to(kernel_device).eval()
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    pieces = [randn(3, 20, config.backbone.d_model, seed=seed).to(kernel_device) for seed in (1, 2)]
    before = [piece.clone() for piece in pieces]
    given = None if lengths is None else torch.tensor(lengths, device=kernel_device)
    results = []
    for is_kernel in (True, False):
        for module in (conv, norm, prefill, ssd):
            monkeypatch.setattr(module, "runs_kernel", lambda x, is_kernel=is_kernel: is_kernel)
        state = MambaState.zeros(config.backbone, 5, device=kernel_device).slots([1, 2, 3])
        hidden = [backbone(piece, Task.MMU, state=state, lengths=given) for piece in pieces]
        valid = slice(None) if lengths is None else length_mask(given, 20)
        results.append([*(piece[valid] for piece in hidden), state.conv, state.ssm, state.position])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    assert all(map(torch.equal, pieces, before))
