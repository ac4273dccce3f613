"""The causal convolution over a prompt on a CPU with its SiLU, compiled by Numba. Sums are fp32, whatever the inputs are."""

# pyright: reportCallIssue=false
# An intrinsic's own first argument is Numba's, a call does not pass it.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from omnimamba.ops.cpu import LANES
from omnimamba.ops.cpu.sequences import Strided, in_parts, load, row_at, store
from omnimamba.ops.cpu.vector import FLOAT, compiled, fma, load_f32, silu

WIDTH = 4
"""Taps."""


class Convolution(NamedTuple):
    past: Strided
    """[b, WIDTH, c], the inputs before those of x, oldest first."""
    x: Strided
    """[b, l, c]"""
    y: Strided
    weight: int
    """The address of [WIDTH, c] fp32."""
    bias: int
    """The address of [c] fp32."""
    length: int
    num_channels: int
    is_bf16: bool


@compiled
def convolve(conv, first, last):
    """Positions first to last - 1, counted through all sequences."""
    size, c = 2 if conv.is_bf16 else FLOAT, conv.num_channels
    for i in range(first, last):
        b, t = i // conv.length, i % conv.length
        x0 = row_at(conv.x, b, t - 3) if t >= 3 else row_at(conv.past, b, t + 1)
        x1 = row_at(conv.x, b, t - 2) if t >= 2 else row_at(conv.past, b, t + 2)
        x2 = row_at(conv.x, b, t - 1) if t >= 1 else row_at(conv.past, b, t + 3)
        x3, y = row_at(conv.x, b, t), row_at(conv.y, b, t)
        for channel in range(0, c, LANES):
            at, w = size * channel, conv.weight + FLOAT * channel
            v = fma(load(x0 + at, conv.is_bf16), load_f32(w), load_f32(conv.bias + FLOAT * channel))
            v = fma(load(x1 + at, conv.is_bf16), load_f32(w + FLOAT * c), v)
            v = fma(load(x2 + at, conv.is_bf16), load_f32(w + FLOAT * 2 * c), v)
            v = fma(load(x3 + at, conv.is_bf16), load_f32(w + FLOAT * 3 * c), v)
            store(y + at, silu(v), conv.is_bf16)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, initial_state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `ops.conv.causal_conv1d`. x is fp32 or bf16, c a multiple of LANES, w is WIDTH."""
    b, l, c = x.shape
    past = x.new_zeros(b, WIDTH, c) if initial_state is None else initial_state.transpose(1, 2).to(x.dtype).contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, bias, y = weight.float().T.contiguous(), bias.float().contiguous(), x.new_empty(b, l, c)
    conv = Convolution(*map(Strided.of, (past, x, y)), weight.data_ptr(), bias.data_ptr(), l, c, x.dtype is torch.bfloat16)
    in_parts(lambda _, first, last: convolve(conv, first, last), b * l)
    ends = torch.full((b,), l, device=x.device) if lengths is None else lengths
    last = ends[:, None] + torch.arange(-WIDTH, 0, device=x.device)  # of x; what is before the first comes from the past
    rows = torch.arange(b, device=x.device)[:, None]
    state = torch.where((last < 0)[:, :, None], past[rows, last.clamp(max=-1) + WIDTH], x[rows, last.clamp(min=0)])
    return y, state.transpose(1, 2)
