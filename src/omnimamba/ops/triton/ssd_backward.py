"""The backward pass of the Mamba-2 scan (`ssd.py` has the forward pass): the gradients of what goes into it.

- `decays_kernel` makes the decays of every chunk, once: their logs are sums over at most q steps, taken as differences of one cumulative
  sum of the chunk. In fp32 that cancels, so the cumulative sum is fp64, and kept as two fp32 parts.
- `states_kernel` is the walk of the forward pass without the outputs. Forwards it writes the state that enters each chunk, backwards the
  gradient of the state that leaves it (the transposed recurrence: C and dy for B and dt x). Both exist only during a backward pass.
- With those, chunks are independent, but all tiles of a chunk are more than the registers hold. So `inputs_kernel`, one program per row,
  chunk and head, makes the gradient of x, and `weights_kernel`, one program per row, chunk and some heads of a group, sums the gradients of
  B and C over its heads in registers. The (q, q) matrices of both are [s, t], from position s to position t: as first factors of products
  they need not leave the registers.
- What else the two find is one number per position; `steps_kernel` makes the gradients of dt, A and D of it.
- On Hopper `ops/cuda/scan_states.cu` takes the place of `states_kernel`, and `scan_gradients.cu` that of the other two, where they fit.

Partial sums over heads, rows and chunks are added in a fixed order, not by atomics: gradients are the same in every run.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnimamba.ops.cuda import scan as hopper
from omnimamba.ops.triton.decode import softplus_slope
from omnimamba.ops.triton.launch import launch_for, tile
from omnimamba.ops.triton.ssd_tiles import (
    chunk_rows,
    first_state,
    head_splits,
    load_tile,
    next_state,
    operand,
    sizes,
    split_headdim,
    store_tile,
    strides,
)

LOG2E = tl.constexpr(1.4426950408889634)
TILE_HEADS = 16  # of the kernels whose tiles are positions of several heads
ROWS = 8  # that a program of `add_up_kernel` adds up


@triton.jit
def chunk_of(l, PARTS: tl.constexpr, Q: tl.constexpr):
    """What a program works on: the part (of PARTS) of a chunk, row and chunk as one number and as two, and the positions from there on.

    The parts of a chunk are neighbours: they read the same B and C."""
    num_c = tl.cdiv(l, Q)
    i_bc = (tl.program_id(0) // PARTS).to(tl.int64)
    i_c = i_bc % num_c
    return tl.program_id(0) % PARTS, i_bc, i_bc // num_c, i_c, l - i_c * Q


@triton.jit
def step_decays(p_decays, o_q, Q: tl.constexpr, IS_EXACT: tl.constexpr):
    """dt [q] and the decay from s to t, 0 for s > t: [s, t]. Half precision has fewer digits than the first part of the sums."""
    b_dt = tl.load(p_decays + o_q)
    high = tl.load(p_decays + Q + o_q)
    log = high[None, :] - high[:, None]
    if IS_EXACT:
        low = tl.load(p_decays + 2 * Q + o_q)
        log += low[None, :] - low[:, None]
    return b_dt, tl.exp2(tl.where(o_q[None, :] >= o_q[:, None], log, float("-inf")))


@triton.jit(do_not_specialize=["l"])
def decays_kernel(dt, A, decays, dt_b, dt_l, dt_h, l, H: tl.constexpr, Q: tl.constexpr, TILE_H: tl.constexpr):
    """decays: [b, chunks, h, 6, q] of dt (0 after the end), log2 of the decay from the chunk's start in two parts, that decay, the decay to
    the chunk's end, and that times dt."""
    i_part, i_bc, i_b, i_c, left = chunk_of(l, tl.cdiv(H, TILE_H), Q)
    o_q = tl.arange(0, Q)
    o_h = i_part * TILE_H + tl.arange(0, TILE_H)
    m_h = (o_h < H)[None, :]
    b_dt = tl.load(dt + i_b * dt_b + (i_c * Q + o_q)[:, None] * dt_l + o_h[None, :] * dt_h, mask=(o_q < left)[:, None] & m_h, other=0.0)
    b_step = (b_dt * tl.load(A + o_h, mask=o_h < H, other=0.0)[None, :]).to(tl.float64)
    b_sum = tl.cumsum(b_step, 0) * LOG2E
    high = b_sum.to(tl.float32)
    low = (b_sum - high.to(tl.float64)).to(tl.float32)
    to_end = tl.exp2((tl.sum(b_step, 0)[None, :] * LOG2E - b_sum).to(tl.float32))
    p_out = decays + (i_bc * H + o_h)[None, :] * (6 * Q) + o_q[:, None]
    tl.store(p_out, b_dt, mask=m_h)
    tl.store(p_out + Q, high, mask=m_h)
    tl.store(p_out + 2 * Q, low, mask=m_h)
    tl.store(p_out + 3 * Q, tl.exp2(high), mask=m_h)
    tl.store(p_out + 4 * Q, to_end, mask=m_h)
    tl.store(p_out + 5 * Q, b_dt * to_end, mask=m_h)


