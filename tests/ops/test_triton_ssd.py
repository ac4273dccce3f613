"""The scan's kernels against its definition."""

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.ops.ssd import plain_ssd_chunk_scan
from omnimamba.ops.triton import ssd as kernel
from omnimamba.ops.triton import ssd_tiles
from omnimamba.ops.triton.launch import LAUNCHES

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def plain(chunk_size=64):
    return lambda **tensors: plain_ssd_chunk_scan(**tensors, chunk_size=chunk_size)


@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("l", [1, 5, 63, 64, 65, 130])
def test_outputs_and_gradients(kernel_device, inputs, compare, l, g):
    compare(kernel.ssd_chunk_scan, plain(), inputs(kernel_device, torch.float32, 1 if l > 5 else 2, l, h=2 * g, g=g))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("l", [5, 130])
def test_half_precision(kernel_device, inputs, compare, l, dtype):
    compare(kernel.ssd_chunk_scan, plain(), inputs(kernel_device, dtype, 1 if l > 5 else 2, l, g=2))


@pytest.mark.parametrize(("p", "n"), [(64, 128), (24, 20), (3, 5)])
def test_sizes(kernel_device, inputs, compare, p, n):
    compare(kernel.ssd_chunk_scan, plain(), inputs(kernel_device, torch.float32, 1, 37, h=2, p=p, n=n))


@pytest.mark.parametrize("chunk_size", [16, 256])
def test_the_chunk_size_is_only_the_definitions(kernel_device, inputs, compare, chunk_size):
    compare(kernel.ssd_chunk_scan, plain(chunk_size), inputs(kernel_device, torch.float32, 1, 70, h=2))


@pytest.mark.parametrize("full_grid", [1, 10**6])
@pytest.mark.parametrize("g", [1, 2])
def test_heads_of_a_group_in_one_program_and_in_several(kernel_device, inputs, compare, monkeypatch, g, full_grid):
    monkeypatch.setattr(ssd_tiles, "FULL_GRID", full_grid)
    compare(kernel.ssd_chunk_scan, plain(), inputs(kernel_device, torch.float32, 1, 37, h=4, g=g))


def in_spans(spans):
    return lambda **tensors: kernel.ssd_chunk_scan(**tensors, spans=spans)


@pytest.mark.parametrize(
    ("l", "spans", "has_initial"),
    [(1, 3, True), (16, 2, True), (17, 2, True), (17, 2, False), (70, 2, False), (96, 3, True), (130, 9, False), (130, 9, True)],
)
def test_spans(kernel_device, inputs, compare, l, spans, has_initial):
    """Chunks of 16 positions: less than one chunk, spans of one chunk, of several, a last one that is shorter."""
    compare(in_spans(spans), plain(), inputs(kernel_device, torch.float32, 2, l, h=2, p=16, g=2, has_initial=has_initial))


@pytest.mark.parametrize("l", [255, 256, 257])
def test_spans_of_half_precision(kernel_device, inputs, compare, l):
    compare(in_spans(4), plain(), inputs(kernel_device, torch.bfloat16, 1, l, h=2, p=24, n=20))


def test_a_long_sequence_of_few_heads_is_cut_into_spans(kernel_device, inputs):
    assert kernel.num_spans(1, 513) == 4
    tensors = inputs(kernel_device, torch.float32, 1, 513, h=1, p=16)
    for found, expected in zip(kernel.ssd_chunk_scan(**tensors), in_spans(4)(**tensors), strict=True):
        assert torch.equal(found, expected)


def test_spans_of_padding_and_of_zeros(kernel_device, inputs, compare):
    """dt = 0 leaves the state as it is, in a part of a span and in whole ones; with x = 0 nothing is added to it."""
    tensors = inputs(kernel_device, torch.float32, 2, 96, h=2, p=16)
    tensors["dt"][0, 20:] = 0
    tensors["x"][1] = 0
    compare(in_spans(3), plain(), tensors)
    tensors["dt"][:] = 0
    assert torch.equal(in_spans(3)(**tensors)[1], tensors["initial_state"])


@pytest.mark.parametrize(
    ("num_walks", "l", "spans"),
    [
        (64, 65_536, 4),  # one row of 1.3b; with more, programs would wait for others
        (64, 760, 4),
        (64, 511, 3),
        (64, 255, 1),  # too short
        (64, 73, 1),
        (128, 4096, 2),
        (192, 65_536, 1),  # enough walks without
        (48 * 64, 329, 1),
        (8, 65_536, 33),  # nano
        (1, 1, 1),
    ],
)
def test_number_of_spans(num_walks, l, spans):
    assert kernel.num_spans(num_walks, l) == spans


@pytest.mark.parametrize("used", ["y", "state"])
def test_without_initial_state_and_with_one_output_used(kernel_device, inputs, compare, used):
    def one(op):
        return lambda **tensors: (op(**tensors)[("y", "state").index(used)],)

    tensors = inputs(kernel_device, torch.float32, 2, 37, h=2, has_initial=False)
    if used == "state":  # C and D have no part in it: zero gradients, not compared by ratio
        op = one(kernel.ssd_chunk_scan)
        C, D = tensors.pop("C"), tensors.pop("D")
        zeros = {"C": torch.zeros_like(C).requires_grad_(), "D": torch.zeros_like(D).requires_grad_()}
        op(**tensors, **zeros)[0].sum().backward()
        assert all(zero.grad is None or not zero.grad.any() for zero in zeros.values())
        compare(lambda **tensors: op(**tensors, C=C, D=D), lambda **tensors: one(plain())(**tensors, C=C, D=D), tensors)
    else:
        compare(one(kernel.ssd_chunk_scan), one(plain()), tensors)


