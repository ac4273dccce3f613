"""Training of LoRA beside a large product, y = u W^T + dropout(u) A^T B^T: the parts that are not that product.

LoRA's inner numbers are few, so each kernel is bound by the one wide tensor that it reads, and reads it once. Which numbers dropout keeps
depends on one seed and their position; the kernels draw that again instead of reading it.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnimamba.ops.triton.launch import FULL_GRID, Launch, dot_dtype, launch_for, tile

DRAWN = tl.constexpr(8)  # neighbours in a row that share one draw
SHARE = 2**16
"""Parts of 1 in which dropout's share is given: each number has 16 bits of its own."""


@triton.jit
def keeps(seed, o_row, first, zeros, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of COLUMNS numbers from column `first` on dropout keeps: [rows, columns]. WIDTH: of a whole row.

    A number is kept if 16 bits of its own are at least `zeros`. Philox with 7 rounds, the fewest that pass the tests of its authors
    (Salmon et al. 2011), gives 128 bits at once.
    """
    o_draw = o_row.to(tl.int32)[:, None] * tl.cdiv(WIDTH, DRAWN) + tl.arange(0, COLUMNS // DRAWN)[None, :] + first // DRAWN
    a, b, c, d = tl.randint4x(tl.load(seed), o_draw, n_rounds=7)
    draws = tl.join(tl.join(a, b), tl.join(c, d))
    bits = tl.reshape(tl.join(draws & 0xFFFF, (draws >> 16) & 0xFFFF), (o_row.shape[0], COLUMNS))
    return bits >= zeros


@triton.jit(do_not_specialize=["num_rows"])
def down_kernel(
    u, seed, A, low, u_row, low_row, num_rows, zeros, scale,
    D: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """low: [rows, PADDED], of which the first R are LoRA's and the others 0."""
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_r = tl.program_id(1) * TILE_R + tl.arange(0, TILE_R)
    dtype: tl.constexpr = u.dtype.element_ty
    b_low = tl.zeros((ROWS, TILE_R), tl.float32)
    for first in range(0, D, COLUMNS):
        o_d = first + tl.arange(0, COLUMNS)
        b_u = tl.load(u + o_row[:, None] * u_row + o_d[None, :], mask=(o_row < num_rows)[:, None] & (o_d < D)[None, :], other=0.0)
        if HAS_DROPOUT:
            b_u = tl.where(keeps(seed, o_row, first, zeros, D, COLUMNS), b_u.to(tl.float32) * scale, 0.0).to(dtype)
        b_A = tl.load(A + o_r[:, None] * D + o_d[None, :], mask=(o_r < R)[:, None] & (o_d < D)[None, :], other=0.0).to(dtype)
        b_low = tl.dot(b_u.to(DOT), tl.trans(b_A.to(DOT)), b_low, input_precision="ieee")
    m_low = (o_row < num_rows)[:, None] & (o_r < PADDED)[None, :]
    tl.store(low + o_row[:, None] * low_row + o_r[None, :], b_low.to(dtype), mask=m_low)


@triton.jit(do_not_specialize=["num_rows"])
def up_kernel(
    du, dlow, seed, A, num_rows, zeros, scale,
    D: tl.constexpr, R: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """du: [rows, D], which gains dropout's share of dlow A. dlow: [rows, R]."""
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    o_d = first + tl.arange(0, COLUMNS)
    m_row = (o_row < num_rows)[:, None]
    dtype: tl.constexpr = du.dtype.element_ty
    b_gain = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first_r in range(0, R, TILE_R):
        o_r = first_r + tl.arange(0, TILE_R)
        b_dlow = tl.load(dlow + o_row[:, None] * R + o_r[None, :], mask=m_row & (o_r < R)[None, :], other=0.0)
        b_A = tl.load(A + o_r[:, None] * D + o_d[None, :], mask=(o_r < R)[:, None] & (o_d < D)[None, :], other=0.0).to(dtype)
        b_gain = tl.dot(b_dlow.to(DOT), b_A.to(DOT), b_gain, input_precision="ieee")
    if HAS_DROPOUT:
        b_gain = tl.where(keeps(seed, o_row, first, zeros, D, COLUMNS), b_gain * scale, 0.0)
    p_du = du + o_row[:, None] * D + o_d[None, :]
    m_du = m_row & (o_d < D)[None, :]
    tl.store(p_du, (tl.load(p_du, mask=m_du, other=0.0).to(tl.float32) + b_gain).to(dtype), mask=m_du)


@triton.jit(do_not_specialize=["num_rows", "span"])
def inner_gradient_kernel(
    u, dlow, seed, partial, u_row, num_rows, span, zeros, scale,
    D: tl.constexpr, R: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """partial: [spans, R, D], the sums of A's gradient over `span` tiles of rows each."""
    o_r = tl.program_id(2) * TILE_R + tl.arange(0, TILE_R)
    first = tl.program_id(0) * COLUMNS
    o_d = first + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = u.dtype.element_ty
    b_dA = tl.zeros((TILE_R, COLUMNS), tl.float32)
    for i in range(tl.program_id(1) * span, tl.minimum((tl.program_id(1) + 1) * span, tl.cdiv(num_rows, ROWS))):
        o_row = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        m_row = (o_row < num_rows)[:, None]
        b_u = tl.load(u + o_row[:, None] * u_row + o_d[None, :], mask=m_row & (o_d < D)[None, :], other=0.0)
        if HAS_DROPOUT:
            b_u = tl.where(keeps(seed, o_row, first, zeros, D, COLUMNS), b_u.to(tl.float32) * scale, 0.0).to(dtype)
        b_dlow = tl.load(dlow + o_row[:, None] * R + o_r[None, :], mask=m_row & (o_r < R)[None, :], other=0.0)
        b_dA = tl.dot(tl.trans(b_dlow.to(DOT)), b_u.to(DOT), b_dA, input_precision="ieee")
    p_partial = partial + tl.program_id(1) * (R * D) + o_r[:, None] * D + o_d[None, :]
    tl.store(p_partial, b_dA, mask=(o_r < R)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["num_rows", "span"])
def outer_gradient_kernel(
    dy, low, B, dlow, dB, dy_row, low_row, num_rows, n, span,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dlow: [spans, rows, R], partial sums over `span` tiles of dy's columns each; dB: [tiles of rows, n, R], over the rows of a tile.
    B: [n, R] in dy's dtype."""
    o_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_r = tl.program_id(2) * TILE_R + tl.arange(0, TILE_R)
    m_low = (o_row < num_rows)[:, None] & (o_r < R)[None, :]
    b_low = tl.load(low + o_row[:, None] * low_row + o_r[None, :], mask=m_low, other=0.0)
    b_dlow = tl.zeros((ROWS, TILE_R), tl.float32)
    for i in range(tl.program_id(1) * span, tl.minimum((tl.program_id(1) + 1) * span, tl.cdiv(n, COLUMNS))):
        o_n = i * COLUMNS + tl.arange(0, COLUMNS)
        b_dy = tl.load(dy + o_row[:, None] * dy_row + o_n[None, :], mask=(o_row < num_rows)[:, None] & (o_n < n)[None, :], other=0.0)
        m_B = (o_n < n)[:, None] & (o_r < R)[None, :]
        b_B = tl.load(B + o_n[:, None] * R + o_r[None, :], mask=m_B, other=0.0)
        b_dlow = tl.dot(b_dy.to(DOT), b_B.to(DOT), b_dlow, input_precision="ieee")
        b_dB = tl.dot(tl.trans(b_dy.to(DOT)), b_low.to(DOT), input_precision="ieee")
        tl.store(dB + (tl.program_id(0).to(tl.int64) * n + o_n)[:, None] * R + o_r[None, :], b_dB, mask=m_B)
    tl.store(dlow + (tl.program_id(1).to(tl.int64) * num_rows + o_row)[:, None] * R + o_r[None, :], b_dlow, mask=m_low)


class Dropout:
    """Sets a share p of the numbers of u to 0 and divides the others by 1 - p, the same ones for the same seed [1] int64.

    p is rounded to a multiple of 2**-16. Without a seed, nothing is dropped.
    """

    def __init__(self, seed: Tensor | None, p: float) -> None:
        self.seed, self.zeros = seed, 0 if seed is None else round(p * SHARE)

    def arguments(self, like: Tensor) -> tuple[Tensor, int, float, bool]:
        """The kernels' seed, zeros, scale and HAS_DROPOUT; a seed that is not read is `like`."""
        is_on = self.seed is not None and self.zeros > 0
        return self.seed if self.seed is not None and is_on else like, self.zeros, 1 / (1 - self.zeros / SHARE), is_on


def down(u: Tensor, A: Tensor, dropout: Dropout, low: Tensor) -> None:
    """Writes dropout(u) A^T, rounded, to the first r columns of `low`, 0 to the others.

    u: [rows, d], low: [rows, r or more], dense in their columns, of one dtype; A: [r, d], rounded to it.
    """
    num_rows, d = u.shape
    choice = launch_for(u, "lora_down", d)
    seed, zeros, scale, has_dropout = dropout.arguments(u)
    tiles = sizes(u, A.shape[0], choice)
    down_kernel[triton.cdiv(num_rows, choice.rows), triton.cdiv(low.shape[1], tiles["TILE_R"])](
        u, seed, A, low, u.stride(0), low.stride(0), num_rows, zeros, scale,
        D=d, PADDED=low.shape[1], HAS_DROPOUT=has_dropout, **tiles,
    )  # fmt: skip


def add_up(du: Tensor, dlow: Tensor, A: Tensor, dropout: Dropout) -> None:
    """Adds to du [rows, d], contiguous, what u's gradient gains by LoRA. dlow: [rows, r], contiguous, in du's dtype; A: [r, d]."""
    num_rows, d = du.shape
    choice = launch_for(du, "lora_up", d)
    seed, zeros, scale, has_dropout = dropout.arguments(du)
    up_kernel[triton.cdiv(num_rows, choice.rows), triton.cdiv(d, choice.columns)](
        du, dlow, seed, A, num_rows, zeros, scale, D=d, HAS_DROPOUT=has_dropout, **sizes(du, A.shape[0], choice)
    )  # fmt: skip


def inner_gradient(u: Tensor, dlow: Tensor, dropout: Dropout) -> Tensor:
    """The gradient of A [r, d], fp32. u: [rows, d], dense in d; dlow: [rows, r], contiguous, in its dtype."""
    (num_rows, d), r = u.shape, dlow.shape[1]
    choice = launch_for(u, "lora_inner_gradient", d)
    tiles = sizes(u, r, choice)
    columns, ranks = triton.cdiv(d, choice.columns), triton.cdiv(r, tiles["TILE_R"])
    span, spans = shares(triton.cdiv(num_rows, choice.rows), columns * ranks)
    partial = torch.empty((spans, r, d), dtype=torch.float32, device=u.device)
    seed, zeros, scale, has_dropout = dropout.arguments(u)
    inner_gradient_kernel[columns, spans, ranks](
        u, dlow, seed, partial, u.stride(0), num_rows, span, zeros, scale, D=d, HAS_DROPOUT=has_dropout, **tiles
    )  # fmt: skip
    return partial.sum(0)


def outer_gradients(dy: Tensor, low: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of low [rows, r], in its dtype, and of B [n, r], fp32. dy: [rows, n], dense in n; low: [rows, r], dense in r, and B,
    contiguous, in its dtype."""
    (num_rows, n), r = dy.shape, B.shape[1]
    choice = launch_for(dy, "lora_outer_gradients", n)
    tiles = sizes(dy, r, choice)
    rows, ranks = triton.cdiv(num_rows, choice.rows), triton.cdiv(r, tiles["TILE_R"])
    span, spans = shares(triton.cdiv(n, choice.columns), rows * ranks)
    dlow = torch.empty((spans, num_rows, r), dtype=torch.float32, device=dy.device)
    dB = torch.empty((rows, n, r), dtype=torch.float32, device=dy.device)
    outer_gradient_kernel[rows, spans, ranks](dy, low, B, dlow, dB, dy.stride(0), low.stride(0), num_rows, n, span, **tiles)
    return dlow.sum(0).to(low.dtype), dB.sum(0)


def sizes(x: Tensor, r: int, choice: Launch) -> dict[str, Any]:
    """The arguments common to all kernels, of LoRA of rank r beside x: a tile has as many inner numbers as fit any card's shared memory.
    Higher ranks read the wide tensor again."""
    tile_r = min(tile(r), 16 if x.dtype == torch.float32 else 32)
    tiles = {"R": r, "ROWS": choice.rows, "COLUMNS": choice.columns, "TILE_R": tile_r, "DOT": dot_dtype(x.dtype)}
    return tiles | {"num_warps": choice.num_warps, "num_stages": choice.num_stages}


def shares(size: int, programs: int) -> tuple[int, int]:
    """How many of `size` each program gets, and how many programs that is, where so many times `programs` fill the GPU."""
    each = triton.cdiv(size, max(1, FULL_GRID // programs))
    return each, triton.cdiv(size, each)
