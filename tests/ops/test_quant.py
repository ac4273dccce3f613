"""Quantised weights: errors within their bounds, packing without loss, and every path of the product equal to its definition."""

import copy

import pytest
import torch

from omnimamba.config import Quantization
from omnimamba.ops import quant_cpu
from omnimamba.ops.quant import GROUP_SIZE, TYPES, QuantizedWeight, linear, quantize, unpack_int4

NORMAL_ERROR = {"int8": 0.009, "fp8": 0.028, "int4": 0.095}
"""rms(error) / rms(weight) of normally distributed weights [n, 256]."""
PATH_ERROR = {"int8": 3e-4, "fp8": 4e-3, "int4": 4e-3}
"""rms(error) / rms(product) of the CPU's paths: int8 rounds activations to 14 bits, the others to bf16."""


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_schemes_are_those_of_the_config():
    assert set(TYPES) == set(Quantization) == set(quant_cpu.PACKED) == set(NORMAL_ERROR)


@pytest.mark.parametrize("scheme", TYPES)
def test_shapes_types_and_error(scheme):
    weight = randn(37, 256)
    found = quantize(weight, scheme)
    assert found.scheme == scheme and found.shape == (37, 256) and found.scale.dtype is torch.float32
    assert found.values.dtype is TYPES[scheme]
    assert found.scale.shape == ((37, 256 // GROUP_SIZE) if scheme == "int4" else (37,))
    assert found.values.nbytes == 37 * 256 // (2 if scheme == "int4" else 1)
    assert 0.3 * NORMAL_ERROR[scheme] < relative(found.dequantize(), weight) < NORMAL_ERROR[scheme]
    assert found.dequantize(torch.bfloat16).dtype is torch.bfloat16


@pytest.mark.parametrize("scheme", TYPES)
def test_scales_follow_their_rows(scheme):
    magnitude = torch.logspace(-20, 20, 24)[:, None]
    weight = randn(24, 128) * magnitude
    weight[5] = 0
    found = quantize(weight, scheme).dequantize()
    assert not found[5].any()
    kept = torch.arange(24) != 5
    assert relative((found / magnitude)[kept], (weight / magnitude)[kept]) < NORMAL_ERROR[scheme]


def test_int8_is_half_a_step_off_at_most():
    weight = randn(16, 64)
    found = quantize(weight, "int8")
    assert found.values.abs().amax(1).eq(127).all()
    assert ((found.dequantize() - weight).abs() <= found.scale[:, None] * 0.5001).all()


def test_int4_keeps_what_it_can_say_exactly():
    numbers = torch.randint(-8, 8, (6, 128), generator=torch.Generator().manual_seed(0))
    numbers[:, ::GROUP_SIZE] = -8
    scale = torch.tensor([0.5, 3.0]).repeat_interleave(GROUP_SIZE)
    found = quantize(numbers * scale, "int4")
    assert torch.equal(found.dequantize(), numbers * scale)
    assert torch.equal(unpack_int4(found.values), numbers.to(torch.int8))
    low, high = found.values[:, 0] & 15, found.values[:, 0] >> 4
    assert torch.equal(low.int() - 8, numbers[:, 0].int()) and torch.equal(high.int() - 8, numbers[:, 1].int())
    assert torch.equal(found.scale, found.scale.bfloat16().float())


def test_int4_clips_the_largest_where_that_costs_less():
    weight = torch.full((1, GROUP_SIZE), 0.9)
    weight[0, 0] = -8.0
    whole = (weight / 1).round().clamp(-8, 7)
    assert (quantize(weight, "int4").dequantize() - weight).square().sum() < (whole - weight).square().sum()


@pytest.mark.parametrize("scheme", TYPES)
def test_quantising_again_changes_nothing(scheme):
    once = quantize(randn(8, 128), scheme)
    again = quantize(once.dequantize(), scheme)
    if scheme == "int4":  # a clipped group may find a smaller range
        assert relative(again.dequantize(), once.dequantize()) < 0.02
    else:
        torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", TYPES)
def test_rows_are_those_of_the_matrix(scheme):
    weight = quantize(randn(20, 128), scheme)
    ids = torch.tensor([[3, 19, 3], [0, 7, 1]])
    assert torch.equal(weight.rows(ids), weight.dequantize()[ids])
    assert torch.equal(weight.rows(torch.tensor(4)), weight.dequantize()[4])
    assert weight.rows(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 128)


@pytest.mark.parametrize("scheme", TYPES)
@pytest.mark.parametrize("n", [16, 41])
def test_product(scheme, n):
    weight = quantize(randn(n, 192), scheme)
    matrix = weight.dequantize()
    for shape in ((192,), (1, 192), (5, 192), (2, 3, 192), (2, quant_cpu.MANY_ROWS, 192), (0, 192)):
        x = randn(*shape, seed=1) * torch.logspace(-3, 3, 192)
        found = linear(x, weight)
        assert found.shape == (*shape[:-1], n) and found.dtype is torch.float32
        if x.numel():
            assert relative(found, x @ matrix.T) < PATH_ERROR[scheme]
    x = randn(3, 192)
    assert linear(x.bfloat16(), weight).dtype is torch.bfloat16


@pytest.mark.parametrize("scheme", TYPES)
def test_product_without_the_kernels_of_the_cpu(scheme, monkeypatch):
    weight, x = quantize(randn(12, 64), scheme), randn(3, 64, seed=1)
    monkeypatch.setattr(quant_cpu, "is_available", lambda: False)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight.dequantize()))


