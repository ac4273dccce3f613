"""Causal depthwise convolution with bias and SiLU, forward and backward; the definition is `omnimamba.ops.conv`.

Forwards a program computes a few positions of a tile of channels, from inputs that it all loads first: each once, w - 1 of them also read
by its neighbour. Backwards it walks over a span of positions with the newest inputs and gradients in registers: it computes the
convolution again instead of storing it, passes dy through the SiLU, and finishes an input's gradient when the last output that read it
has come by. The gradients of the weight are one partial sum per program, so that they do not depend on the order of programs. Sums are
fp32.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.conv import MAX_WIDTH
from omnimamba.ops.triton.decode import sigmoid, silu
from omnimamba.ops.triton.launch import launch

UNROLL = tl.constexpr(4)


@triton.jit
def load_tap(weight, tap, o_c, C: tl.constexpr):
    """weight: [w, c] in x's dtype, as in the definition; taps before the first are 0."""
    return tl.load(weight + tap * C + o_c, mask=(o_c < C) & (tap >= 0), other=0.0).to(tl.float32)


@triton.jit
def load_past(past, o_c, m_c, back, past_c, past_w, W: tl.constexpr, HAS_PAST: tl.constexpr):
    """The input `back` positions before the sequence: [columns]."""
    if HAS_PAST:
        return tl.load(past + o_c * past_c + (W - back) * past_w, mask=m_c & (back <= W), other=0.0).to(tl.float32)
    return tl.zeros((o_c.shape[0],), tl.float32)


@triton.jit
def load_row(p_first, o_c, m_c, t, l, stride_l):
    """Position t of a sequence, 0 outside of it: [columns]."""
    return tl.load(p_first + tl.cast(t, tl.int64) * stride_l + o_c, mask=m_c & (t >= 0) & (t < l), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["l"])
