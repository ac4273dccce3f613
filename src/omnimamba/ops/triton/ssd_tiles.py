"""What the kernels of the scan, forwards (`ssd.py`) and backwards (`ssd_backward.py`), have in common: tiles, and how they are launched."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from omnimamba.ops.triton.launch import FULL_GRID, MULTIPROCESSORS, SPLIT_COST, Launch, dot_dtype, tile

# Names: o_ offsets, m_ masks, b_ values of a tile, p_ pointers. Tiles: [q, p] for x and y, [q, n] for B and C, [p, n] for states,
# [t, s] or [s, t] for the (q, q) matrices, from position s to position t.


@triton.jit
def operand(value, ROUND: tl.constexpr, DOT: tl.constexpr):
    """A factor of a matrix product: rounded to x's dtype (DOT differs only in the interpreter)."""
    return value.to(ROUND).to(DOT)


@triton.jit
def load_tile(p_first, o_row, o_column, num_rows, num_columns, stride_row):
    mask = (o_row < num_rows)[:, None] & (o_column < num_columns)[None, :]
    return tl.load(p_first + o_row[:, None] * stride_row + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(p_first, value, o_row, o_column, num_rows, num_columns, stride_row):
    mask = (o_row < num_rows)[:, None] & (o_column < num_columns)[None, :]
    tl.store(p_first + o_row[:, None] * stride_row + o_column[None, :], value.to(p_first.dtype.element_ty), mask=mask)


@triton.jit
def first_state(initial, i_bh, o_p, o_n, P: tl.constexpr, N: tl.constexpr, HAS_INITIAL: tl.constexpr):
    if HAS_INITIAL:
        b_state = load_tile(initial + i_bh * P * N, o_p, o_n, P, N, N)
    else:
        b_state = tl.zeros((o_p.shape[0], o_n.shape[0]), tl.float32)
    return b_state


@triton.jit
def next_state(b_state, b_x, b_B, decay, ROUND: tl.constexpr, DOT: tl.constexpr):
    """The state one chunk further. b_x: its inputs, times the decay up to the chunk's end; decay: of the whole chunk."""
    b_state *= decay
    return tl.dot(tl.trans(operand(b_x, ROUND, DOT)), b_B, b_state, input_precision="ieee")


def strides(*tensors: Tensor) -> list[int]:
    """The first three strides of each: batch, length, head or group."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def chunk_rows(choice: Launch, l: int) -> int:
    return min(choice.rows, tile(l))


def sizes(x: Tensor, B: Tensor, choice: Launch, **changed: int) -> dict[str, Any]:
    """The arguments common to all kernels: sizes and tiles of the problem, warps, stages and registers of the launch."""
    l, h, p = x.shape[1:]
    g, n = B.shape[2:]
    tiles = {"Q": chunk_rows(choice, l), "TILE_P": tile(p), "TILE_N": tile(n), "DOT": dot_dtype(x.dtype)}
    compiled = {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "maxnreg": choice.max_registers}
    return {"H": h, "R": h // g, "P": p, "N": n} | compiled | tiles | changed


def split_headdim(num_programs: int, p: int) -> int:
    """The tile of headdim: half of it where whole heads would leave multiprocessors idle (prefill of one sequence)."""
    return tile(p) if num_programs >= FULL_GRID else max(16, tile(p) // 2)


def head_splits(num_programs: int, heads_per_group: int) -> int:
    """Programs that share the heads of a group. As many run at once as there are multiprocessors, and the last round may be nearly empty;
    splits make rounds shorter, but each writes a partial sum of the gradients of B and C."""

    def rounds(splits: int) -> float:
        sums = splits * SPLIT_COST * num_programs / MULTIPROCESSORS if splits > 1 else 0.0
        return triton.cdiv(num_programs * splits, MULTIPROCESSORS) / splits + sums

    return min((2**i for i in range(heads_per_group.bit_length()) if heads_per_group % 2**i == 0), key=rounds)