@pytest.mark.parametrize("scheme", TYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(scheme):
    weight, x = quantize(randn(48, 256), scheme), randn(quant_cpu.MANY_ROWS - 1, 256, seed=1)
    whole = linear(x, weight)
    for num in (1, 2, 5):
        assert torch.equal(torch.cat([linear(part, weight) for part in x.split(num)]), whole)


@pytest.mark.parametrize("scheme", TYPES)
def test_zero_and_broken_activations(scheme):
    weight, x = quantize(randn(16, 64), scheme), randn(4, 64, seed=1)
    x[1] = 0
    x[2, 5], x[3, 5] = torch.nan, torch.inf
    found = linear(x, weight)
    assert found[0].isfinite().all() and not found[1].any()
    assert found[2].isnan().all() and not found[3].isfinite().any()


@pytest.mark.skipif(not quant_cpu.is_available(), reason="needs the kernels of x86 CPUs")
def test_the_two_digits_lose_nothing_at_the_extremes():
    weight = quantize(torch.full((16, 4096), 1.0), "int8")
    for x in (torch.ones(1, 4096), -torch.ones(1, 4096)):
        torch.testing.assert_close(linear(x, weight), x @ weight.dequantize().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", TYPES)
def test_a_broken_weight_stays_broken(scheme):
    weight = randn(4, 64)
    weight[2, 9] = torch.nan
    found = quantize(weight, scheme).dequantize()
    assert found[2].isnan().any() and found[[0, 1, 3]].isfinite().all()


def test_copies_moves_and_state_dicts():
    weight = quantize(randn(16, 64), "int8")
    x = randn(2, 64)
    before = linear(x, weight)
    again = copy.deepcopy(weight)
    assert torch.equal(linear(x, again), before)
    other = QuantizedWeight(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16))
    assert not linear(x, other).any()
    other.load_state_dict(weight.state_dict(), assign=True)
    assert torch.equal(linear(x, other), before)
    assert set(weight.state_dict()) == {"values", "scale"}


def test_wrong_values():
    with pytest.raises(ValueError, match="unknown quantization 'int3'; valid: int8, fp8, int4"):
        quantize(randn(4, 64), "int3")
    with pytest.raises(ValueError, match="among 64 columns, and 96 columns are not a multiple; use int8 or fp8"):
        quantize(randn(4, 96), "int4")


@pytest.mark.parametrize("n", [1, 7, 40])
def test_expanding_int4(monkeypatch, n):
    monkeypatch.setattr(quant_cpu, "EXPANDED_AT_ONCE", 16 * 64)
    weight = quantize(randn(n, 128), "int4")
    assert torch.equal(quant_cpu.expand_int4(weight.values, weight.scale), weight.dequantize(torch.bfloat16))
