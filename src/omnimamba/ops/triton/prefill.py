"""Kernels of reading a prompt; the definitions are in `omnimamba.ops.prefill`."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnimamba.ops.norm import Squares, output_dtype
from omnimamba.ops.triton.conv import conv_forward
from omnimamba.ops.triton.decode import log1p, reciprocal_rms
from omnimamba.ops.triton.launch import launch
from omnimamba.ops.triton.ssd import Gate, scan_forward


@triton.jit
def add_norm_kernel(
    residual, addend, squares, weight, total, out, out_row, eps,
    D: tl.constexpr, COLUMNS: tl.constexpr, HAS_ADDEND: tl.constexpr, NUM_SQUARES: tl.constexpr, TILE_S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """total: [rows, d], the residual stream with the addend, which may be the residual; NUM_SQUARES: sums of squares of the K numbers by
    whose root mean square the addend has yet to be divided."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, COLUMNS)
    m_d = o_d < D
    b_x = tl.load(residual + i_row * D + o_d, mask=m_d, other=0.0)
    if HAS_ADDEND:
        b_added = tl.load(addend + i_row * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        if NUM_SQUARES:
            b_added *= reciprocal_rms(squares + i_row * NUM_SQUARES, eps, NUM_SQUARES, TILE_S, K)
        b_x += b_added
        tl.store(total + i_row * D + o_d, b_x, mask=m_d)
    b_out = b_x * (1 / tl.sqrt(tl.sum(b_x * b_x, 0) / D + eps)) * tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(out + i_row * out_row + o_d, b_out.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def step_sizes(p_dt, dt_bias, p_out, first, length, l, dt_l, H: tl.constexpr, ROWS: tl.constexpr, TILE_H: tl.constexpr):
    """softplus(dt + dt_bias) of ROWS positions from `first` on, 0 from `length` on."""
    o_t = first + tl.arange(0, ROWS)
    o_h = tl.arange(0, TILE_H)
    mask = (o_t < l)[:, None] & (o_h < H)[None, :]
    b_dt = tl.load(p_dt + o_t.to(tl.int64)[:, None] * dt_l + o_h[None, :], mask=mask, other=0.0).to(tl.float32)
    b_dt += tl.load(dt_bias + o_h, mask=o_h < H, other=0.0)[None, :]
    b_dt = tl.where(b_dt > 20, b_dt, log1p(tl.exp(tl.minimum(b_dt, 20.0))))
    tl.store(p_out + o_t.to(tl.int64)[:, None] * H + o_h[None, :], tl.where((o_t < length)[:, None], b_dt, 0.0), mask=mask)


@triton.jit
def last_inputs(
    p_x, p_state, first, length, x_l, state_c, state_w,
    C: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """The conv state of COLUMNS channels from `first` on after `length` inputs, in place."""
    o_c = first + tl.arange(0, COLUMNS)
    o_w = tl.arange(0, TAPS)
    o_t = length - W + o_w  # those before the sequence are in the conv state, W positions further
    mask = (o_c < C)[:, None] & (o_w < W)[None, :]
    p_state += o_c[:, None] * state_c
    past = tl.load(p_state + (o_t + W)[None, :] * state_w, mask=mask & (o_t < 0)[None, :], other=0.0)
    new = tl.load(p_x + o_t.to(tl.int64)[None, :] * x_l + o_c[:, None], mask=mask & (o_t >= 0)[None, :], other=0.0)
    tl.debug_barrier()  # all reads of the state come before the first write
    tl.store(p_state + o_w[None, :] * state_w, tl.where((o_t >= 0)[None, :], new.to(past.dtype), past), mask=mask)


@triton.jit(do_not_specialize=["l"])
def ends_kernel(
    x, state, dt, dt_bias, out, lengths, x_b, x_l, state_b, state_c, state_w, dt_b, dt_l, l,
    C: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE_H: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Of each row of the batch, the first programs compute step sizes, the others the conv state."""
    num_t = tl.cdiv(l, ROWS)
    i = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    if HAS_LENGTHS:
        length = tl.load(lengths + i_b).to(tl.int32)
    else:
        length = l
    if i < num_t:
        step_sizes(dt + i_b * dt_b, dt_bias, out + i_b * l * H, i * ROWS, length, l, dt_l, H, ROWS, TILE_H)
    else:
        last_inputs(x + i_b * x_b, state + i_b * state_b, (i - num_t) * COLUMNS, length, x_l, state_c, state_w, C, W, COLUMNS, TAPS)


def positive_steps(dt: Tensor, dt_bias: Tensor, lengths: Tensor | None) -> Tensor:
    """softplus(dt + dt_bias) [b, l, h] in fp32, 0 in padding. dt: [b, l, h], dense in h; dt_bias: [h] fp32; lengths: [b]."""
    b, l, h = dt.shape
    choice = launch("prefill_ends", h)
    sizes = torch.empty((b, l, h), dtype=torch.float32, device=dt.device)
    ends_kernel[triton.cdiv(l, choice.rows), b](
        dt, dt, dt, dt_bias, sizes, sizes if lengths is None else lengths, 0, 0, 0, 0, 0, *dt.stride()[:2], l,
        C=1, W=1, H=h, HAS_LENGTHS=lengths is not None, ROWS=choice.rows, COLUMNS=choice.columns,
        TILE_H=triton.next_power_of_2(h), TAPS=1, num_warps=choice.num_warps, num_stages=choice.num_stages,
    )  # fmt: skip
    return sizes


def scan_inputs(
    xBC: Tensor, dt: Tensor, *, weight: Tensor, bias: Tensor, dt_bias: Tensor, conv_state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, l, c = xBC.shape
    h = dt.shape[2]
    xBC, dt = (m if m.stride(2) == 1 else m.contiguous() for m in (xBC, dt))
    choice = launch("prefill_ends", c)
    sizes = torch.empty((b, l, h), dtype=torch.float32, device=dt.device)
    with torch.cuda.device_of(xBC):
        y = conv_forward(xBC, weight.to(xBC.dtype).T.contiguous(), bias.to(xBC.dtype), conv_state.to(xBC.dtype))
        ends_kernel[triton.cdiv(l, choice.rows) + triton.cdiv(c, choice.columns), b](
            xBC, conv_state, dt, dt_bias, sizes, sizes if lengths is None else lengths, *xBC.stride()[:2], *conv_state.stride(),
            *dt.stride()[:2], l,
            C=c, W=weight.shape[1], H=h, HAS_LENGTHS=lengths is not None, ROWS=choice.rows, COLUMNS=choice.columns,
            TILE_H=triton.next_power_of_2(h), TAPS=triton.next_power_of_2(weight.shape[1]),
            num_warps=choice.num_warps, num_stages=choice.num_stages,
        )  # fmt: skip
    return y, sizes


def gated_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, z: Tensor, norm_weight: Tensor, initial_state: Tensor
) -> tuple[Tensor, Squares, Tensor]:
    """`omnimamba.ops.prefill.gated_scan` of one group."""
    x, B, C, z = (m if m.stride(3) == 1 else m.contiguous() for m in (x, B, C, z.unflatten(-1, x.shape[2:])))
    with torch.cuda.device_of(x):
        scanned = scan_forward(
            x, dt.float(), A.float(), B, C, D.float(), initial_state.float().contiguous(), gate=Gate(z, norm_weight.contiguous())
        )
    assert scanned.squares is not None
    return scanned.y.flatten(-2), Squares(scanned.squares, norm_weight.numel()), scanned.final


def add_rms_norm(residual: Tensor, addend: Tensor | None, weight: Tensor, eps: float, squares: Squares | None) -> Tensor:
    out = torch.empty(residual.shape, dtype=output_dtype(weight), device=residual.device)
    with torch.cuda.device_of(residual):
        add_norm(residual, addend, weight, eps, out.view(-1, out.shape[-1]), total=residual, squares=squares)
    return out


def add_norm(
    residual: Tensor, addend: Tensor | None, weight: Tensor, eps: float, out: Tensor, *, total: Tensor, squares: Squares | None = None
) -> None:
    """Writes residual + addend to `total`, which may be `residual`, and the norm of that to out [rows, d], dense in d.

    residual, addend, total: [..., d], the first and the last contiguous and fp32; squares: see `omnimamba.ops.prefill.add_rms_norm`.
    """
    d = residual.shape[-1]
    choice = launch("prefill_norm", d)
    sums, num_squares = (residual, 0) if squares is None else (squares.sums, squares.sums.shape[-1])
    add_norm_kernel[(residual.numel() // d,)](
        residual, residual if addend is None else addend.contiguous(), sums, weight, total, out, out.stride(0), eps,
        D=d, COLUMNS=triton.next_power_of_2(d), HAS_ADDEND=addend is not None, NUM_SQUARES=num_squares,
        TILE_S=triton.next_power_of_2(max(num_squares, 1)), K=1 if squares is None else squares.k,
        num_warps=choice.num_warps, num_stages=choice.num_stages,
    )  # fmt: skip
