"""The kernels of LoRA's training against the products that they are, at odd sizes, with dropout and without."""

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.ops.triton import lora

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# rows, d, n, r: less than a tile, a row and a column more than one, several tiles and programs
SIZES = [(1, 8, 16, 1), (65, 72, 200, 4), (255, 129, 65, 8), (257, 264, 72, 20), (3, 40, 24, 130)]


def randn(seed, *shape, device, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def seed_on(device, seed=2**40 + 5):
    return torch.tensor([seed], device=device)


def kept(rows, d, dropout, device):
    """What a number is multiplied by: 0, or 1 / (1 - p)."""
    factors = torch.zeros(rows, d, device=device)
    lora.add_up(factors, torch.ones(rows, 1, device=device), torch.ones(1, d, device=device), dropout)
    return factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "d", "n", "r"), SIZES)
def test_products(kernel_device, assert_near, rows, d, n, r, p, dtype):
    make = {"device": kernel_device, "dtype": dtype}
    dropout = lora.Dropout(seed_on(kernel_device), p)
    wide, A, B = randn(1, rows, d + 8, **make), randn(2, r, d, device=kernel_device), randn(3, n, r, **make)
    u = wide[:, :d]  # rows further apart than they are long
    dropped = (u.float() * kept(rows, d, dropout, kernel_device)).to(dtype).double()

    low = torch.empty(rows, r + 3, device=kernel_device, dtype=dtype)
    lora.down(u, A, dropout, low)
    assert_near(low[:, :r], dropped @ A.to(dtype).double().T, "down", dtype)
    assert torch.equal(low[:, r:], torch.zeros_like(low[:, r:]))

    dy = randn(4, rows, n + 8, **make)[:, 8:]
    dlow, dB = lora.outer_gradients(dy, low[:, :r], B)
    assert dlow.dtype == dtype and dB.dtype == torch.float32
    assert_near(dlow, dy.double() @ B.double(), "gradient of low", dtype)
    assert_near(dB, dy.double().T @ low[:, :r].double(), "gradient of B", dtype)

    assert_near(lora.inner_gradient(u, dlow, dropout), dlow.double().T @ dropped, "gradient of A", dtype)
    du = randn(5, rows, d, **make)
    gain = (dlow.double() @ A.to(dtype).double()) * kept(rows, d, dropout, kernel_device)
    expected = du.double() + gain
    lora.add_up(du, dlow, A, dropout)
    assert_near(du, expected, "gradient of u", dtype)


@pytest.mark.parametrize(("rows", "d"), [(1, 1), (5, 51), (257, 64), (70, 1000)])
def test_dropout(kernel_device, rows, d):
    a, again, b = (kept(rows, d, lora.Dropout(seed_on(kernel_device, seed), 0.25), kernel_device) for seed in (1, 1, 2))
    assert torch.equal(a, again)
    assert set(a.unique().tolist()) <= {0.0, torch.tensor(4 / 3).item()}
    if rows * d > 4000:
        assert 0.23 < (a == 0).float().mean() < 0.27
        assert 0.3 < (a != b).float().mean() < 0.45  # 2 * 0.25 * 0.75
        assert (a[1:] != a[:-1]).float().mean() > 0.3 and (a[:, 1:] != a[:, :-1]).float().mean() > 0.3


def test_no_dropout(kernel_device):
    for dropout in (lora.Dropout(None, 0.5), lora.Dropout(seed_on(kernel_device), 0.0)):
        assert torch.equal(kept(3, 70, dropout, kernel_device), torch.ones(3, 70, device=kernel_device))