def test_unequal_lengths(kernel_device, inputs):
    """dt = 0 in the padding: the state is that after the last valid position."""
    tensors = inputs(kernel_device, torch.float32, 3, 70, h=2)
    lengths = [70, 64, 3]
    for i, length in enumerate(lengths):
        tensors["dt"][i, length:] = 0
    y, state = kernel.ssd_chunk_scan(**tensors)
    for i, length in enumerate(lengths):
        alone = {
            name: t if name in "AD" else t[i : i + 1] if name == "initial_state" else t[i : i + 1, :length] for name, t in tensors.items()
        }
        alone_y, alone_state = kernel.ssd_chunk_scan(**alone)
        torch.testing.assert_close(y[i : i + 1, :length], alone_y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[i : i + 1], alone_state, rtol=1e-5, atol=1e-5)


def test_slices_of_one_tensor_and_gradient_of_any_layout(kernel_device, inputs, compare):
    def strided(op):
        def run(x, B, C, **others):
            (h, p), (g, n) = x.shape[2:], B.shape[2:]
            packed = torch.cat([C.flatten(2), x.flatten(2), B.flatten(2)], -1)
            C, x, B = packed.split((g * n, h * p, g * n), -1)
            y, state = op(x=x.unflatten(-1, (h, p)), B=B.unflatten(-1, (g, n)), C=C.unflatten(-1, (g, n)), **others)
            return y.transpose(1, 3), state

        return run

    compare(strided(kernel.ssd_chunk_scan), strided(plain()), inputs(kernel_device, torch.float32, 2, 37, h=4, g=2))


@pytest.mark.parametrize(("rows", "spans"), [(16, 1), (64, 1), (16, 4)])
def test_strong_decays(kernel_device, inputs, compare, monkeypatch, rows, spans):
    """As differences of an fp32 cumulative sum the decays cancel, and the gradient of A is the first to lose its digits."""
    for name in ("ssd_forward_fp32", "ssd_backward_fp32"):
        ((width, choice),) = LAUNCHES[name]
        monkeypatch.setitem(LAUNCHES, name, ((width, choice._replace(rows=rows)),))
    tensors = inputs(kernel_device, torch.float32, 1, 137, h=2, p=16)
    tensors["A"] = torch.tensor([-0.01, -40.0], device=kernel_device)
    tensors["x"] = tensors["x"] + 3
    tensors["B"] = tensors["C"] = tensors["B"].abs()
    compare(in_spans(spans), plain(), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strong_decays_in_half_precision(kernel_device, inputs, assert_near, dtype):
    """The outputs: there the cumulative sum is fp32."""
    tensors = inputs(kernel_device, dtype, 1, 137, h=2, p=16)
    tensors["A"] = torch.tensor([-0.01, -40.0], device=kernel_device)
    tensors["B"] = tensors["C"] = tensors["B"].abs()
    exact = plain()(**{name: tensor.float() for name, tensor in tensors.items()})
    for found, expected, axis in zip(kernel.ssd_chunk_scan(**tensors), exact, (2, 1), strict=True):
        for i_h in range(2):
            assert_near(found.select(axis, i_h), expected.select(axis, i_h), f"head {i_h}", dtype)


@pytest.mark.parametrize("spans", [1, 3])
def test_results_do_not_depend_on_the_run(kernel_device, inputs, spans):
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(kernel_device, torch.float32, 1, 37, h=2).items()}
    runs = []
    for _ in range(2):
        y, state = in_spans(spans)(**tensors)
        runs.append((y, state, *torch.autograd.grad(y.sum(), list(tensors.values()))))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "l", "sizes"),
    [
        (256, 293, {"h": 8, "p": 64, "n": 64}),
        (512, 47, {"h": 8, "p": 64, "n": 64}),
        (8, 329, {"h": 64, "p": 64, "n": 128}),
        (1, 1500, {"h": 64, "p": 64, "n": 128}),
        (2, 4095, {"h": 64, "p": 64, "n": 128}),
        (1, 16_384, {"h": 64, "p": 64, "n": 128}),
        (1, 16_384, {"h": 8, "p": 64, "n": 64}),
    ],
)
def test_real_sizes(inputs, compare, b, l, sizes, dtype):
    compare(kernel.ssd_chunk_scan, plain(), inputs("cuda", dtype, b, l, **sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("spans", [1, None])
def test_offsets_above_32_bits(spans):
    """A sequence of more than 2**31 numbers against its two halves."""
    half = 270_001  # positions; 2 * half * 64 * 64 numbers in x and y
    x = torch.randn(1, 2 * half, 64, 64, device="cuda", dtype=torch.bfloat16)
    B, C = torch.randn(2, 1, 2 * half, 1, 128, device="cuda", dtype=torch.bfloat16)
    dt = torch.rand(1, 2 * half, 64, device="cuda") * 0.1
    A, D = -torch.rand(64, device="cuda"), torch.ones(64, device="cuda")
    y, state = kernel.ssd_chunk_scan(x, dt, A, B, C, D=D, spans=spans)
    between = None
    for part in (slice(half), slice(half, None)):
        expected, between = kernel.ssd_chunk_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], D=D, initial_state=between)
        error = (y[:, part] - expected).norm(dtype=torch.float32) / expected.norm(dtype=torch.float32)
        assert error <= 1e-2  # not so for NaN
    torch.testing.assert_close(state, between, rtol=1e-2, atol=1e-2 * state.abs().max().item())
