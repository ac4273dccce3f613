"""The scan over a prompt on a CPU: the recurrence itself, compiled by Numba, position after position.

The chunked form, which is for matrix units, makes (q, q) matrices of every head and passes them through memory. Here LANES channels of a
head go through all positions while their state [n, LANES] stays in a core's first cache. All sums are fp32, whatever x is, and in an order
that depends on nothing but n: what comes out for a sequence is the same beside others, and in pieces.
"""

# pyright: reportCallIssue=false
# An intrinsic's own first argument is Numba's, a call does not pass it.

from __future__ import annotations

from typing import NamedTuple

import numba
import torch
from torch import Tensor

from omnimamba.ops.cpu import LANES
from omnimamba.ops.cpu.sequences import Strided, in_parts, load, row_at, store
from omnimamba.ops.cpu.vector import FLOAT, compiled, fma, full, get_f32, jit, load_f32, set_f32, store_f32

LINE = FLOAT * LANES
float32 = numba.float32


class Scan(NamedTuple):
    """fp32 but for x and y."""

    x: Strided
    """[b, l, h * p]"""
    y: Strided
    dt: Strided
    """[b, l, h]"""
    decay: Strided
    """exp(dt A)"""
    B: Strided
    """[b, l, g * n]"""
    C: Strided
    D: int
    """The address of [h]."""
    state: int
    """The address of [b, h, p, n], before the scan and after it."""
    length: int
    num_heads: int
    heads_per_group: int
    headdim: int
    d_state: int
    is_bf16: bool


@jit
def broadcast(numbers, k):
    return full(get_f32(numbers + FLOAT * k))


@jit
def swap(rows, columns, num, to_columns):
    """Copies LANES rows of num numbers to num rows of LANES, or back."""
    for i in range(LANES):
        for k in range(num):
            row, column = rows + FLOAT * (num * i + k), columns + FLOAT * (LANES * k + i)
            if to_columns:
                set_f32(column, get_f32(row))
            else:
                set_f32(row, get_f32(column))


@compiled
def scan_channels(scan, first, last, state):
    """Parts of LANES channels, first to last - 1, counted through all sequences. state: the address of [n, LANES]."""
    n, parts = scan.d_state, scan.num_heads * scan.headdim // LANES
    for i in range(first, last):
        b, channel = i // parts, i % parts * LANES
        h = channel // scan.headdim
        group, offset = FLOAT * n * (h // scan.heads_per_group), channel * (2 if scan.is_bf16 else FLOAT)
        D, kept = full(get_f32(scan.D + FLOAT * h)), scan.state + LINE * n * i
        swap(kept, state, n, True)
        for t in range(0, scan.length, 2):  # two positions: the state passes through the cache once for both
            x0, x1 = load(row_at(scan.x, b, t) + offset, scan.is_bf16), full(float32(0))
            dx0, dx1 = x0 * broadcast(row_at(scan.dt, b, t), h), x1
            decay0, decay1 = broadcast(row_at(scan.decay, b, t), h), full(float32(1))
            B0, C0 = row_at(scan.B, b, t) + group, row_at(scan.C, b, t) + group
            B1, C1, is_pair = B0, C0, t + 1 < scan.length
            if is_pair:  # else the second changes nothing
                x1 = load(row_at(scan.x, b, t + 1) + offset, scan.is_bf16)
                dx1, decay1 = x1 * broadcast(row_at(scan.dt, b, t + 1), h), broadcast(row_at(scan.decay, b, t + 1), h)
                B1, C1 = row_at(scan.B, b, t + 1) + group, row_at(scan.C, b, t + 1) + group
            y0, y1 = D * x0, D * x1
            even0, even1 = full(float32(0)), full(float32(0))  # sums of their own: one chain of additions would take longer
            for k in range(0, n, 2):
                row = state + LINE * k
                s = fma(load_f32(row), decay0, broadcast(B0, k) * dx0)
                even0 = fma(s, broadcast(C0, k), even0)
                s = fma(s, decay1, broadcast(B1, k) * dx1)
                even1 = fma(s, broadcast(C1, k), even1)
                store_f32(row, s)
                s = fma(load_f32(row + LINE), decay0, broadcast(B0, k + 1) * dx0)
                y0 = fma(s, broadcast(C0, k + 1), y0)
                s = fma(s, decay1, broadcast(B1, k + 1) * dx1)
                y1 = fma(s, broadcast(C1, k + 1), y1)
                store_f32(row + LINE, s)
            store(row_at(scan.y, b, t) + offset, even0 + y0, scan.is_bf16)
            if is_pair:
                store(row_at(scan.y, b, t + 1) + offset, even1 + y1, scan.is_bf16)
        swap(kept, state, n, False)


def ssd_chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.ssd.ssd_chunk_scan`. x is fp32 or bf16, p a multiple of LANES, n even."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    y, D, dt = x.new_empty(b, l, h * p), D.float().contiguous(), dt.float().contiguous()
    state = dt.new_zeros(b, h, p, n) if initial_state is None else initial_state.float().clone(memory_format=torch.contiguous_format)
    B, C, decay = B.flatten(2).float().contiguous(), C.flatten(2).float().contiguous(), torch.exp(dt * A.float())
    x = x.flatten(2) if x.stride()[2:] == (p, 1) else x.reshape(b, l, h * p).contiguous()
    tensors = (x, y, dt, decay, B, C)
    scan = Scan(*map(Strided.of, tensors), D.data_ptr(), state.data_ptr(), l, h, h // g, p, n, x.dtype is torch.bfloat16)
    scratch = dt.new_empty(torch.get_num_threads(), n, LANES)
    in_parts(lambda thread, first, last: scan_channels(scan, first, last, scratch[thread].data_ptr()), b * h * p // LANES)
    return y.unflatten(-1, (h, p)), state
