"""The Mamba-2 scan (arXiv:2405.21060, section 6); the definition is `omnimamba.ops.ssd`, the backward pass is in `ssd_backward.py`.

A chunk is a tile of q positions, one masked (q, q) matrix product; q comes from the launch table, for the result does not depend on
it.

- `forward_kernel`: one program per row and head walks over the chunks with the state [p, n] in registers, so that no state between
  chunks reaches memory.
  Where a prompt is read it also gates y (`Gate`), so that y itself does not either.
- Long sequences of few rows are cut into spans of several chunks (`num_spans`): all spans but the last are first walked by `span_kernel`,
  without outputs and from an empty state, at once, then all by `forward_kernel`, each from the state at its start. That is the recurrence
  once more, over the spans before it: state <- decay of the span * state + what the span added.
- On Hopper `ops/cuda/scan.cu` takes the place of `forward_kernel` where it fits the sizes: the same results, twice as fast.

Decays are powers of sums over at most q steps, taken as differences of one cumulative sum of the chunk, which `decay_kernel` computes once
for both. In fp32 that cancels (`segment_sums`), by less than half precision rounds; for an fp32 x the cumulative sum is fp64 and its
differences are formed from two fp32 parts. Logarithms are to base 2, as the GPU's exponential is.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.cuda import scan as hopper
from omnimamba.ops.triton.decode import LOG2_E, silu
from omnimamba.ops.triton.launch import FULL_GRID, SPAN_POSITIONS, launch, launch_for, tile
from omnimamba.ops.triton.ssd_backward import scan_backward
from omnimamba.ops.triton.ssd_tiles import (
    chunk_rows,
    first_state,
    load_tile,
    next_state,
    operand,
    sizes,
    split_headdim,
    store_tile,
    strides,
)

TINY = tl.constexpr(1e-38)
LOG2_ZERO = tl.constexpr(-1e30)  # finite: -inf less -inf is NaN


@triton.jit(do_not_specialize=["l"])
def decay_kernel(dt, A, log_decay, log_input, dt_b, dt_l, dt_h, l, H: tl.constexpr, Q: tl.constexpr, TILE_H: tl.constexpr):
    """One chunk of `chunk_decays`, of TILE_H heads."""
    i_l = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    i_b = tl.program_id(1).to(tl.int64)
    o_h = tl.program_id(2) * TILE_H + tl.arange(0, TILE_H)
    m_h = o_h < H
    dtype: tl.constexpr = log_decay.dtype.element_ty
    b_dt = tl.load(dt + i_b * dt_b + i_l[:, None] * dt_l + o_h[None, :] * dt_h, mask=(i_l < l)[:, None] & m_h[None, :], other=0.0)
    b_step = (b_dt * tl.load(A + o_h, mask=m_h, other=0.0)[None, :]).to(tl.float64)
    b_sum = tl.cumsum(b_step * LOG2_E, 0).to(dtype)
    b_log = tl.where(b_dt > 0, tl.log2(tl.maximum(b_dt, TINY).to(dtype)), LOG2_ZERO)
    o_out = (i_b * H + o_h)[None, :] * (tl.num_programs(0) * Q) + i_l[:, None]
    tl.store(log_decay + o_out, b_sum, mask=m_h[None, :])
    tl.store(log_input + o_out, b_log - b_sum, mask=m_h[None, :])


@triton.jit
def chunk_decay(b_decay, b_input, o_q):
    """What input s is worth at t, dt_s times the decay from s to t, 0 for s > t: [t, s]."""
    high, input_high = b_decay.to(tl.float32), b_input.to(tl.float32)
    log = high[:, None] + input_high[None, :]
    if b_decay.dtype == tl.float64:
        log += (b_decay - high).to(tl.float32)[:, None] + (b_input - input_high).to(tl.float32)[None, :]
    return tl.exp2(tl.where(o_q[:, None] >= o_q[None, :], log, float("-inf")))


@triton.jit
def walk(l, span, H: tl.constexpr):
    """What a program walks over: row and head as one number and as two, the first position and how many there are."""
    i_bh = tl.program_id(0).to(tl.int64)
    first = tl.program_id(2).to(tl.int64) * span
    return i_bh, i_bh // H, i_bh % H, first, tl.minimum(l - first, span).to(tl.int32)


@triton.jit
def gate(b_y, b_z, b_weight, p_squares, o_q, left, squares_l):
    """y * silu(z) * weight; the sums of squares before the weight are stored."""
    b_y *= silu(b_z.to(tl.float32))
    tl.store(p_squares + o_q[:, None] * squares_l, tl.sum(b_y * b_y, 1, keep_dims=True), mask=(o_q < left)[:, None])
    return b_y * b_weight.to(tl.float32)


@triton.jit(do_not_specialize=["l", "span"])
def forward_kernel(
    x, log_decay, log_input, B, C, D, initial, added, decays, z, weight, squares, y, final,
    x_b, x_l, x_h, decay_b, decay_h, B_b, B_l, B_g, C_b, C_l, C_g, z_b, z_l, z_h, l, span,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_INITIAL: tl.constexpr, GATED: tl.constexpr,
    Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """log_decay, log_input: see `chunk_decays`; added: [spans - 1, b, h, p, n], decays: [spans - 1, b, h], of all spans but the last;
    squares: [b, l, h, tiles of headdim]; span: positions of each, whole chunks."""
    i_bh, i_b, i_h, first, length = walk(l, span, H)
    o_q = tl.arange(0, Q)
    o_p = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    dtype: tl.constexpr = x.dtype.element_ty
    d = tl.load(D + i_h)
    b_state = first_state(initial, i_bh, o_p, o_n, P, N, HAS_INITIAL)
    for i in range(tl.program_id(2)):
        i_part = i * tl.num_programs(0) + i_bh
        b_state *= tl.load(decays + i_part)
        b_state += load_tile(added + i_part * P * N, o_p, o_n, P, N, N)
    p_x = x + i_b * x_b + i_h * x_h + first * x_l
    p_decay = log_decay + i_b * decay_b + i_h * decay_h + first
    p_input = log_input + i_b * decay_b + i_h * decay_h + first
    p_B = B + i_b * B_b + (i_h // R) * B_g + first * B_l
    p_C = C + i_b * C_b + (i_h // R) * C_g + first * C_l
    i_out = (i_b * l + first) * H + i_h
    p_y = y + i_out * P
    p_z = z + i_b * z_b + i_h * z_h + first * z_l
    squares_l = H * tl.num_programs(1)
    p_squares = squares + i_out * tl.num_programs(1) + tl.program_id(1)
    if GATED:
        b_weight = tl.load(weight + i_h * P + o_p, mask=o_p < P, other=0.0)[None, :]
    for i_c in range(tl.cdiv(length, Q)):
        left = length - i_c * Q  # positions from the chunk's start on
        b_x = load_tile(p_x, o_q, o_p, left, P, x_l)
        b_B = load_tile(p_B, o_q, o_n, left, N, B_l).to(DOT)
        b_C = load_tile(p_C, o_q, o_n, left, N, C_l).to(DOT)
        b_decay, b_input, b_total = tl.load(p_decay + o_q), tl.load(p_input + o_q), tl.load(p_decay + Q - 1)
        b_scores = tl.dot(b_C, tl.trans(b_B), input_precision="ieee") * chunk_decay(b_decay, b_input, o_q)
        b_scores += tl.where(o_q[:, None] == o_q[None, :], d, 0.0)  # D x comes with the product
        if GATED:
            b_z = load_tile(p_z, o_q, o_p, left, P, z_l)
        b_y = tl.dot(b_C, tl.trans(operand(b_state, dtype, DOT)), input_precision="ieee") * tl.exp2(b_decay.to(tl.float32))[:, None]
        b_y = tl.dot(operand(b_scores, dtype, DOT), b_x.to(DOT), b_y, input_precision="ieee")
        # the state before the gate, which is computed while the tensor cores work on this product
        b_x = b_x.to(tl.float32) * tl.exp2((b_total + b_input).to(tl.float32))[:, None]
        b_state = next_state(b_state, b_x, b_B, tl.exp2(b_total.to(tl.float32)), dtype, DOT)
        if GATED:
            b_y = gate(b_y, b_z, b_weight, p_squares, o_q, left, squares_l)
        store_tile(p_y, b_y, o_q, o_p, left, P, H * P)
        p_x += Q * x_l
        p_decay += Q
        p_input += Q
        p_B += Q * B_l
        p_C += Q * C_l
        p_y += Q * H * P
        p_z += Q * z_l
        p_squares += Q * squares_l
    if tl.program_id(2) == tl.num_programs(2) - 1:
        store_tile(final + i_bh * P * N, b_state, o_p, o_n, P, N, N)


@triton.jit(do_not_specialize=["l", "span"])
def span_kernel(
    x, log_decay, log_input, B, added, decays, x_b, x_l, x_h, decay_b, decay_h, B_b, B_l, B_g, l, span,
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
    b_state = tl.zeros((TILE_P, TILE_N), tl.float32)
    b_log = tl.zeros((), tl.float64)
    for i_c in range(tl.cdiv(length, Q)):
        left = length - i_c * Q
        i_l = first + i_c * Q
        b_x = load_tile(x + i_b * x_b + i_h * x_h + i_l * x_l, o_q, o_p, left, P, x_l).to(tl.float32)
        b_B = load_tile(B + i_b * B_b + (i_h // R) * B_g + i_l * B_l, o_q, o_n, left, N, B_l).to(DOT)
        o_decay = i_b * decay_b + i_h * decay_h + i_l
        b_input, b_total = tl.load(log_input + o_decay + o_q), tl.load(log_decay + o_decay + Q - 1)
        b_x *= tl.exp2((b_total + b_input).to(tl.float32))[:, None]
        b_state = next_state(b_state, b_x, b_B, tl.exp2(b_total.to(tl.float32)), dtype, DOT)
        b_log += b_total
    store_tile(added + i_part * P * N, b_state, o_p, o_n, P, N, N)
    tl.store(decays + i_part, tl.exp2(b_log.to(tl.float32)))


class Gate(NamedTuple):
    """What the gated norm multiplies y by before the root mean square divides it."""

    z: Tensor  # [b, l, h, p], dense in its last axis
    weight: Tensor  # [h * p]


class Scanned(NamedTuple):
    y: Tensor  # [b, l, h, p]; with a gate y * silu(z) * weight
    final: Tensor  # [b, h, p, n] fp32
    squares: Tensor | None  # with a gate, [b, l, s] fp32, sums of the squares of y * silu(z)


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None = None, spans: int | None = None,
    *, gate: Gate | None = None,
) -> Scanned:  # fmt: skip
    """x, B, C: one dtype, dense in their last axis; dt: fp32; the rest fp32, contiguous. spans: see `ssd_chunk_scan`."""
    b, l, h, p = x.shape
    n = B.shape[3]
    y = torch.empty((b, l, h, p), dtype=x.dtype, device=x.device)
    final = torch.empty((b, h, p, n), dtype=torch.float32, device=x.device)
    spans = num_spans(b * h, l) if spans is None else spans
    is_for_hopper = hopper.fits(x, B, C) if gate is None else hopper.fits(x, B, C, gate.z) and gate.weight.dtype == x.dtype
    # halves of heads only where all of them run at once
    tile_p = split_headdim(2 * b * h, p) if spans == 1 and not is_for_hopper else tile(p)
    choice = launch_for(x, "ssd_forward", n)
    # On an H100, Triton 3.6 gives wrong outputs where the products of one loop have 64 rows (a chunk) and 32 (a part of headdim).
    choice = choice._replace(rows=min(choice.rows, tile_p))
    q = hopper.CHUNK if is_for_hopper else chunk_rows(choice, l)
    span = triton.cdiv(l, spans * q) * q
    spans, tiles_p = triton.cdiv(l, span), triton.cdiv(p, tile_p)
    decay = chunk_decays(dt, A, q, torch.float64 if x.dtype == torch.float32 else torch.float32)
    added, decays = walk_spans(x, *decay, B, span, spans - 1, choice.rows) if spans > 1 else (final, final)
    squares = None if gate is None else torch.empty((b, l, h * tiles_p), dtype=torch.float32, device=x.device)
    if is_for_hopper:
        gating = {} if gate is None else {"z": gate.z, "weight": gate.weight, "squares": squares}
        hopper.scan(x, *decay, B, C, D, initial, hopper.Spans(span, added, decays), y, final, **gating)
        return Scanned(y, final, squares)
    z, weight, sums = (y, y, final) if squares is None or gate is None else (*gate, squares)
    forward_kernel[b * h, tiles_p, spans](
        x, *decay, B, C, D, final if initial is None else initial, added, decays, z, weight, sums, y, final,
        *strides(x), *decay[0].stride()[:2], *strides(B, C, z), l, span,
        HAS_INITIAL=initial is not None, GATED=gate is not None, **sizes(x, B, choice, TILE_P=tile_p),
    )  # fmt: skip
    return Scanned(y, final, squares)


def chunk_decays(dt: Tensor, A: Tensor, q: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logarithms to base 2 in `dtype`, [b, h, l]: of the decay from the start of each position's chunk of q to after the position, and of
    dt less that. A sum of the one at t and of the other at s is what input s is worth at t. The last chunk is filled up with dt = 0.

    dt: [b, l, h] fp32; A: [h] fp32.
    """
    b, l, h = dt.shape
    choice = launch("ssd_decays", h)
    chunks, tile_h = triton.cdiv(l, q), min(choice.columns, triton.next_power_of_2(h))
    log_decay, log_input = torch.empty((2, b, h, chunks * q), dtype=dtype, device=dt.device)
    decay_kernel[chunks, b, triton.cdiv(h, tile_h)](
        dt, A, log_decay, log_input, *dt.stride(), l, H=h, Q=q, TILE_H=tile_h, num_warps=choice.num_warps, num_stages=choice.num_stages
    )
    return log_decay, log_input


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
        scanned = scan_forward(x, dt, A, B, C, D, initial, spans)
        return scanned.y, scanned.final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dfinal: Tensor | None):
        x, dt, A, B, C, D, initial = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dy = dy if dy.stride(3) == 1 else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx, dB, dC = (torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in (x, B, C))
        ddt = torch.empty(dt.shape, dtype=torch.float32, device=dt.device)
        sums, dinitial = scan_backward(x, dt, A, B, C, D, initial, dy, dfinal, dx, ddt, dB, dC)
        dA, dD, _ = sums.sum((1, 2))
        return dx, ddt, dA, dB, dC, dD, dinitial if ctx.needs_input_grad[6] else None, None


def walk_spans(x: Tensor, log_decay: Tensor, log_input: Tensor, B: Tensor, span: int, spans: int, rows: int) -> tuple[Tensor, Tensor]:
    """What each of the first `spans` spans adds to the state, [spans, b, h, p, n], and its decay over the span, [spans, b, h]."""
    b, l, h, p = x.shape
    n = B.shape[3]
    added = torch.empty((spans, b, h, p, n), dtype=torch.float32, device=x.device)
    decays = torch.empty((spans, b, h), dtype=torch.float32, device=x.device)
    span_kernel[b * h, 1, spans](
        x, log_decay, log_input, B, added, decays, *strides(x), *log_decay.stride()[:2], *strides(B), l, span,
        **sizes(x, B, launch_for(x, "ssd_spans", n)._replace(rows=rows)),
    )  # fmt: skip
    return added, decays


def num_spans(num_walks: int, l: int) -> int:
    """Spans that `l` positions of each of `num_walks` rows and heads are cut into: as many as the GPU walks at once, 1 for short rows.

    More would wait for one another: 768 positions of 64 heads take 35 us in 4 spans and 48 us in 6 (H200).
    """
    return max(1, min(FULL_GRID // num_walks, l // SPAN_POSITIONS))


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
