"""Causal depthwise convolution with bias and SiLU, forward and backward; the definition is `omnimamba.ops.conv`.

One program computes a tile of positions x channels. It reads the tile once per tap, the overlaps coming from the cache. The backward pass
has two kernels: one computes the convolution again instead of storing it and passes dy through the SiLU, the other is the convolution
the other way round. The weight's gradient is one partial sum per program, which walks over some tiles of a row, so that the result does
not depend on the order of programs. Sums are fp32, and by the launch table each thread has channels of its own: none crosses threads.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.triton.launch import CONV_TILES, launch


@triton.jit
def load_inputs(p_tile, p_past, first, o_r, o_c, l, stride_l, past_c, past_w, C: tl.constexpr, W: tl.constexpr, HAS_PAST: tl.constexpr):
    """Inputs at positions first + o_r; those before the sequence come from the conv state. p_tile points at the input `first`."""
    o_t = first + o_r
    m_c = (o_c < C)[None, :]
    x = tl.load(p_tile + o_r[:, None] * stride_l + o_c[None, :], mask=((o_t >= 0) & (o_t < l))[:, None] & m_c, other=0.0).to(tl.float32)
    if HAS_PAST:
        if first == 0:
            m_past = ((o_t < 0) & (o_t >= -W))[:, None] & m_c
            x += tl.load(p_past + o_c[None, :] * past_c + (W + o_t)[:, None] * past_w, mask=m_past, other=0.0).to(tl.float32)
    return x


@triton.jit
def load_tap(weight, tap, o_c, C: tl.constexpr):
    """weight: [w, c] in x's dtype, as in the definition."""
    return tl.load(weight + tap * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["l"])
