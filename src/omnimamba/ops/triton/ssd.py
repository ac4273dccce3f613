"""The Mamba-2 scan, forward and backward (arXiv:2405.21060, section 6); the definition is `omnimamba.ops.ssd`.

A chunk is a tile of q positions, one masked (q, q) matrix product; q comes from the launch table, for the result does not depend on
it.

- `forward_kernel`: one program per row and head walks over the chunks with the state [p, n] in registers, so that no state between
  chunks reaches memory.
- `states_kernel`: the same walk without the outputs. Forwards it writes the state that enters each chunk, backwards the gradient of the
  state that leaves it (the transposed recurrence: C and dy for B and dt x). Both exist only during a backward pass.
- Long sequences of few rows are cut into spans of several chunks (`num_spans`): all spans but the last are first walked by `states_kernel`
  from an empty state, at once, then all by `forward_kernel`, each from the state at its start. That is the recurrence once more, over the
  spans before it: state <- decay of the span * state + what the span added.
- `backward_kernel`: with those, chunks are independent. One program per row, chunk and some heads of a group recomputes the (q, q) matrices
  and sums the gradients of B and C over its heads in registers. Its partial sums over heads, rows and chunks are added by torch in a fixed
  order, not by atomics: gradients are the same in every run.

Decays are exp of sums over at most q steps, taken as differences of one cumulative sum of the chunk. In fp32 that cancels (`segment_sums`),
so the cumulative sum is fp64 and its differences are formed from two fp32 parts.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.triton.launch import FULL_GRID, MIN_SPANS, SPAN_GRID, SPAN_POSITIONS, Launch, dot_dtype, launch, tile

# Names: o_ offsets, m_ masks, b_ values of a tile, p_ pointers. Tiles: [q, p] for x and y, [q, n] for B and C, [p, n] for states,
# [t, s] for the (q, q) matrices, from position s to position t.


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


@triton.jit
def first_state(initial, i_bh, o_p, o_n, P: tl.constexpr, N: tl.constexpr, HAS_INITIAL: tl.constexpr):
    if HAS_INITIAL:
        b_state = load_tile(initial + i_bh * P * N, o_p, o_n, P, N, N)
    else:
        b_state = tl.zeros((o_p.shape[0], o_n.shape[0]), tl.float32)
    return b_state


@triton.jit
def next_state(b_state, b_x, b_B, b_total, ROUND: tl.constexpr, DOT: tl.constexpr):
    """The state one chunk further. b_x: its inputs, times the decay up to the chunk's end."""
    b_state *= tl.exp(b_total.to(tl.float32))
    return tl.dot(tl.trans(operand(b_x, ROUND, DOT)), b_B, b_state, input_precision="ieee")


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
        b_state = next_state(b_state, b_xdt, b_B, b_total, dtype, DOT)
        p_x += Q * x_l
        p_dt += Q * dt_l
        p_B += Q * B_l
        p_C += Q * C_l
        p_y += Q * H * P
    if tl.program_id(2) == tl.num_programs(2) - 1:
        store_tile(final + i_bh * P * N, b_state, o_p, o_n, P, N, N)