@triton.jit(do_not_specialize=["l"])
def states_kernel(
    x, decays, B, initial, states, final, x_b, x_l, x_h, B_b, B_l, B_g, l,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr,
    Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """states: [b, chunks, h, p, n] in x's dtype, that of the products they go into; final: [b, h, p, n], where the walk ends.

    REVERSE: x is dy, B is C, `initial` the gradient of the final state, `final` that of the initial one.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_q = tl.arange(0, Q)
    o_p = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    dtype: tl.constexpr = x.dtype.element_ty
    b_state = first_state(initial, i_bh, o_p, o_n, P, N, HAS_INITIAL)
    num_c = tl.cdiv(l, Q)
    p_x = x + i_b * x_b + i_h * x_h
    p_B = B + i_b * B_b + (i_h // R) * B_g
    for i in range(num_c):
        i_c = tl.cast(num_c - 1 - i if REVERSE else i, tl.int64)
        i_bch = (i_b * num_c + i_c) * H + i_h
        left = l - i_c * Q
        b_x = load_tile(p_x + i_c * Q * x_l, o_q, o_p, left, P, x_l).to(tl.float32)
        b_B = load_tile(p_B + i_c * Q * B_l, o_q, o_n, left, N, B_l).to(DOT)
        b_scale = tl.load(decays + i_bch * (6 * Q) + (3 if REVERSE else 5) * Q + o_q)
        store_tile(states + i_bch * P * N, b_state, o_p, o_n, P, N, N)
        decay = tl.load(decays + i_bch * (6 * Q) + 4 * Q - 1)
        b_state = next_state(b_state, b_x * b_scale[:, None], b_B, decay, dtype, DOT)
    store_tile(final + i_bh * P * N, b_state, o_p, o_n, P, N, N)


@triton.jit(do_not_specialize=["l"])
def inputs_kernel(
    x, B, C, D, dy, leaving, decays, dx, parts,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h, dx_b, dx_l, dx_h, l,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """leaving: [b, chunks, h, p, n]; parts: [b, chunks, h, 5 q + 2 max(q, p)], of which it writes the first 5 q."""
    i_h, i_bc, i_b, i_c, left = chunk_of(l, H, Q)
    o_q = tl.arange(0, Q)
    o_p = tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    dtype: tl.constexpr = x.dtype.element_ty
    PARTS: tl.constexpr = 5 * Q + 2 * (Q if Q > TILE_P else TILE_P)
    p_part = parts + (i_bc * H + i_h) * PARTS
    p_decays = decays + (i_bc * H + i_h) * (6 * Q)
    b_B = load_tile(B + i_b * B_b + i_c * Q * B_l + (i_h // R) * B_g, o_q, o_n, left, N, B_l).to(DOT)
    b_C = load_tile(C + i_b * C_b + i_c * Q * C_l + (i_h // R) * C_g, o_q, o_n, left, N, C_l).to(DOT)
    b_BC = tl.dot(b_B, tl.trans(b_C), input_precision="ieee")
    b_dt, b_decay = step_decays(p_decays, o_q, Q, dtype == tl.float32)
    to_end = tl.load(p_decays + 4 * Q + o_q)
    d = tl.load(D + i_h)
    b_x = load_tile(x + i_b * x_b + i_c * Q * x_l + i_h * x_h, o_q, o_p, left, P, x_l)
    b_dy = load_tile(dy + i_b * dy_b + i_c * Q * dy_l + i_h * dy_h, o_q, o_p, left, P, dy_l)
    b_leaving = load_tile(leaving + (i_bc * H + i_h) * P * N, o_p, o_n, P, N, N)

    # y = (C B^T * decay) (dt x), inside the chunk
    b_xdy = tl.dot(b_x.to(DOT), tl.trans(b_dy.to(DOT)), input_precision="ieee")
    b_dlog = b_xdy * b_decay * b_BC  # not yet times dt
    b_inside = tl.sum(b_dlog, 1)
    b_dd = tl.sum(tl.where(o_q[:, None] == o_q[None, :], b_xdy, 0.0), 1)
    # The decay of step k is in every segment across it: those with s < k <= t. Summed as they are, over t by a product with ones [t, k];
    # as the difference of the sums over t and over s the digits of dA cancel.
    b_later = o_q[:, None] >= o_q[None, :]
    if dtype == tl.bfloat16:
        b_across = tl.dot(operand(b_dlog, dtype, DOT), b_later.to(DOT), input_precision="ieee")
    else:  # fp16 could overflow
        b_across = tl.dot(b_dlog, b_later.to(tl.float32), input_precision="ieee" if dtype == tl.float32 else "tf32")
    b_dstep = tl.sum(tl.where(o_q[:, None] < o_q[None, :], b_across * b_dt[:, None], 0.0), 0)

    # the state that leaves = decay of the chunk * entering + (to_end * dt x)^T B
    b_dxdt = tl.dot(b_B, tl.trans(operand(b_leaving, dtype, DOT)), input_precision="ieee") * to_end[:, None]
    b_to_end = tl.sum(b_dxdt * b_x.to(tl.float32), 1)
    b_dxdt = tl.dot(operand(b_BC * b_decay, dtype, DOT), b_dy.to(DOT), b_dxdt, input_precision="ieee")
    b_dx = b_dxdt * b_dt[:, None] + b_dy.to(tl.float32) * d
    store_tile(dx + i_b * dx_b + i_c * Q * dx_l + i_h * dx_h, b_dx, o_q, o_p, left, P, dx_l)
    # four columns in one store: each store waits for all warps
    b_rows = tl.reshape(tl.join(tl.join(b_inside, b_to_end), tl.join(b_dd, b_dd)), (Q, 4))
    tl.store(p_part + o_q[:, None] * 4 + tl.arange(0, 4)[None, :], b_rows)
    tl.store(p_part + 4 * Q + o_q, b_dstep)


@triton.jit(do_not_specialize=["l"])
def weights_kernel(
    x, B, C, dy, entering, leaving, decays, parts, dB, dC,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h, dB_b, dB_l, dB_g, dC_b, dC_l, dC_g, l,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    Q: tl.constexpr, TILE_P: tl.constexpr, TILE_N: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """entering, leaving: [b, chunks, h, p, n]; dB, dC: [b, l, g * splits, n]; parts: those that `inputs_kernel` does not write."""
    i_part, i_bc, i_b, i_c, left = chunk_of(l, H // R * SPLITS, Q)
    i_g = i_part // SPLITS
    o_q = tl.arange(0, Q)
    o_p = tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    dtype: tl.constexpr = x.dtype.element_ty
    PARTS: tl.constexpr = 5 * Q + 2 * (Q if Q > TILE_P else TILE_P)
    b_B = load_tile(B + i_b * B_b + i_c * Q * B_l + i_g * B_g, o_q, o_n, left, N, B_l).to(DOT)
    b_C = load_tile(C + i_b * C_b + i_c * Q * C_l + i_g * C_g, o_q, o_n, left, N, C_l).to(DOT)
    b_dBC = tl.zeros((Q, Q), tl.float32)
    b_dB = tl.zeros((Q, TILE_N), tl.float32)
    b_dC = tl.zeros((Q, TILE_N), tl.float32)
    for i in range(R // SPLITS):
        i_h = i_part * (R // SPLITS) + i
        p_part = parts + (i_bc * H + i_h) * PARTS + 5 * Q
        p_decays = decays + (i_bc * H + i_h) * (6 * Q)
        b_dt, b_decay = step_decays(p_decays, o_q, Q, dtype == tl.float32)
        b_x = load_tile(x + i_b * x_b + i_c * Q * x_l + i_h * x_h, o_q, o_p, left, P, x_l)
        b_dy = load_tile(dy + i_b * dy_b + i_c * Q * dy_l + i_h * dy_h, o_q, o_p, left, P, dy_l)
        b_entering = operand(load_tile(entering + (i_bc * H + i_h) * P * N, o_p, o_n, P, N, N), dtype, DOT)
        b_leaving = operand(load_tile(leaving + (i_bc * H + i_h) * P * N, o_p, o_n, P, N, N), dtype, DOT)
        b_dBC += tl.dot(b_x.to(DOT), tl.trans(b_dy.to(DOT)), input_precision="ieee") * b_decay * b_dt[:, None]

        # y = from_start * C entering^T
        b_y = tl.dot(b_C, tl.trans(b_entering), input_precision="ieee")
        b_from_start = tl.sum(b_y * b_dy.to(tl.float32), 1) * tl.load(p_decays + 3 * Q + o_q)
        # the sum of entering * leaving: the diagonal of a product, whose factors need not be in registers
        b_through = tl.dot(b_entering, tl.trans(b_leaving), input_precision="ieee")
        b_through = tl.sum(tl.where(o_p[:, None] == o_p[None, :], b_through, 0.0), 1)
        if Q == TILE_P:
            tl.store(p_part + o_q[:, None] * 2 + tl.arange(0, 2)[None, :], tl.join(b_from_start, b_through))
        else:
            tl.store(p_part + o_q * 2, b_from_start)
            tl.store(p_part + o_p * 2 + 1, b_through)
        b_scaled = operand(b_dy.to(tl.float32) * tl.load(p_decays + 3 * Q + o_q)[:, None], dtype, DOT)
        b_dC = tl.dot(b_scaled, b_entering, b_dC, input_precision="ieee")
        b_scaled = operand(b_x.to(tl.float32) * tl.load(p_decays + 5 * Q + o_q)[:, None], dtype, DOT)
        b_dB = tl.dot(b_scaled, b_leaving, b_dB, input_precision="ieee")
    b_scaled = operand(b_dBC, dtype, DOT)
    b_dB = tl.dot(b_scaled, b_C, b_dB, input_precision="ieee")
    b_dC = tl.dot(tl.trans(b_scaled), b_B, b_dC, input_precision="ieee")
    store_tile(dB + i_b * dB_b + i_c * Q * dB_l + i_part * dB_g, b_dB, o_q, o_n, left, N, dB_l)
    store_tile(dC + i_b * dC_b + i_c * Q * dC_l + i_part * dC_g, b_dC, o_q, o_n, left, N, dC_l)


@triton.jit(do_not_specialize=["l"])
def steps_kernel(
    A, decays, parts, ddt, sums, ddt_b, ddt_l, l,
    H: tl.constexpr, Q: tl.constexpr, TILE_P: tl.constexpr, TILE_H: tl.constexpr, IS_SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """ddt: [b, l, h], dense in h; sums: [3, b, chunks, h], those of the gradients of A, D and ddt. IS_SOFTPLUS: see `scan_backward`."""
    i_part, i_bc, i_b, i_c, left = chunk_of(l, tl.cdiv(H, TILE_H), Q)
    o_q = tl.arange(0, Q)
    o_p = tl.arange(0, TILE_P)
    o_h = i_part * TILE_H + tl.arange(0, TILE_H)
    m_h = o_h < H
    PARTS: tl.constexpr = 5 * Q + 2 * (Q if Q > TILE_P else TILE_P)
    b_a = tl.load(A + o_h, mask=m_h, other=0.0)
    p_decays = decays + (i_bc * H + o_h) * (6 * Q)
    p_part = parts + (i_bc * H + o_h)[:, None] * PARTS
    b_dt = tl.load(p_decays[:, None] + o_q[None, :], mask=m_h[:, None], other=0.0)
    b_inside = tl.load(p_part + o_q[None, :] * 4, mask=m_h[:, None], other=0.0)
    b_dd = tl.load(p_part + o_q[None, :] * 4 + 1, mask=m_h[:, None], other=0.0)
    b_to_end = tl.load(p_part + o_q[None, :] * 4 + 2, mask=m_h[:, None], other=0.0)
    b_dstep = tl.load(p_part + 4 * Q + o_q[None, :], mask=m_h[:, None], other=0.0)
    b_from_start = tl.load(p_part + 5 * Q + o_q[None, :] * 2, mask=m_h[:, None], other=0.0)
    b_through = tl.load(p_part + 5 * Q + o_p[None, :] * 2 + 1, mask=m_h[:, None], other=0.0)
    # the chunk's decay is that of all its steps
    b_dstep += (tl.sum(b_through, 1) * tl.load(p_decays + 4 * Q - 1, mask=m_h, other=0.0))[:, None]
    b_dstep += tl.cumsum(b_from_start, 1, reverse=True)  # the steps up to a position
    b_dto_end = b_to_end * b_dt
    b_dstep += tl.cumsum(b_dto_end, 1) - b_dto_end  # the steps after a position
    b_ddt = b_inside + b_to_end + b_dstep * b_a[:, None]
    if IS_SOFTPLUS:
        b_ddt *= softplus_slope(b_dt)
    p_ddt = ddt + i_b * ddt_b + (i_c * Q + o_q)[None, :] * ddt_l + o_h[:, None]
    m_ddt = m_h[:, None] & (o_q < left)[None, :]
    tl.store(p_ddt, b_ddt.to(ddt.dtype.element_ty), mask=m_ddt)
    p_sums = sums + i_bc * H + o_h
    sums_size = tl.num_programs(0) // tl.cdiv(H, TILE_H) * H
    tl.store(p_sums, tl.sum(b_dstep * b_dt, 1), mask=m_h)
    tl.store(p_sums + sums_size, tl.sum(b_dd, 1), mask=m_h)
    tl.store(p_sums + 2 * sums_size, tl.sum(tl.where(m_ddt, b_ddt, 0.0), 1), mask=m_h)


@triton.jit(do_not_specialize=["l", "rows"])
def add_up_kernel(
    partial, dB, dC, dB_b, dB_l, dB_g, dC_b, dC_l, dC_g, l, rows,
    G: tl.constexpr, SPLITS: tl.constexpr, N: tl.constexpr, TILE_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of B, or of C, of ROWS rows and groups. partial: [2, rows, splits, n]; rows: b * l * g."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = tl.arange(0, TILE_N)
    mask = (o_row < rows)[:, None] & (o_n < N)[None, :]
    p_part = partial + ((tl.program_id(1) * rows.to(tl.int64) + o_row) * (SPLITS * N))[:, None] + o_n[None, :]
    b_sum = tl.zeros((ROWS, TILE_N), tl.float32)
    for i in range(SPLITS):
        b_sum += tl.load(p_part + i * N, mask=mask, other=0.0)
    i_b, i_l, i_g = o_row // G // l, o_row // G % l, o_row % G
    if tl.program_id(1) == 0:
        p_out = dB + (i_b * dB_b + i_l * dB_l + i_g * dB_g)[:, None] + o_n[None, :]
        tl.store(p_out, b_sum.to(dB.dtype.element_ty), mask=mask)
    else:
        p_out = dC + (i_b * dC_b + i_l * dC_l + i_g * dC_g)[:, None] + o_n[None, :]
        tl.store(p_out, b_sum.to(dC.dtype.element_ty), mask=mask)


def scan_backward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None, dy: Tensor, dfinal: Tensor | None,
    dx: Tensor, ddt: Tensor, dB: Tensor, dC: Tensor, *, is_softplus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What adds up to the gradients of A, D and, as a sum, ddt, [3, b, chunks, h], and the gradient of the initial state. Those of x, dt,
    B and C go to dx, ddt, dB and dC. All of these dense in their last axis.

    is_softplus: dt is a softplus, or 0 in padding, and ddt the gradient of its argument.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    is_for_hopper = hopper.fits(x, B, C, dy, dx, dB, dC)
    choice = launch_for(x, "ssd_backward", n)
    q = hopper.CHUNK if is_for_hopper else chunk_rows(choice, l)
    num_c = triton.cdiv(l, q)
    of_heads = {"H": h, "Q": q, "TILE_H": min(TILE_HEADS, triton.next_power_of_2(h)), "num_warps": 4}
    grid_heads = (triton.cdiv(h, of_heads["TILE_H"]) * b * num_c,)
    decays = torch.empty((b, num_c, h, 6, q), dtype=torch.float32, device=x.device)
    decays_kernel[grid_heads](dt, A, decays, *strides(dt), l, **of_heads)
    states = torch.empty((2, b, num_c, h, p, n), dtype=x.dtype, device=x.device)
    dinitial = torch.empty((b, h, p, n), dtype=torch.float32, device=x.device)
    walk = hopper.scan_states if is_for_hopper else walk_states
    walk(x, dy, B, C, decays, initial, dfinal, *states, dinitial)
    parts = torch.empty((b, num_c, h, 5 * q + 2 * max(q, tile(p))), dtype=torch.float32, device=x.device)
    splits = head_splits(b * num_c * g, h // g)
    partial = None if splits == 1 else torch.empty((2, b, l, g * splits, n), dtype=torch.float32, device=x.device)
    differentiate = hopper.scan_gradients if is_for_hopper else differentiate_chunks
    differentiate(x, dy, B, C, D, decays, *states, dx, dB, dC, partial, parts)
    if partial is not None:
        rows = b * l * g
        add_up_kernel[triton.cdiv(rows, ROWS), 2](
            partial, dB, dC, *strides(dB, dC), l, rows, G=g, SPLITS=splits, N=n, TILE_N=triton.next_power_of_2(n), ROWS=ROWS, num_warps=4
        )
    sums = torch.empty((3, b, num_c, h), dtype=torch.float32, device=x.device)
    steps_kernel[grid_heads](A, decays, parts, ddt, sums, *ddt.stride()[:2], l, TILE_P=tile(p), IS_SOFTPLUS=is_softplus, **of_heads)
    return sums, dinitial


def walk_states(
    x: Tensor, dy: Tensor, B: Tensor, C: Tensor, decays: Tensor, initial: Tensor | None, dfinal: Tensor | None,
    entering: Tensor, leaving: Tensor, dinitial: Tensor,
) -> None:  # fmt: skip
    """Fills the states that enter chunks, the gradients of those that leave them, [b, chunks, h, p, n], and dinitial [b, h, p, n]."""
    b, l, h, p = x.shape
    choice = launch_for(x, "ssd_backward_states", B.shape[3])._replace(rows=decays.shape[4])
    tile_p = split_headdim(b * h, p)
    last = torch.empty_like(dinitial)
    for inputs, first, states, end, is_reverse in ((x, initial, entering, last, False), (dy, dfinal, leaving, dinitial, True)):
        weights = C if is_reverse else B
        states_kernel[b * h, triton.cdiv(p, tile_p)](
            inputs, decays, weights, end if first is None else first, states, end, *strides(inputs, weights), l,
            HAS_INITIAL=first is not None, REVERSE=is_reverse, **sizes(x, B, choice, TILE_P=tile_p),
        )  # fmt: skip


def differentiate_chunks(
    x: Tensor, dy: Tensor, B: Tensor, C: Tensor, D: Tensor, decays: Tensor, entering: Tensor, leaving: Tensor,
    dx: Tensor, dB: Tensor, dC: Tensor, partial: Tensor | None, parts: Tensor,
) -> None:  # fmt: skip
    """Fills dx, parts, and partial [2, b, l, g * splits, n] or, if that is None, dB and dC."""
    b, num_c, h, _, q = decays.shape
    l, (g, n) = x.shape[1], B.shape[2:]
    choice = launch_for(x, "ssd_backward", n)
    inputs_kernel[(b * num_c * h,)](x, B, C, D, dy, leaving, decays, dx, parts, *strides(x, B, C, dy, dx), l, **sizes(x, B, choice))
    part_B, part_C = (dB, dC) if partial is None else partial
    splits = part_B.shape[2] // g
    weights_kernel[(b * num_c * g * splits,)](
        x, B, C, dy, entering, leaving, decays, parts, part_B, part_C, *strides(x, B, C, dy, part_B, part_C), l,
        SPLITS=splits, **sizes(x, B, launch_for(x, "ssd_backward_weights", n)._replace(rows=q)),
    )  # fmt: skip
