"""The convolution's kernel against its definition."""

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.ops.conv import causal_conv1d, plain_causal_conv1d
from omnimamba.ops.plain_path import missing_for_kernels
from omnimamba.ops.triton import conv as kernel

pytestmark = pytest.mark.usefixtures("poisoned_memory")
WIDTH = 4


def inputs(device, dtype, b, l, c=136, *, has_past=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {"x": torch.randn(b, l, c, generator=generator), "weight": torch.randn(c, WIDTH, generator=generator)}
    tensors["bias"] = torch.randn(c, generator=generator)
    if has_past:
        tensors["initial_state"] = torch.randn(b, c, WIDTH, generator=generator)
    return {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("has_past", [False, True])
@pytest.mark.parametrize("l", [1, 3, 4, 5, 63, 64, 65, 130])
def test_whole_sequence(kernel_device, compare, l, has_past):
    compare(kernel.causal_conv1d, plain_causal_conv1d, inputs(kernel_device, torch.float32, 2, l, has_past=has_past))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("l", [5, 65])
def test_half_precision(kernel_device, compare, l, dtype):
    compare(kernel.causal_conv1d, plain_causal_conv1d, inputs(kernel_device, dtype, 2, l))


@pytest.mark.parametrize("has_past", [False, True])
def test_unequal_lengths(kernel_device, compare, has_past):
    tensors = inputs(kernel_device, torch.float32, 5, 33, has_past=has_past)
    lengths = torch.tensor([33, 0, 1, 3, 32], device=kernel_device)

    def of(op):
        return lambda **tensors: op(**tensors, lengths=lengths)

    compare(of(kernel.causal_conv1d), of(plain_causal_conv1d), tensors)


def test_nan_in_the_padding_reaches_no_valid_output(kernel_device):
    tensors = inputs(kernel_device, torch.float32, 3, 9)
    lengths = [9, 2, 0]
    for i, length in enumerate(lengths):
        tensors["x"][i, length:] = torch.nan
    y, state = kernel.causal_conv1d(**tensors, lengths=torch.tensor(lengths, device=kernel_device))
    assert state.isfinite().all()
    for i, length in enumerate(lengths):
        assert y[i, :length].isfinite().all()


def test_slice_of_a_wider_projection_and_gradient_of_any_layout(kernel_device, compare):
    tensors = inputs(kernel_device, torch.float32, 2, 70)

    def strided(op):
        def run(x, **others):
            y, state = op(torch.cat([x, x, x], -1)[..., x.shape[-1] : -x.shape[-1]], **others)
            return y.transpose(1, 2), state

        return run

    compare(strided(kernel.causal_conv1d), strided(plain_causal_conv1d), tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "l", "c"), [(256, 293, 640), (48, 329, 4352), (3, 1500, 4352)])
def test_real_sizes(compare, b, l, c, dtype):
    compare(kernel.causal_conv1d, plain_causal_conv1d, inputs("cuda", dtype, b, l, c))


def test_switch(monkeypatch):
    for value, reason in (("0", "OMNIMAMBA_KERNELS=0"), ("1", None)):
        monkeypatch.setenv("OMNIMAMBA_KERNELS", value)
        missing_for_kernels.cache_clear()
        assert (missing_for_kernels() or "")[: len(reason or "")] == (reason or "")
    monkeypatch.setenv("OMNIMAMBA_KERNELS", "yes")
    missing_for_kernels.cache_clear()
    with pytest.raises(ValueError, match="set it to 1"):
        missing_for_kernels()
    monkeypatch.undo()
    missing_for_kernels.cache_clear()


@pytest.mark.gpu
def test_switch_reaches_the_kernel(monkeypatch):
    tensors = inputs("cuda", torch.bfloat16, 2, 65)
    monkeypatch.setenv("OMNIMAMBA_KERNELS", "1")
    missing_for_kernels.cache_clear()
    found = causal_conv1d(**tensors)[0]
    monkeypatch.undo()
    missing_for_kernels.cache_clear()
    assert torch.equal(found, kernel.causal_conv1d(**tensors)[0])
