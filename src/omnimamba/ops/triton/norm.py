"""RMSNorm, gated or not, forward and backward, each in one pass over its rows; the definitions are in `omnimamba.ops.norm`.

With u = y * silu(z), or y where there is no gate, r = 1 / rms(u) and do the gradient of the output:
du = r * (w * do - u * r^2 * mean(w * do * u)). The backward pass computes r again. Its number of programs is fixed: each walks over its
rows with one partial sum of the weight's gradient, so that the result does not depend on the order of programs.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.norm import output_dtype
from omnimamba.ops.triton.decode import sigmoid, silu
from omnimamba.ops.triton.launch import MULTIPROCESSORS, NORM_WARPS, Launch, launch


@triton.jit
def load_rows(p_first, start, num_rows, o_d, stride_row, D: tl.constexpr, ROWS: tl.constexpr):
    o_row = (start + tl.arange(0, ROWS)).to(tl.int64)
    return tl.load(p_first + o_row[:, None] * stride_row + o_d[None, :], mask=(o_row < num_rows)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    y, y_row, z, z_row, weight, out, out_row, num_rows, eps,
    GATED: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * ROWS
    o_row = (start + tl.arange(0, ROWS)).to(tl.int64)
    o_d = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * D
    mask = (o_row < num_rows)[:, None] & (o_d < D)[None, :]
    u = load_rows(y + first, start, num_rows, o_d, y_row, D, ROWS).to(tl.float32)
    if GATED:
        u *= silu(load_rows(z + first, start, num_rows, o_d, z_row, D, ROWS).to(tl.float32))
    r = 1 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
    w = tl.load(weight + first + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_out = u * r[:, None] * w[None, :]
    tl.store(out + o_row[:, None] * out_row + (first + o_d)[None, :], b_out.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    y, y_row, z, z_row, weight, dout, addend, dy, second, dz, partial, dout_row, dz_row, num_rows, eps,
    GATED: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_SECOND: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial: [programs, g * d], the program's sums of the weight's gradient; addend: [rows, g * d], what dy gains; second: [rows, g * d],
    dy once more, in another type."""
    o_d = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * D
    w = tl.load(weight + first + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    step = tl.num_programs(0) * ROWS
    begin = tl.program_id(0) * ROWS
    b_y = load_rows(y + first, begin, num_rows, o_d, y_row, D, ROWS)
    b_dout = load_rows(dout + first, begin, num_rows, o_d, dout_row, D, ROWS)
    if GATED:
        b_z = load_rows(z + first, begin, num_rows, o_d, z_row, D, ROWS)
    for start in range(begin, num_rows, step):
        # the rows after these, which arrive while these are worked on
        next_y = load_rows(y + first, start + step, num_rows, o_d, y_row, D, ROWS)
        next_dout = load_rows(dout + first, start + step, num_rows, o_d, dout_row, D, ROWS)
        if GATED:
            next_z = load_rows(z + first, start + step, num_rows, o_d, z_row, D, ROWS)
        o_row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (o_row < num_rows)[:, None] & (o_d < D)[None, :]
        u = b_y.to(tl.float32)
        if GATED:
            f_z = b_z.to(tl.float32)
            gate = sigmoid(f_z)
            u *= f_z * gate
        f_dout = b_dout.to(tl.float32)
        along = tl.sum(f_dout * w * u, 1) / D  # one sum does not wait for the other
        r = 1 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
        dweight += f_dout * u * r[:, None]
        du = r[:, None] * (f_dout * w - u * (along * r * r)[:, None])
        o_out = o_row[:, None] * (G * D) + (first + o_d)[None, :]
        if GATED:
            b_dz = du * b_y.to(tl.float32) * gate * (1 + f_z * (1 - gate))
            tl.store(dz + o_row[:, None] * dz_row + (first + o_d)[None, :], b_dz.to(dz.dtype.element_ty), mask=mask)
            du *= f_z * gate
        if HAS_ADDEND:
            du += tl.load(addend + o_out, mask=mask, other=0.0).to(tl.float32)
        tl.store(dy + o_out, du.to(dy.dtype.element_ty), mask=mask)
        if HAS_SECOND:
            tl.store(second + o_out, du.to(second.dtype.element_ty), mask=mask)
        b_y, b_dout = next_y, next_dout
        if GATED:
            b_z = next_z
    tl.store(partial + tl.program_id(0) * (G * D) + first + o_d, tl.sum(dweight, 0), mask=o_d < D)


def norm_forward(rows: Tensor, gates: Tensor | None, weight: Tensor, eps: float, num_groups: int, out: Tensor) -> Tensor:
    """`out`, to which the norm is written. rows, gates, out: [rows, d], dense in d; gates None: there is no gate."""
    num_rows, d = rows.shape
    choice = launch("norm_forward", d // num_groups)
    forward_kernel[triton.cdiv(num_rows, choice.rows), num_groups](
        rows, *gate_arguments(rows, gates), weight, out, out.stride(0), num_rows, eps, **sizes(d, num_groups, gates is not None, choice)
    )  # fmt: skip
    return out


def norm_backward(
    rows: Tensor,
    gates: Tensor | None,
    weight: Tensor,
    dout: Tensor,
    eps: float,
    num_groups: int,
    *,
    dgates: Tensor | None = None,
    addend: Tensor | None = None,
    second: Tensor | None = None,
    learns_weight: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of rows [rows, d], in their dtype, and of the weight [d], in fp32; that of the gates goes to `dgates` [rows, d].

    dout: [rows, d], dense in d, as dgates; addend: [rows, d], contiguous, what the rows' gradient gains; second: [rows, d], contiguous, to
    which that gradient is written too, in the dtype of this one.
    """
    num_rows, d = rows.shape
    drows = torch.empty((num_rows, d), dtype=rows.dtype, device=rows.device)
    choice = launch("norm_backward", d // num_groups)
    resident = MULTIPROCESSORS * max(1, NORM_WARPS // choice.num_warps)
    programs = min(resident, triton.cdiv(num_rows, choice.rows))
    partial = torch.empty((programs, d), dtype=torch.float32, device=rows.device)
    backward_kernel[programs, num_groups](
        rows, *gate_arguments(rows, gates), weight, dout, drows if addend is None else addend, drows,
        drows if second is None else second, drows if dgates is None else dgates, partial,
        dout.stride(0), 0 if dgates is None else dgates.stride(0), num_rows, eps,
        HAS_ADDEND=addend is not None, HAS_SECOND=second is not None, **sizes(d, num_groups, gates is not None, choice),
    )  # fmt: skip
    return drows, partial.sum(0) if learns_weight else None


class RMSNorm(torch.autograd.Function):
    """y, z: [..., d]; z is None where there is no gate."""

    @staticmethod
    def forward(ctx, y: Tensor, z: Tensor | None, weight: Tensor, eps: float, num_groups: int, dtype: torch.dtype) -> Tensor:
        rows, gates = as_rows(y), None if z is None else as_rows(z)
        ctx.save_for_backward(rows, gates, weight)
        ctx.eps, ctx.num_groups, ctx.shape = eps, num_groups, y.shape
        out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        return norm_forward(rows, gates, weight, eps, num_groups, out).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        rows, gates, weight = ctx.saved_tensors
        dz = None if gates is None else torch.empty(gates.shape, dtype=gates.dtype, device=rows.device)
        dy, dweight = norm_backward(rows, gates, weight, as_rows(dout), ctx.eps, ctx.num_groups, dgates=dz)
        assert dweight is not None
        return dy.view(ctx.shape), None if dz is None else dz.view(ctx.shape), dweight.to(weight.dtype), None, None, None


def gate_arguments(rows: Tensor, gates: Tensor | None) -> tuple[int, Tensor, int]:
    """The rows' stride, the gates and theirs; where there are none the kernel never reads the pointer."""
    return (rows.stride(0), rows, 0) if gates is None else (rows.stride(0), gates, gates.stride(0))


def as_rows(x: Tensor) -> Tensor:
    """x: [..., d] as [rows, d] whose rows are dense; a slice of a wider tensor is not copied."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def sizes(d: int, num_groups: int, is_gated: bool, choice: Launch) -> dict[str, Any]:
    size = d // num_groups
    tiles = {"GATED": is_gated, "G": num_groups, "D": size, "ROWS": choice.rows, "COLUMNS": triton.next_power_of_2(size)}
    return tiles | {"num_warps": choice.num_warps, "num_stages": choice.num_stages}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`omnimamba.ops.rms_norm` for at least one row."""
    with torch.cuda.device_of(x):
        return RMSNorm.apply(x, None, weight.contiguous(), eps, 1, output_dtype(weight))


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, *, num_groups: int = 1) -> Tensor:
    """`omnimamba.ops.gated_rms_norm` for at least one row."""
    with torch.cuda.device_of(y):
        return RMSNorm.apply(y, z, weight.contiguous(), eps, num_groups, output_dtype(weight))