def forward_kernel(
    x, weight, bias, past, y, stride_b, stride_l, past_b, past_c, past_w, l,
    C: tl.constexpr, W: tl.constexpr, HAS_PAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    num_t = tl.cdiv(l, ROWS)
    i_b = (tl.program_id(0) // num_t).to(tl.int64)
    first = (tl.program_id(0) % num_t) * ROWS
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < C
    inputs, taps = (), ()
    for i in tl.static_range(ROWS + W - 1):
        inputs += (load_row(x + i_b * stride_b, o_c, m_c, first + i - (W - 1), l, stride_l),)
    for tap in tl.static_range(W):
        taps += (load_tap(weight, tap, o_c, C),)
    b_bias = load_tap(bias, 0, o_c, C)
    for i in tl.static_range(ROWS):
        total = b_bias
        for tap in tl.static_range(W):
            total += inputs[i + tap] * taps[tap]
        if HAS_PAST and i < W - 1:
            if first == 0:  # the first outputs also read what came before the sequence
                for tap in tl.static_range(W - 1 - i):
                    total += load_past(past + i_b * past_b, o_c, m_c, W - 1 - i - tap, past_c, past_w, W, HAS_PAST) * taps[tap]
        b_y = silu(total)
        tl.store(y + (i_b * l + first + i) * C + o_c, b_y.to(y.dtype.element_ty), mask=m_c & (first + i < l))


@triton.jit(do_not_specialize=["l"])
def backward_kernel(
    x, weight, bias, past, dy, dx, partial, stride_b, stride_l, past_b, past_c, past_w, dy_b, dy_l, dx_b, dx_l, l,
    C: tl.constexpr, W: tl.constexpr, HAS_PAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SUMS: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    """dx: [b, l, c]; partial: [programs, SUMS, c], the sums of MAX_WIDTH taps, 0 where there are fewer, and of the bias, if it LEARNS."""
    num_spans = tl.cdiv(l, ROWS)
    i_bs = tl.program_id(0).to(tl.int64)
    i_b = i_bs // num_spans
    first = (tl.program_id(0) % num_spans) * ROWS
    stop = tl.minimum(first + ROWS, l)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < C
    dtype: tl.constexpr = dx.dtype.element_ty
    p_x = x + i_b * stride_b
    p_dy = dy + i_b * dy_b
    p_past = past + i_b * past_b
    w3 = load_tap(weight, W - 1, o_c, C)
    w2 = load_tap(weight, W - 2, o_c, C)
    w1 = load_tap(weight, W - 3, o_c, C)
    w0 = load_tap(weight, W - 4, o_c, C)
    b_bias = load_tap(bias, 0, o_c, C)
    x1 = load_row(p_x, o_c, m_c, first - 1, l, stride_l)
    x2 = load_row(p_x, o_c, m_c, first - 2, l, stride_l)
    x3 = load_row(p_x, o_c, m_c, first - 3, l, stride_l)
    if first == 0:
        x1 += load_past(p_past, o_c, m_c, 1, past_c, past_w, W, HAS_PAST)
        x2 += load_past(p_past, o_c, m_c, 2, past_c, past_w, W, HAS_PAST)
        x3 += load_past(p_past, o_c, m_c, 3, past_c, past_w, W, HAS_PAST)
    # each a value of its own: of names for one value, the compiler does not see that a loop which passes them on changes them
    d1, d2, d3 = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    sum0, sum1, sum2, sum3, sum_bias = d1, d1, d1, d1, d1
    for t in tl.range(first, stop + 3, loop_unroll_factor=UNROLL):
        x0 = load_row(p_x, o_c, m_c, t, l, stride_l)
        b_dy = load_row(p_dy, o_c, m_c, t, l, dy_l)
        total = b_bias + w3 * x0 + w2 * x1 + w1 * x2 + w0 * x3
        gate = sigmoid(total)
        d0 = b_dy * gate * (1 + total * (1 - gate))  # the gradient before the SiLU
        if LEARNS:
            own = tl.where(t < stop, d0, 0.0)
            sum3 += own * x0
            sum2 += own * x1
            sum1 += own * x2
            sum0 += own * x3
            sum_bias += own
        b_dx = d3 * w3 + d2 * w2 + d1 * w1 + d0 * w0  # input t - 3 has a part in the outputs t - 3 to t
        tl.store(dx + i_b * dx_b + tl.cast(t - 3, tl.int64) * dx_l + o_c, b_dx.to(dtype), mask=m_c & (t - 3 >= first))
        x3, x2, x1 = x2, x1, x0
        d3, d2, d1 = d2, d1, d0
    if LEARNS:
        p_partial = partial + i_bs * SUMS * C + o_c
        tl.store(p_partial, sum0, mask=m_c)
        tl.store(p_partial + C, sum1, mask=m_c)
        tl.store(p_partial + 2 * C, sum2, mask=m_c)
        tl.store(p_partial + 3 * C, sum3, mask=m_c)
        tl.store(p_partial + 4 * C, sum_bias, mask=m_c)


def conv_forward(x: Tensor, taps: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """silu(conv(x) + bias) [b, l, c]. x: [b, l, c], dense in c; taps: [w, c]; bias: [c]; past: [b, c, w], all in x's dtype."""
    b, l, c = x.shape
    y = torch.empty((b, l, c), dtype=x.dtype, device=x.device)
    state, *state_strides = past_arguments(x, past)
    choice = launch("conv_forward", c)
    forward_kernel[b * triton.cdiv(l, choice.rows), triton.cdiv(c, choice.columns)](
        x, taps, bias, state, y, *x.stride()[:2], *state_strides, l,
        C=c, W=taps.shape[0], HAS_PAST=past is not None, ROWS=choice.rows, COLUMNS=choice.columns,
        num_warps=choice.num_warps, num_stages=choice.num_stages,
    )  # fmt: skip
    return y


def conv_backward(
    x: Tensor, taps: Tensor, bias: Tensor, past: Tensor | None, dy: Tensor, dx: Tensor, *, learns_weights: bool = True
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The gradients of taps [w, c] and bias [c] in fp32, if asked for; that of x goes to `dx`. dy, dx: [b, l, c], dense in c; the rest as
    before."""
    b, l, c = x.shape
    w = taps.shape[0]
    state, *state_strides = past_arguments(x, past)
    choice = launch("conv_backward" if learns_weights else "conv_backward_frozen", c)
    programs = b * triton.cdiv(l, choice.rows)
    partial = torch.empty((programs if learns_weights else 0, MAX_WIDTH + 1, c), dtype=torch.float32, device=x.device)
    backward_kernel[programs, triton.cdiv(c, choice.columns)](
        x, taps, bias, state, dy, dx, partial, *x.stride()[:2], *state_strides, *dy.stride()[:2], *dx.stride()[:2], l,
        C=c, W=w, HAS_PAST=past is not None, ROWS=choice.rows, COLUMNS=choice.columns, SUMS=MAX_WIDTH + 1, LEARNS=learns_weights,
        num_warps=choice.num_warps, num_stages=choice.num_stages,
    )  # fmt: skip
    if not learns_weights:
        return None, None
    sums = partial.sum(0)
    return sums[MAX_WIDTH - w : MAX_WIDTH], sums[MAX_WIDTH]


class CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None) -> Tensor:
        x = x if x.stride(2) == 1 else x.contiguous()
        taps, rounded_bias = weight.to(x.dtype).T.contiguous(), bias.to(x.dtype)
        ctx.save_for_backward(x, taps, rounded_bias, past)
        ctx.dtypes = weight.dtype, bias.dtype
        return conv_forward(x, taps, rounded_bias, past)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, taps, bias, past = ctx.saved_tensors
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dtaps, dbias = conv_backward(x, taps, bias, past, dy, dx)
        dpast = past_gradient(x, taps, bias, past, dy) if ctx.needs_input_grad[3] else None
        assert dtaps is not None and dbias is not None
        weight_dtype, bias_dtype = ctx.dtypes
        return dx, dtaps.T.to(weight_dtype).contiguous(), dbias.to(bias_dtype), dpast


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
