"""Norms and the step size against fp64 arithmetic written out."""

import pytest
import torch

from omnimamba.ops import gated_rms_norm, rms_norm
from omnimamba.ops.norm import length_mask, softplus_dt

EPS = 1e-5


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normalised(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def gated(y, z, weight, num_groups=1):
    y = (y * z * torch.sigmoid(z)).unflatten(-1, (num_groups, -1))
    return normalised(y, weight.unflatten(-1, (num_groups, -1))).flatten(-2)


def check(op, reference, *arguments):
    """Compares outputs and gradients of `op` in fp32 with those of `reference` in fp64."""
    fp32 = [a.clone().requires_grad_() for a in arguments]
    fp64 = [a.double().requires_grad_() for a in arguments]
    found, expected = op(*fp32), reference(*fp64)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (found * weights.float()).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(fp32, fp64, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (3, 257, 24), (2, 0, 24)])
def test_rms_norm(shape):
    check(lambda x, weight: rms_norm(x, weight, EPS), normalised, randn(*shape), randn(shape[-1], seed=1))


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 12), (3, 257, 24), (2, 0, 24)])
def test_gated_rms_norm(shape, num_groups):
    check(
        lambda y, z, weight: gated_rms_norm(y, z, weight, EPS, num_groups=num_groups),
        lambda y, z, weight: gated(y, z, weight, num_groups),
        *(randn(*shape), randn(*shape, seed=1), randn(shape[-1], seed=2)),
    )


def test_rms_of_zeros_is_eps():
    assert not rms_norm(torch.zeros(2, 8), torch.ones(8), EPS).any()
    tiny = torch.full((1, 8), 1e-4)
    torch.testing.assert_close(rms_norm(tiny, torch.ones(8), EPS), tiny / (1e-8 + EPS) ** 0.5)


def test_bf16_is_computed_in_fp32():
    x, z, weight = randn(4, 64) * 300, randn(4, 64, seed=1), randn(64, seed=2).bfloat16()
    for found, expected in (
        (rms_norm(x.bfloat16(), weight, EPS), normalised(x.bfloat16().double(), weight.double())),
        (gated_rms_norm(x.bfloat16(), z.bfloat16(), weight, EPS), gated(*(a.bfloat16().double() for a in (x, z)), weight.double())),
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4)


def test_softplus_dt():
    dt, dt_bias = randn(5, 3) * 30, randn(3, seed=1)
    expected = torch.log1p(torch.exp(dt.double() + dt_bias.double()))
    torch.testing.assert_close(softplus_dt(dt, dt_bias).double(), expected, rtol=1e-5, atol=1e-8)
    assert softplus_dt(dt.bfloat16(), dt_bias.bfloat16()).dtype == torch.float32
    assert (softplus_dt(torch.tensor([-80.0]), torch.zeros(1)) > 0).all()


def test_length_mask():
    expected = [[False, False, False], [True, False, False], [True, True, True]]
    assert length_mask(torch.tensor([0, 1, 3]), 3).tolist() == expected
