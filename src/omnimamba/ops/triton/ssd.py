"""The Mamba-2 scan (arXiv:2405.21060, section 6); the definition is `omnimamba.ops.ssd`, the backward pass is in `ssd_backward.py`.

A chunk is a tile of q positions, one masked (q, q) matrix product; q comes from the launch table, for the result does not depend on
it.

- `forward_kernel`: one program per row and head walks over the chunks with the state [p, n] in registers, so that no state between
  chunks reaches memory.
- Long sequences of few rows are cut into spans of several chunks (`num_spans`): all spans but the last are first walked by `span_kernel`,
  without outputs and from an empty state, at once, then all by `forward_kernel`, each from the state at its start. That is the recurrence
  once more, over the spans before it: state <- decay of the span * state + what the span added.

Decays are exp of sums over at most q steps, taken as differences of one cumulative sum of the chunk. In fp32 that cancels (`segment_sums`),
so the cumulative sum is fp64 and its differences are formed from two fp32 parts.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.triton.launch import MIN_SPANS, SPAN_GRID, SPAN_POSITIONS, tile
from omnimamba.ops.triton.ssd_backward import scan_backward
from omnimamba.ops.triton.ssd_tiles import (
    chunk_rows,
    first_state,
    load_tile,
    next_state,
    operand,
    sizes,
    split_headdim,
    ssd_launch,
    store_tile,
    strides,
)


@triton.jit
def load_decay(p_dt, a, o_q, num_rows, stride_row):
    """dt [q], the log decay from the chunk's start to after each position [q] in fp64, and over the whole chunk."""
    b_dt = tl.load(p_dt + o_q * stride_row, mask=o_q < num_rows, other=0.0)
    b_step = (b_dt * a).to(tl.float64)
    return b_dt, tl.cumsum(b_step, 0), tl.sum(b_step, 0)


@triton.jit
def chunk_decay(b_sum, o_q):
    """The decay from s to t, 0 for s > t: [t, s]."""
    high = b_sum.to(tl.float32)
    low = (b_sum - high.to(tl.float64)).to(tl.float32)
    log = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(o_q[:, None] >= o_q[None, :], log, float("-inf")))


@triton.jit
def walk(l, span, H: tl.constexpr):
    """What a program walks over: row and head as one number and as two, the first position and how many there are."""
    i_bh = tl.program_id(0).to(tl.int64)
    first = tl.program_id(2).to(tl.int64) * span
    return i_bh, i_bh // H, i_bh % H, first, tl.minimum(l - first, span).to(tl.int32)


