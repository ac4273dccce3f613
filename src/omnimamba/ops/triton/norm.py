"""Gated RMSNorm, forward and backward, each in one pass over its rows; the definition is in `omnimamba.ops.norm`.

With u = y * silu(z), r = 1 / rms(u) and do the gradient of the output:
du = r * (w * do - u * r^2 * mean(w * do * u)). The backward pass computes r again. Its number of programs is fixed: each walks over its
rows with one partial sum of the weight's gradient, so that the result does not depend on the order of programs.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.triton.launch import NORM_PROGRAMS, launch


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    y, z, weight, out, y_row, z_row, num_rows, eps,
    G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * D
    mask = (o_row < num_rows)[:, None] & (o_d < D)[None, :]
    u = tl.load(y + o_row[:, None] * y_row + (first + o_d)[None, :], mask=mask, other=0.0).to(tl.float32)
    b_z = tl.load(z + o_row[:, None] * z_row + (first + o_d)[None, :], mask=mask, other=0.0).to(tl.float32)
    u *= b_z * tl.sigmoid(b_z)
    r = 1 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
    w = tl.load(weight + first + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_out = u * r[:, None] * w[None, :]
    tl.store(out + o_row[:, None] * (G * D) + (first + o_d)[None, :], b_out.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    y, z, weight, dout, dy, dz, partial, y_row, z_row, dout_row, num_rows, eps,
    G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """partial: [programs, g * d], the program's sums of the weight's gradient."""
    o_d = tl.arange(0, COLUMNS)
    first = tl.program_id(1) * D
    w = tl.load(weight + first + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        o_row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (o_row < num_rows)[:, None] & (o_d < D)[None, :]
        b_y = tl.load(y + o_row[:, None] * y_row + (first + o_d)[None, :], mask=mask, other=0.0).to(tl.float32)
        b_z = tl.load(z + o_row[:, None] * z_row + (first + o_d)[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(b_z)
        u = b_y * (b_z * gate)
        b_dout = tl.load(dout + o_row[:, None] * dout_row + (first + o_d)[None, :], mask=mask, other=0.0).to(tl.float32)
        r = (1 / tl.sqrt(tl.sum(u * u, 1) / D + eps))[:, None]
        normed = u * r
        dweight += b_dout * normed
        b_dout *= w
        du = r * (b_dout - normed * (tl.sum(b_dout * normed, 1) / D)[:, None])
        o_out = o_row[:, None] * (G * D) + (first + o_d)[None, :]
        b_dz = du * b_y * gate * (1 + b_z * (1 - gate))
        tl.store(dz + o_out, b_dz.to(dz.dtype.element_ty), mask=mask)
        tl.store(dy + o_out, (du * (b_z * gate)).to(dy.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0) * (G * D) + first + o_d, tl.sum(dweight, 0), mask=o_d < D)


class GatedRMSNorm(torch.autograd.Function):
    """y, z: [..., d]."""

    @staticmethod
    def forward(ctx, y: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int) -> Tensor:
        rows, gates = as_rows(y), as_rows(z)
        num_rows, d = rows.shape
        out = torch.empty((num_rows, d), dtype=weight.dtype, device=y.device)
        choice = launch("norm_forward", d // num_groups)
        forward_kernel[triton.cdiv(num_rows, choice.rows), num_groups](
            rows, gates, weight, out, rows.stride(0), gates.stride(0), num_rows, eps, **sizes(d, num_groups, choice.rows),
            num_warps=choice.num_warps, num_stages=choice.num_stages,
        )  # fmt: skip
        ctx.save_for_backward(rows, gates, weight)
        ctx.eps, ctx.num_groups, ctx.shape = eps, num_groups, y.shape
        return out.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        rows, gates, weight = ctx.saved_tensors
        num_rows, d = rows.shape
        dout = as_rows(dout)
        dy = torch.empty((num_rows, d), dtype=rows.dtype, device=rows.device)
        dz = torch.empty((num_rows, d), dtype=gates.dtype, device=rows.device)
        choice = launch("norm_backward", d // ctx.num_groups)
        programs = min(NORM_PROGRAMS, triton.cdiv(num_rows, choice.rows))
        partial = torch.empty((programs, d), dtype=torch.float32, device=rows.device)
        backward_kernel[programs, ctx.num_groups](
            rows, gates, weight, dout, dy, dz, partial, rows.stride(0), gates.stride(0), dout.stride(0), num_rows, ctx.eps,
            **sizes(d, ctx.num_groups, choice.rows), num_warps=choice.num_warps, num_stages=choice.num_stages,
        )  # fmt: skip
        return dy.view(ctx.shape), dz.view(ctx.shape), partial.sum(0).to(weight.dtype), None, None


def as_rows(x: Tensor) -> Tensor:
    """x: [..., d] as [rows, d] whose rows are dense; a slice of a wider tensor is not copied."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def sizes(d: int, num_groups: int, rows: int) -> dict[str, int]:
    size = d // num_groups
    return {"G": num_groups, "D": size, "ROWS": rows, "COLUMNS": triton.next_power_of_2(size)}


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, *, num_groups: int = 1) -> Tensor:
    """`omnimamba.ops.gated_rms_norm` for at least one row."""
    with torch.cuda.device_of(y):
        return GatedRMSNorm.apply(y, z, weight.contiguous(), eps, num_groups)
