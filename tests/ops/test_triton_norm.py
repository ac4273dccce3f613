"""The kernels of the norms against their definitions."""

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.ops.norm import gated_rms_norm, plain_gated_rms_norm, plain_rms_norm, rms_norm
from omnimamba.ops.triton import norm as kernel

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-5


def inputs(device, dtype, *shape):
    generator = torch.Generator().manual_seed(0)
    shapes = {"y": shape, "z": shape, "weight": shape[-1:]}
    return {name: torch.randn(shape, generator=generator).to(dtype).to(device) for name, shape in shapes.items()}


def gated(op, num_groups=1):
    return lambda y, z, weight: (op(y, z, weight, EPS, num_groups=num_groups),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 12), (3, 65, 96), (2, 5, 2048)])
def test_rms_norm(kernel_device, compare, shape, dtype):
    tensors = inputs(kernel_device, dtype, *shape)
    kernel_norm, plain = (lambda x, weight, op=op: (op(x, weight, EPS),) for op in (kernel.rms_norm, plain_rms_norm))
    compare(kernel_norm, plain, {"x": tensors["y"], "weight": tensors["weight"]})


@pytest.mark.parametrize("name", ["rms_norm", "gated_rms_norm"])
def test_autocast_gives_the_type_of_products(name):
    y, z, weight = torch.randn(3, 64), torch.randn(3, 64), torch.ones(64)

    def normed():
        return rms_norm(y, weight, EPS) if name == "rms_norm" else gated_rms_norm(y, z, weight, EPS)

    with torch.autocast("cpu", torch.bfloat16):
        found = normed()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, normed().bfloat16())


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 12), (3, 65, 96), (2, 5, 1152)])
def test_gated_rms_norm(kernel_device, compare, shape, num_groups):
    tensors = inputs(kernel_device, torch.float32, *shape)
    compare(gated(kernel.gated_rms_norm, num_groups), gated(plain_gated_rms_norm, num_groups), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kernel_device, compare, dtype):
    tensors = inputs(kernel_device, dtype, 3, 65, 96)
    compare(gated(kernel.gated_rms_norm, 2), gated(plain_gated_rms_norm, 2), tensors)


def test_dtypes_are_those_of_the_definition(kernel_device):
    tensors = inputs(kernel_device, torch.bfloat16, 2, 96)
    weight = tensors["weight"].float()
    assert kernel.gated_rms_norm(tensors["y"], tensors["z"], weight, EPS).dtype == torch.float32
    assert kernel.gated_rms_norm(tensors["y"].float(), tensors["z"].float(), tensors["weight"], EPS).dtype == torch.bfloat16


def test_more_rows_than_programs(kernel_device, compare, monkeypatch):
    monkeypatch.setattr(kernel, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(kernel, "NORM_WARPS", 1)
    compare(gated(kernel.gated_rms_norm, 2), gated(plain_gated_rms_norm, 2), inputs(kernel_device, torch.float32, 101, 64))


def test_slices_of_a_wider_projection(kernel_device, compare):
    def strided(op):
        def run(y, z, weight):
            return (op(y, torch.cat([z, z], -1)[..., : z.shape[-1]], weight, EPS).transpose(0, 1),)

        return run

    compare(strided(kernel.gated_rms_norm), strided(plain_gated_rms_norm), inputs(kernel_device, torch.float32, 3, 7, 64))


def test_zeros(kernel_device):
    zeros, ones = torch.zeros(2, 64, device=kernel_device), torch.ones(64, device=kernel_device)
    assert not kernel.gated_rms_norm(zeros, zeros, ones, EPS).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 293, 512), (48, 329, 4096), (48, 329, 2048)])
def test_real_sizes(compare, shape, dtype):
    tensors = inputs("cuda", dtype, *shape)
    compare(gated(kernel.gated_rms_norm), gated(plain_gated_rms_norm), tensors)