@triton.jit(do_not_specialize=["l", "span"])
def states_kernel(
    x, dt, A, B, initial, states, final, decays,
    x_b, x_l, x_h, dt_b, dt_l, dt_h, B_b, B_l, B_g, l, span,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_STATES: tl.constexpr, REVERSE: tl.constexpr,
    Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """final: [spans, b, h, p, n], where the walk of each span ends. Beside it

    - HAS_STATES, one span: states [b, chunks, h, p, n] in x's dtype, that of the products they go into;
    - else: decays [spans, b, h].

    REVERSE: x is dy, B is C, `initial` the gradient of the final state, `final` that of the initial one.
    """
    i_bh, i_b, i_h, first, length = walk(l, span, H)
    i_part = tl.program_id(2) * tl.num_programs(0) + i_bh
    o_q = tl.arange(0, Q)
    o_p = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    dtype: tl.constexpr = x.dtype.element_ty
    a = tl.load(A + i_h)
    b_state = first_state(initial, i_bh, o_p, o_n, P, N, HAS_INITIAL)
    b_log = tl.zeros((), tl.float64)
    num_c = tl.cdiv(length, Q)
    for i in range(num_c):
        i_c = tl.cast(num_c - 1 - i if REVERSE else i, tl.int64)
        left = length - i_c * Q
        i_l = first + i_c * Q
        b_x = load_tile(x + i_b * x_b + i_h * x_h + i_l * x_l, o_q, o_p, left, P, x_l).to(tl.float32)
        b_B = load_tile(B + i_b * B_b + (i_h // R) * B_g + i_l * B_l, o_q, o_n, left, N, B_l).to(DOT)
        b_dt, b_sum, b_total = load_decay(dt + i_b * dt_b + i_h * dt_h + i_l * dt_l, a, o_q, left, dt_l)
        if HAS_STATES:
            store_tile(states + ((i_b * num_c + i_c) * H + i_h) * P * N, b_state, o_p, o_n, P, N, N)
        if REVERSE:
            b_x *= tl.exp(b_sum.to(tl.float32))[:, None]
        else:
            b_x *= (b_dt * tl.exp((b_total - b_sum).to(tl.float32)))[:, None]
        b_state = next_state(b_state, b_x, b_B, b_total, dtype, DOT)
        b_log += b_total
    store_tile(final + i_part * P * N, b_state, o_p, o_n, P, N, N)
    if not HAS_STATES:
        tl.store(decays + i_part, tl.exp(b_log.to(tl.float32)))


@triton.jit(do_not_specialize=["l"])
def backward_kernel(
    x, dt, A, B, C, D, dy, entering, leaving, dx, ddt, dB, dC, dA, dD,
    x_b, x_l, x_h, dt_b, dt_l, dt_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h, l,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """entering, leaving: [b, chunks, h, p, n]; dx: [b, l, h, p]; ddt: [b, l, h]; dB, dC: [b, l, g, splits, n]; dA, dD: [b, chunks, h]."""
    num_c = tl.cdiv(l, Q)
    i_bc = tl.program_id(0).to(tl.int64)
    i_b = i_bc // num_c
    i_c = i_bc % num_c
    i_g = tl.program_id(1) // SPLITS
    left = l - i_c * Q
    o_q = tl.arange(0, Q)
    o_p = tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    dtype: tl.constexpr = x.dtype.element_ty
    first = i_b * l + i_c * Q  # the chunk's first position among the dense rows of all sequences
    b_B = load_tile(B + i_b * B_b + i_c * Q * B_l + i_g * B_g, o_q, o_n, left, N, B_l).to(DOT)
    b_C = load_tile(C + i_b * C_b + i_c * Q * C_l + i_g * C_g, o_q, o_n, left, N, C_l).to(DOT)
    b_CB = tl.dot(b_C, tl.trans(b_B), input_precision="ieee")
    b_dCB = tl.zeros((Q, Q), tl.float32)
    b_dB = tl.zeros((Q, TILE_N), tl.float32)
    b_dC = tl.zeros((Q, TILE_N), tl.float32)
    m_x = (o_q < left)[:, None] & (o_p < P)[None, :]
    for i in range(R // SPLITS):
        i_h = tl.program_id(1) * (R // SPLITS) + i
        a = tl.load(A + i_h)
        d = tl.load(D + i_h)
        b_x = load_tile(x + i_b * x_b + i_c * Q * x_l + i_h * x_h, o_q, o_p, left, P, x_l).to(tl.float32)
        b_dy = load_tile(dy + i_b * dy_b + i_c * Q * dy_l + i_h * dy_h, o_q, o_p, left, P, dy_l)
        b_dt, b_sum, b_total = load_decay(dt + i_b * dt_b + i_c * Q * dt_l + i_h * dt_h, a, o_q, left, dt_l)
        from_start = tl.exp(b_sum.to(tl.float32))
        to_end = tl.exp((b_total - b_sum).to(tl.float32))
        p_state = (i_bc * H + i_h) * P * N
        b_entering = load_tile(entering + p_state, o_p, o_n, P, N, N)
        b_leaving = load_tile(leaving + p_state, o_p, o_n, P, N, N)
        ddecay = tl.exp(b_total.to(tl.float32)) * tl.sum(b_entering.to(tl.float32) * b_leaving.to(tl.float32))
        b_decay = chunk_decay(b_sum, o_q)
        b_xdt = b_x * b_dt[:, None]

        # y = (C B^T * decay) (dt x), inside the chunk
        b_dscores = tl.dot(b_dy.to(DOT), tl.trans(operand(b_xdt, dtype, DOT)), input_precision="ieee") * b_decay
        b_dCB += b_dscores
        b_dxdt = tl.dot(b_B, tl.trans(operand(b_leaving, dtype, DOT)), input_precision="ieee") * to_end[:, None]
        b_dxdt = tl.dot(tl.trans(operand(b_CB * b_decay, dtype, DOT)), b_dy.to(DOT), b_dxdt, input_precision="ieee")
        # The decay of step k is in every segment across it: those with s < k <= t. Summed as they are; as the difference of the sums over
        # t and over s the digits of dA cancel.
        b_dlog = tl.where(o_q[:, None] > o_q[None, :], b_dscores * b_CB, 0.0)
        b_dlog = tl.cumsum(b_dlog, 1) - b_dlog
        b_dstep = tl.sum(tl.where(o_q[:, None] >= o_q[None, :], b_dlog, 0.0), 0)

        # y = from_start * C entering^T
        b_dy = b_dy.to(tl.float32)
        b_part = tl.dot(operand(b_dy * from_start[:, None], dtype, DOT), operand(b_entering, dtype, DOT), input_precision="ieee")
        b_dC += b_part
        b_dstep += tl.cumsum(tl.sum(b_part * b_C.to(tl.float32), 1), 0, reverse=True)  # from_start: the steps up to a position

        # the state that leaves = decay of the chunk * entering + (to_end * dt x)^T B
        b_part = tl.dot(operand(b_xdt * to_end[:, None], dtype, DOT), operand(b_leaving, dtype, DOT), input_precision="ieee")
        b_dB += b_part
        b_dto_end = tl.sum(b_part * b_B.to(tl.float32), 1)
        b_dstep += tl.cumsum(b_dto_end, 0) - b_dto_end + ddecay  # to_end: the steps after a position; the chunk's decay: all

        b_ddt = tl.sum(b_dxdt * b_x, 1) + b_dstep * a
        b_dx = b_dxdt * b_dt[:, None] + b_dy * d
        tl.store(dx + (first * H + i_h) * P + o_q[:, None] * (H * P) + o_p[None, :], b_dx.to(dtype), mask=m_x)
        tl.store(ddt + first * H + i_h + o_q * H, b_ddt, mask=o_q < left)
        tl.store(dA + i_bc * H + i_h, tl.sum(b_dstep * b_dt))
        tl.store(dD + i_bc * H + i_h, tl.sum(b_dy * b_x))
    b_dCB = operand(b_dCB, dtype, DOT)
    b_dC = tl.dot(b_dCB, b_B, b_dC, input_precision="ieee")
    b_dB = tl.dot(tl.trans(b_dCB), b_C, b_dB, input_precision="ieee")
    groups: tl.constexpr = H // R * SPLITS
    o_out = (first * groups + tl.program_id(1)) * N + o_q[:, None] * (groups * N) + o_n[None, :]
    m_out = (o_q < left)[:, None] & (o_n < N)[None, :]
    tl.store(dB + o_out, b_dB.to(dB.dtype.element_ty), mask=m_out)
    tl.store(dC + o_out, b_dC.to(dC.dtype.element_ty), mask=m_out)


class SsdChunkScan(torch.autograd.Function):
    """x, B, C: one dtype; dt, A, D, initial: fp32."""

    @staticmethod
    def forward(
        ctx, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None, spans: int | None
    ) -> tuple[Tensor, Tensor]:
        x, B, C = (m if m.stride(3) == 1 else m.contiguous() for m in (x, B, C))
        A, D, initial = A.contiguous(), D.contiguous(), None if initial is None else initial.contiguous()
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
        ctx.save_for_backward(x, dt, A, B, C, D, initial)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dfinal: Tensor | None):
        x, dt, A, B, C, D, initial = ctx.saved_tensors
        b, l, h, p = x.shape
        g, n = B.shape[2:]
        dy = torch.zeros_like(x) if dy is None else dy
        dy = dy if dy.stride(3) == 1 else dy.contiguous()
        dfinal = None if dfinal is None else dfinal.contiguous()

        choice = ssd_launch("ssd_backward", x, n)
        q = chunk_rows(choice, l)
        num_c = triton.cdiv(l, q)
        entering, leaving = torch.empty((2, b, num_c, h, p, n), dtype=x.dtype, device=x.device)
        last, dinitial = torch.empty((2, b, h, p, n), dtype=torch.float32, device=x.device)
        states_choice = ssd_launch("ssd_states", x, n)._replace(rows=q)
        tile_p = split_headdim(b * h, p)
        for inputs, first, states, end, is_reverse in ((x, initial, entering, last, False), (dy, dfinal, leaving, dinitial, True)):
            weights = C if is_reverse else B
            states_kernel[b * h, triton.cdiv(p, tile_p), 1](
                inputs, dt, A, weights, end if first is None else first, states, end, end, *strides(inputs, dt, weights), l, l,
                HAS_INITIAL=first is not None, HAS_STATES=True, REVERSE=is_reverse, **sizes(x, B, states_choice, TILE_P=tile_p),
            )  # fmt: skip

        splits = head_splits(b * num_c * g, h // g)
        dx = torch.empty((b, l, h, p), dtype=x.dtype, device=x.device)
        ddt = torch.empty((b, l, h), dtype=torch.float32, device=x.device)
        dB, dC = torch.empty((2, b, l, g, splits, n), dtype=B.dtype if splits == 1 else torch.float32, device=x.device)
        dA, dD = torch.empty((2, b, num_c, h), dtype=torch.float32, device=x.device)
        backward_kernel[b * num_c, g * splits](
            x, dt, A, B, C, D, dy, entering, leaving, dx, ddt, dB, dC, dA, dD, *strides(x, dt, B, C, dy), l,
            SPLITS=splits, **sizes(x, B, choice),
        )  # fmt: skip
        dB, dC = (m.squeeze(3) if splits == 1 else m.sum(3).to(B.dtype) for m in (dB, dC))
        return dx, ddt, dA.sum((0, 1)), dB, dC, dD.sum((0, 1)), dinitial if ctx.needs_input_grad[6] else None, None


def strides(*tensors: Tensor) -> list[int]:
    """The first three strides of each: batch, length, head or group."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def ssd_launch(kernel: str, x: Tensor, n: int) -> Launch:
    return launch(f"{kernel}_fp32" if x.dtype == torch.float32 else kernel, n)


def chunk_rows(choice: Launch, l: int) -> int:
    return min(choice.rows, tile(l))


def sizes(x: Tensor, B: Tensor, choice: Launch, **changed: int) -> dict[str, Any]:
    """The arguments common to all kernels: sizes and tiles of the problem, warps, stages and registers of the launch."""
    l, h, p = x.shape[1:]
    g, n = B.shape[2:]
    tiles = {"Q": chunk_rows(choice, l), "TILE_P": tile(p), "TILE_N": tile(n), "DOT": dot_dtype(x.dtype)}
    compiled = {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "maxnreg": choice.max_registers}
    return {"H": h, "R": h // g, "P": p, "N": n} | compiled | tiles | changed


def walk_spans(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, span: int, spans: int, rows: int) -> tuple[Tensor, Tensor]:
    """What each of the first `spans` spans adds to the state, [spans, b, h, p, n], and its decay over the span, [spans, b, h]."""
    b, l, h, p = x.shape
    n = B.shape[3]
    added = torch.empty((spans, b, h, p, n), dtype=torch.float32, device=x.device)
    decays = torch.empty((spans, b, h), dtype=torch.float32, device=x.device)
    states_kernel[b * h, 1, spans](
        x, dt, A, B, added, added, added, decays, *strides(x, dt, B), l, span,
        HAS_INITIAL=False, HAS_STATES=False, REVERSE=False, **sizes(x, B, ssd_launch("ssd_states", x, n)._replace(rows=rows)),
    )  # fmt: skip
    return added, decays


def num_spans(num_walks: int, l: int) -> int:
    """Spans that `l` positions of each of `num_walks` rows and heads are cut into: 1 where the walks fill the GPU, or are short.

    Every position but those of the last span is read twice, and whole heads replace halves of them (`split_headdim`): a few spans do not
    make up for that.
    """
    spans = min(SPAN_GRID // num_walks, l // SPAN_POSITIONS)
    return spans if spans >= MIN_SPANS else 1


def split_headdim(num_programs: int, p: int) -> int:
    """The tile of headdim: half of it where whole heads would leave multiprocessors idle (prefill of one sequence)."""
    return tile(p) if num_programs >= FULL_GRID else max(16, tile(p) // 2)


def head_splits(num_programs: int, heads_per_group: int) -> int:
    """Programs that share the heads of a group: as few as fill the GPU, since each writes a partial sum of the gradients of B and C."""
    splits = 1
    while num_programs * splits < FULL_GRID and heads_per_group % (2 * splits) == 0:
        splits *= 2
    return splits


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
