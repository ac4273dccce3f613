"""The vectors and products of the CPU's kernels, each against PyTorch. Whole steps: tests/engine/test_cpu_decoder.py."""

import numba
import pytest
import torch
from numba.core import caching

from omnimamba.ops.cpu import LANES, decode, vector
from omnimamba.ops.quant import quantize

FORMATS = {"float32": decode.F32, "bfloat16": decode.BF16, "int8": decode.INT8, "fp8": decode.FP8, "int4": decode.INT4}
COLUMNS = 64 * 5
TOLERANCE = dict.fromkeys(FORMATS, 1e-6) | {"int4": 1e-4}
"""rms(error) / rms(product); with int4, activations are rounded to 16 bits."""


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def doubled(x):
    return 2 * x


def test_kernels_compile_where_nothing_can_be_written(monkeypatch, caplog):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert vector.compiled(doubled)(3) == 6 and "doubled is compiled anew in each process" in caplog.text


@numba.njit
def exps(x, y, num):
    for i in range(0, num, LANES):
        vector.store_f32(y + 4 * i, vector.exp(vector.load_f32(x + 4 * i)))


def test_exp():
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -87.0, 88.0, 88.7, 0.5, -0.5, 0.3465736, -0.3465736, 9.0, -9.0, 1]
    )
    x = torch.cat([torch.linspace(-95, 95, 16 * 999), special])
    found = torch.empty_like(x)
    exps(x.data_ptr(), found.data_ptr(), len(x))
    expected = x.double().nan_to_num(-87).clamp(-87, 88).exp()
    assert ((found - expected) / expected).abs().max() < 3e-7


@numba.njit
def rounded(x, by_vector, by_number):
    vector.store_bf16(by_vector, vector.load_f32(x))
    for i in range(LANES):
        vector.set_bf16(by_number + 2 * i, vector.get_f32(x + 4 * i))


def test_bf16_is_rounded_as_pytorch_does():
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3e38, 0.0, -0.0, 1e-40, torch.inf])
    x = torch.cat([ties, randn(8)])
    by_vector, by_number = torch.empty(16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    rounded(x.data_ptr(), by_vector.data_ptr(), by_number.data_ptr())
    assert torch.equal(by_vector, x.bfloat16()) and torch.equal(by_number, x.bfloat16())


@numba.njit
def floats_of_fp8(x, y):
    for i in range(0, 256, LANES):
        vector.store_f32(y + 4 * i, vector.load_fp8(x + i))


def test_every_fp8_number():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = torch.empty(256)
    floats_of_fp8(numbers.data_ptr(), found.data_ptr())
    is_number = ~numbers.float().isnan()
    assert torch.equal(found[is_number] * 256, numbers.float()[is_number])


def product(name, weight, x, *, out=None, thread=(0, 1)):
    """weight x of a format, and the matrix that the format stands for."""
    n, k = weight.shape
    values, scale = weight.to(getattr(torch, name)) if name.endswith(("32", "16")) else None, None
    if values is None:
        quantized = quantize(weight, name)
        values, scale, matrix = quantized.values, quantized.scale * (256 if name == "fp8" else 1), quantized.dequantize()
        scale = scale.bfloat16() if name == "int4" else scale
    else:
        matrix = values.float()
    stride = k + k // decode.GROUP_SIZE + LANES
    rows = torch.full((len(x), stride), torch.nan)
    for row, numbers in zip(rows, x, strict=True):
        if name == "int4":
            decode.round_columns(numbers.contiguous().data_ptr(), k, row.data_ptr())
        else:
            row[:k] = numbers
    adds = out is not None
    out = torch.full((len(x), n), torch.nan) if out is None else out
    decode.multiply(
        decode.Matrix(FORMATS[name], values.data_ptr(), 0 if scale is None else scale.data_ptr(), n, k),
        decode.Factor(len(x), rows.data_ptr(), stride, 0, 0, 0, 0),
        out.data_ptr(),
        adds,
        decode.Thread(*thread, 0, 0),
    )
    return out, matrix


@pytest.mark.parametrize("num", [1, 2, 4, 7])
@pytest.mark.parametrize("name", FORMATS)
def test_products(name, num):
    weight, x = randn(37, COLUMNS), randn(num, COLUMNS, seed=1)
    found, matrix = product(name, weight, x)
    assert (found - x @ matrix.T).norm() < TOLERANCE[name] * found.norm()
    added, _ = product(name, weight, x, out=torch.ones(num, 37))
    torch.testing.assert_close(added, found + 1)


@pytest.mark.parametrize("k", [16, 48, 80])
def test_columns_that_are_no_whole_pairs_of_vectors(k):
    weight, x = randn(5, k), randn(5, k, seed=1)
    for name in ("float32", "bfloat16", "int8", "fp8"):
        found, matrix = product(name, weight, x)
        assert (found - x @ matrix.T).norm() < TOLERANCE[name] * found.norm()


def test_int4_at_its_edges():
    weight = torch.zeros(3, 128)
    weight[1], weight[2, 5] = 8.0, -8.0
    for x in (torch.zeros(1, 128), torch.full((1, 128), 3e30), torch.full((1, 128), -1e-30), torch.eye(128)[5:6]):
        found, matrix = product("int4", weight, x)
        torch.testing.assert_close(found, x @ matrix.T, rtol=1e-4, atol=1e-6 * x.abs().sum().item())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_stays_none(name, wrong):
    x = randn(2, COLUMNS)
    x[0, 3] = wrong
    found, _ = product(name, randn(4, COLUMNS, seed=1), x)
    assert not found[0].isfinite().any() and found[1].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_its_neighbours(name):
    weight, x = randn(19, COLUMNS), randn(6, COLUMNS, seed=1)
    together, _ = product(name, weight, x)
    for row, numbers in enumerate(x):
        assert torch.equal(product(name, weight, numbers[None])[0][0], together[row])


@pytest.mark.parametrize("num_threads", [2, 3, 40])
def test_threads_share_the_rows(num_threads):
    weight, x = randn(19, COLUMNS), randn(3, COLUMNS, seed=1)
    whole, _ = product("int8", weight, x)
    out = torch.zeros(3, 19)
    for number in range(num_threads):
        product("int8", weight, x, out=out, thread=(number, num_threads))
    assert torch.equal(out, whole)