@triton.jit(do_not_specialize=["l", "span"])
def forward_kernel(
    x, dt, A, B, C, D, initial, added, decays, y, final,
    x_b, x_l, x_h, dt_b, dt_l, dt_h, B_b, B_l, B_g, C_b, C_l, C_g, l, span,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_INITIAL: tl.constexpr,
    Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """added: [spans - 1, b, h, p, n], decays: [spans - 1, b, h], of all spans but the last; span: positions of each, whole chunks."""
    i_bh, i_b, i_h, first, length = walk(l, span, H)
    o_q = tl.arange(0, Q)
    o_p = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    dtype: tl.constexpr = x.dtype.element_ty
    a = tl.load(A + i_h)
    d = tl.load(D + i_h)
    b_state = first_state(initial, i_bh, o_p, o_n, P, N, HAS_INITIAL)
    for i in range(tl.program_id(2)):
        i_part = i * tl.num_programs(0) + i_bh
        b_state *= tl.load(decays + i_part)
        b_state += load_tile(added + i_part * P * N, o_p, o_n, P, N, N)
    p_x = x + i_b * x_b + i_h * x_h + first * x_l
    p_dt = dt + i_b * dt_b + i_h * dt_h + first * dt_l
    p_B = B + i_b * B_b + (i_h // R) * B_g + first * B_l
    p_C = C + i_b * C_b + (i_h // R) * C_g + first * C_l
    p_y = y + ((i_b * l + first) * H + i_h) * P
    for i_c in range(tl.cdiv(length, Q)):
        left = length - i_c * Q  # positions from the chunk's start on
        b_x = load_tile(p_x, o_q, o_p, left, P, x_l).to(tl.float32)
        b_B = load_tile(p_B, o_q, o_n, left, N, B_l).to(DOT)
        b_C = load_tile(p_C, o_q, o_n, left, N, C_l).to(DOT)
        b_dt, b_sum, b_total = load_decay(p_dt, a, o_q, left, dt_l)
        b_xdt = b_x * b_dt[:, None]
        b_scores = tl.dot(b_C, tl.trans(b_B), input_precision="ieee") * chunk_decay(b_sum, o_q)
        b_y = tl.dot(b_C, tl.trans(operand(b_state, dtype, DOT)), input_precision="ieee") * tl.exp(b_sum.to(tl.float32))[:, None]
        b_y = tl.dot(operand(b_scores, dtype, DOT), operand(b_xdt, dtype, DOT), b_y, input_precision="ieee")
        store_tile(p_y, b_y + b_x * d, o_q, o_p, left, P, H * P)
        b_xdt *= tl.exp((b_total - b_sum).to(tl.float32))[:, None]
        b_state = next_state(b_state, b_xdt, b_B, tl.exp(b_total.to(tl.float32)), dtype, DOT)
        p_x += Q * x_l
        p_dt += Q * dt_l
        p_B += Q * B_l
        p_C += Q * C_l
        p_y += Q * H * P
    if tl.program_id(2) == tl.num_programs(2) - 1:
        store_tile(final + i_bh * P * N, b_state, o_p, o_n, P, N, N)


@triton.jit(do_not_specialize=["l", "span"])
def span_kernel(
    x, dt, A, B, added, decays, x_b, x_l, x_h, dt_b, dt_l, dt_h, B_b, B_l, B_g, l, span,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """added: [spans, b, h, p, n], where the walk of each span ends that starts from nothing; decays: [spans, b, h]."""
    i_bh, i_b, i_h, first, length = walk(l, span, H)
    i_part = tl.program_id(2) * tl.num_programs(0) + i_bh
    o_q = tl.arange(0, Q)
    o_p = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    dtype: tl.constexpr = x.dtype.element_ty
    a = tl.load(A + i_h)
    b_state = tl.zeros((TILE_P, TILE_N), tl.float32)
    b_log = tl.zeros((), tl.float64)
    for i_c in range(tl.cdiv(length, Q)):
        left = length - i_c * Q
        i_l = first + i_c * Q
        b_x = load_tile(x + i_b * x_b + i_h * x_h + i_l * x_l, o_q, o_p, left, P, x_l).to(tl.float32)
        b_B = load_tile(B + i_b * B_b + (i_h // R) * B_g + i_l * B_l, o_q, o_n, left, N, B_l).to(DOT)
        b_dt, b_sum, b_total = load_decay(dt + i_b * dt_b + i_h * dt_h + i_l * dt_l, a, o_q, left, dt_l)
        b_x *= (b_dt * tl.exp((b_total - b_sum).to(tl.float32)))[:, None]
        b_state = next_state(b_state, b_x, b_B, tl.exp(b_total.to(tl.float32)), dtype, DOT)
        b_log += b_total
    store_tile(added + i_part * P * N, b_state, o_p, o_n, P, N, N)
    tl.store(decays + i_part, tl.exp(b_log.to(tl.float32)))


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None = None, spans: int | None = None
) -> tuple[Tensor, Tensor]:
    """y [b, l, h, p] and the final state [b, h, p, n]. x, B, C: one dtype, dense in their last axis; the rest fp32, contiguous.

    spans: see `ssd_chunk_scan`.
    """
    b, l, h, p = x.shape
    n = B.shape[3]
    y = torch.empty((b, l, h, p), dtype=x.dtype, device=x.device)
    final = torch.empty((b, h, p, n), dtype=torch.float32, device=x.device)
    spans = num_spans(b * h, l) if spans is None else spans
    tile_p = split_headdim(b * h, p) if spans == 1 else tile(p)
    choice = ssd_launch("ssd_forward", x, n)
    # On an H100, Triton 3.6 gives wrong outputs where the products of one loop have 64 rows (a chunk) and 32 (a part of headdim).
    choice = choice._replace(rows=min(choice.rows, tile_p))
    span = triton.cdiv(l, spans * chunk_rows(choice, l)) * chunk_rows(choice, l)
    spans = triton.cdiv(l, span)
    added, decays = walk_spans(x, dt, A, B, span, spans - 1, choice.rows) if spans > 1 else (final, final)
    forward_kernel[b * h, triton.cdiv(p, tile_p), spans](
        x, dt, A, B, C, D, final if initial is None else initial, added, decays, y, final, *strides(x, dt, B, C), l, span,
        HAS_INITIAL=initial is not None, **sizes(x, B, choice, TILE_P=tile_p),
    )  # fmt: skip
    return y, final


class SsdChunkScan(torch.autograd.Function):
    """x, B, C: one dtype; dt, A, D, initial: fp32."""

    @staticmethod
    def forward(
        ctx, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None, spans: int | None
    ) -> tuple[Tensor, Tensor]:
        x, B, C = (m if m.stride(3) == 1 else m.contiguous() for m in (x, B, C))
        A, D, initial = A.contiguous(), D.contiguous(), None if initial is None else initial.contiguous()
        ctx.save_for_backward(x, dt, A, B, C, D, initial)
        ctx.set_materialize_grads(False)
        return scan_forward(x, dt, A, B, C, D, initial, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dfinal: Tensor | None):
        x, dt, A, B, C, D, initial = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dy = dy if dy.stride(3) == 1 else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx, dB, dC = (torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in (x, B, C))
        ddt, dA, dD, dinitial = scan_backward(x, dt, A, B, C, D, initial, dy, dfinal, dx, dB, dC)
        return dx, ddt, dA, dB, dC, dD, dinitial if ctx.needs_input_grad[6] else None, None


def walk_spans(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, span: int, spans: int, rows: int) -> tuple[Tensor, Tensor]:
    """What each of the first `spans` spans adds to the state, [spans, b, h, p, n], and its decay over the span, [spans, b, h]."""
    b, l, h, p = x.shape
    n = B.shape[3]
    added = torch.empty((spans, b, h, p, n), dtype=torch.float32, device=x.device)
    decays = torch.empty((spans, b, h), dtype=torch.float32, device=x.device)
    span_kernel[b * h, 1, spans](
        x, dt, A, B, added, decays, *strides(x, dt, B), l, span,
        **sizes(x, B, ssd_launch("ssd_spans", x, n)._replace(rows=rows)),
    )  # fmt: skip
    return added, decays


def num_spans(num_walks: int, l: int) -> int:
    """Spans that `l` positions of each of `num_walks` rows and heads are cut into: 1 where the walks fill the GPU, or are short.

    Every position but those of the last span is read twice, and whole heads replace halves of them (`split_headdim`): a few spans do not
    make up for that.
    """
    spans = min(SPAN_GRID // num_walks, l // SPAN_POSITIONS)
    return spans if spans >= MIN_SPANS else 1


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    initial_state: Tensor | None = None,
    spans: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`omnimamba.ops.ssd_chunk_scan` for an x of at least one position.

    spans: the most that the forward pass may cut the sequence into, for comparisons; None takes `num_spans`.
    """
    initial_state = None if initial_state is None else initial_state.float()
    with torch.cuda.device_of(x):
        return SsdChunkScan.apply(x, dt.float(), A.float(), B.to(x.dtype), C.to(x.dtype), D.float(), initial_state, spans)