def forward_kernel(
    x, weight, bias, past, y, stride_b, stride_l, past_b, past_c, past_w, l,
    C: tl.constexpr, W: tl.constexpr, HAS_PAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_t = tl.cdiv(l, ROWS)
    i_b = (tl.program_id(0) // num_t).to(tl.int64)
    first = (tl.program_id(0) % num_t) * ROWS
    o_r = tl.arange(0, ROWS)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = x.dtype.element_ty
    p_tile = x + i_b * stride_b + first.to(tl.int64) * stride_l
    p_past = past + i_b * past_b
    total = tl.zeros((ROWS, COLUMNS), tl.float32) + load_tap(bias, 0, o_c, C)
    for tap in tl.static_range(W):
        inputs = load_inputs(p_tile, p_past, first, o_r + (tap - (W - 1)), o_c, l, stride_l, past_c, past_w, C, W, HAS_PAST)
        total += inputs * load_tap(weight, tap, o_c, C)
    b_y = total * tl.sigmoid(total)
    p_y = y + (i_b * l + first) * C + o_r[:, None] * C + o_c[None, :]
    tl.store(p_y, b_y.to(dtype), mask=(first + o_r < l)[:, None] & (o_c < C)[None, :])


@triton.jit(do_not_specialize=["l"])
def activation_backward_kernel(
    x, weight, bias, past, dy, dtotal, partial, stride_b, stride_l, past_b, past_c, past_w, dy_b, dy_l, l,
    C: tl.constexpr, W: tl.constexpr, HAS_PAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """dtotal: [b, l, c], the gradient before the SiLU; partial: [programs, SUMS, c], the sums of w taps and the bias.

    TILES: of a program, one after the other.
    """
    num_programs = tl.cdiv(l, ROWS * TILES)
    i_bt = tl.program_id(0).to(tl.int64)
    i_b = i_bt // num_programs
    o_r = tl.arange(0, ROWS)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    o_sum = tl.arange(0, SUMS)
    m_c = o_c < C
    dtype: tl.constexpr = x.dtype.element_ty
    p_past = past + i_b * past_b
    sums = tl.zeros((SUMS, COLUMNS), tl.float32)
    start = (tl.program_id(0) % num_programs) * (ROWS * TILES)
    for first in range(start, tl.minimum(start + ROWS * TILES, l), ROWS):
        mask = (first + o_r < l)[:, None] & m_c[None, :]
        p_tile = x + i_b * stride_b + tl.cast(first, tl.int64) * stride_l
        total = tl.zeros((ROWS, COLUMNS), tl.float32) + load_tap(bias, 0, o_c, C)
        for tap in tl.static_range(W):
            inputs = load_inputs(p_tile, p_past, first, o_r + (tap - (W - 1)), o_c, l, stride_l, past_c, past_w, C, W, HAS_PAST)
            total += inputs * load_tap(weight, tap, o_c, C)
        p_dy = dy + i_b * dy_b + tl.cast(first, tl.int64) * dy_l + o_r[:, None] * dy_l + o_c[None, :]
        gate = tl.sigmoid(total)
        b_dtotal = tl.load(p_dy, mask=mask, other=0.0).to(tl.float32) * gate * (1 + total * (1 - gate))
        for tap in tl.static_range(W):
            inputs = load_inputs(p_tile, p_past, first, o_r + (tap - (W - 1)), o_c, l, stride_l, past_c, past_w, C, W, HAS_PAST)
            sums += tl.where(o_sum[:, None] == tap, tl.sum(b_dtotal * inputs, 0)[None, :], 0.0)
        sums += tl.where(o_sum[:, None] == W, tl.sum(b_dtotal, 0)[None, :], 0.0)
        tl.store(dtotal + (i_b * l + first) * C + o_r[:, None] * C + o_c[None, :], b_dtotal.to(dtype), mask=mask)
    tl.store(partial + i_bt * SUMS * C + o_sum[:, None] * C + o_c[None, :], sums, mask=(o_sum <= W)[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["l"])
def backward_kernel(
    dtotal, weight, dx, l,
    C: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_t = tl.cdiv(l, ROWS)
    i_b = (tl.program_id(0) // num_t).to(tl.int64)
    o_t = (tl.program_id(0) % num_t) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype: tl.constexpr = dx.dtype.element_ty
    p_dtotal = dtotal + i_b * l * C + o_c[None, :]
    b_dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tap in tl.static_range(W):  # input t has a part in the outputs t to t + w - 1
        o_out = o_t + (W - 1 - tap)
        b_dtotal = tl.load(p_dtotal + o_out[:, None] * C, mask=(o_out < l)[:, None] & (o_c < C)[None, :], other=0.0).to(tl.float32)
        b_dx += b_dtotal * load_tap(weight, tap, o_c, C)
    tl.store(dx + i_b * l * C + o_t[:, None] * C + o_c[None, :], b_dx.to(dtype), mask=(o_t < l)[:, None] & (o_c < C)[None, :])


class CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None) -> Tensor:
        b, l, c = x.shape
        w = weight.shape[1]
        x = x if x.stride(2) == 1 else x.contiguous()
        taps, rounded_bias = weight.to(x.dtype).T.contiguous(), bias.to(x.dtype)
        y = torch.empty((b, l, c), dtype=x.dtype, device=x.device)
        state, *state_strides = past_arguments(x, past)
        choice = launch("conv_forward", c)
        forward_kernel[b * triton.cdiv(l, choice.rows), triton.cdiv(c, choice.columns)](
            x, taps, rounded_bias, state, y, *x.stride()[:2], *state_strides, l,
            C=c, W=w, HAS_PAST=past is not None, ROWS=choice.rows, COLUMNS=choice.columns,
            num_warps=choice.num_warps, num_stages=choice.num_stages,
        )  # fmt: skip
        ctx.save_for_backward(x, taps, rounded_bias, past)
        ctx.dtypes = weight.dtype, bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, taps, bias, past = ctx.saved_tensors
        b, l, c = x.shape
        w = taps.shape[0]
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        state, *state_strides = past_arguments(x, past)
        choice = launch("conv_backward", c)
        columns = triton.cdiv(c, choice.columns)
        common = {"C": c, "W": w, "ROWS": choice.rows, "COLUMNS": choice.columns}
        common |= {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
        dtotal, dx = torch.empty((2, b, l, c), dtype=x.dtype, device=x.device)
        programs = b * triton.cdiv(l, choice.rows * CONV_TILES)
        partial = torch.empty((programs, triton.next_power_of_2(w + 1), c), dtype=torch.float32, device=x.device)
        activation_backward_kernel[programs, columns](
            x, taps, bias, state, dy, dtotal, partial, *x.stride()[:2], *state_strides, *dy.stride()[:2], l,
            HAS_PAST=past is not None, TILES=CONV_TILES, SUMS=partial.shape[1], **common,
        )  # fmt: skip
        backward_kernel[b * triton.cdiv(l, choice.rows), columns](dtotal, taps, dx, l, **common)
        sums = partial[:, : w + 1].sum(0)
        dpast = past_gradient(x, taps, bias, past, dy) if ctx.needs_input_grad[3] else None
        weight_dtype, bias_dtype = ctx.dtypes
        return dx, sums[:w].T.to(weight_dtype).contiguous(), sums[w].to(bias_dtype), dpast


def past_arguments(x: Tensor, past: Tensor | None) -> tuple[Tensor, int, int, int]:
    """The conv state and its strides; where there is none the kernel never reads the pointer."""
    return (x, 0, 0, 0) if past is None else (past, past.stride(0), past.stride(1), past.stride(2))


def past_gradient(x: Tensor, taps: Tensor, bias: Tensor, past: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the conv state. It reaches w - 1 outputs at most, so plain PyTorch computes it."""
    w = taps.shape[0]
    few = min(w - 1, x.shape[1])
    taps, bias = taps.float(), bias.float()
    inputs = torch.cat([past.to(x.dtype).transpose(1, 2), x[:, :few]], 1).float()  # input t sits at row w + t
    total = bias + sum(inputs[:, tap + 1 : tap + 1 + few] * taps[tap] for tap in range(w))
    gate = total.sigmoid()
    dtotal = dy[:, :few].float() * gate * (1 + total * (1 - gate))
    dinputs = torch.zeros_like(inputs)
    for tap in range(w):
        dinputs[:, tap + 1 : tap + 1 + few] += dtotal * taps[tap]
    return dinputs[:, :w].transpose(1, 2).to(past.dtype)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, initial_state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`omnimamba.ops.causal_conv1d` for an x of at least one position."""
    past = None if initial_state is None else initial_state.to(x.dtype)
    with torch.cuda.device_of(x):
        y = CausalConv1d.apply(x, weight, bias, past)
    return y, last_inputs(x, past, weight.shape[1], lengths)


def last_inputs(x: Tensor, past: Tensor | None, w: int, lengths: Tensor | None) -> Tensor:
    """The conv state [b, c, w] after each row's last valid input."""
    b, l, c = x.shape
    if lengths is None and l >= w:
        return x[:, l - w :].transpose(1, 2)
    if past is None:
        past = x.new_zeros(b, c, w)
    if lengths is None:
        return torch.cat([past[:, :, l:], x.transpose(1, 2)], 2)
    rows = lengths[:, None] + torch.arange(-w, 0, device=x.device)  # input t, those before the sequence negative
    from_x = x.gather(1, rows.clamp(min=0)[:, :, None].expand(b, w, c)).transpose(1, 2)
    from_past = past.gather(2, (rows + w).clamp(max=w - 1)[:, None].expand(b, c, w))
    return torch.where(rows[:, None] >= 0, from_x, from_past)
