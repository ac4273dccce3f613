"""Training of a whole Mamba-2 block, residual + mixer(norm(residual)), as one function with a backward pass of its own.

Autograd would keep what every operator reads, [b, l, 2 * d_inner + ...] several times over, and join the gradients of in_proj's parts by
copies. Here a block keeps two tensors, the residual stream and the scan's output y. Everything else is computed a second time, but
neither the scan nor out_proj, and each gradient of a part is written where in_proj's products read it.

The definition is `Mamba2Block.forward`; the dropout before LoRA draws its own numbers, which depend on one seed and the position, so that
the backward pass draws the same.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.block import BlockOptions, BlockWeights
from omnimamba.ops.norm import output_dtype
from omnimamba.ops.ssd import A_of, split_scan_inputs
from omnimamba.ops.triton.conv import conv_backward, conv_forward
from omnimamba.ops.triton.launch import launch
from omnimamba.ops.triton.norm import norm_backward, norm_forward
from omnimamba.ops.triton.prefill import positive_steps
from omnimamba.ops.triton.ssd import scan_forward
from omnimamba.ops.triton.ssd_backward import scan_backward


class Inputs(NamedTuple):
    """What leads to the scan."""

    u: Tensor  # [b * l, d], the normed residual stream
    dropped: Tensor  # [b * l, d], u after dropout
    low: Tensor | None  # [b * l, r], LoRA's A times that
    zxbcdt: Tensor  # [b, l, n], in_proj's output
    xBC: Tensor  # [b, l, c], the convolution's output
    dt: Tensor  # [b, l, h]


@triton.jit(do_not_specialize=["num"])
def dropout_kernel(x, seed, out, num, zeros, scale, TILE: tl.constexpr):
    """Each number is kept if 16 bits of its own are at least `zeros`. Philox with 7 rounds, the fewest that pass the tests of its authors
    (Salmon et al. 2011), gives 128 bits at once, for eight runs of TILE neighbours."""
    o_run = tl.program_id(0) * TILE + tl.arange(0, TILE)
    draws = tl.randint4x(tl.load(seed), o_run, n_rounds=7)
    first = tl.program_id(0).to(tl.int64) * (8 * TILE) + tl.arange(0, TILE)
    for i in tl.static_range(8):
        o = first + i * TILE
        b_x = tl.load(x + o, mask=o < num, other=0.0).to(tl.float32)
        is_kept = ((draws[i // 2] >> (16 * (i % 2))) & 0xFFFF) >= zeros
        tl.store(out + o, tl.where(is_kept, b_x * scale, 0.0).to(out.dtype.element_ty), mask=o < num)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x, contiguous, with a share p of its numbers set to 0 and the others divided by 1 - p; the same ones for the same seed [1] int64.

    p is rounded to a multiple of 2**-16.
    """
    zeros = round(p * 2**16)
    if zeros == 0:
        return x
    out, choice = torch.empty(x.shape, dtype=x.dtype, device=x.device), launch("dropout", x.shape[-1])
    dropout_kernel[(triton.cdiv(x.numel(), 8 * choice.columns),)](
        x, seed, out, x.numel(), zeros, 1 / (1 - zeros / 2**16), TILE=choice.columns,
        num_warps=choice.num_warps, num_stages=choice.num_stages,
    )  # fmt: skip
    return out


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, which may be wider than theirs: the gradient of an fp32 weight is not rounded on the way."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a.float() @ b.float()).to(dtype)


def split_parts(zxbcdt: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor, Tensor]:
    """z, xBC and dt of in_proj's output, or of its gradient: views."""
    d_inner = options.num_heads * options.headdim
    z, xBC, dt = zxbcdt.split((d_inner, d_inner + 2 * options.num_groups * options.d_state, options.num_heads), -1)
    return z, xBC, dt


def split_scan(xBC: Tensor, options: BlockOptions) -> tuple[Tensor, Tensor, Tensor]:
    return split_scan_inputs(xBC, options.num_heads, options.num_groups, options.d_state)


def read(
    residual: Tensor, weights: BlockWeights, options: BlockOptions, seed: Tensor | None, lengths: Tensor | None, dtype: torch.dtype,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Inputs:  # fmt: skip
    """kept: zxbcdt and xBC, where they are there from the forward pass."""
    b, l, d = residual.shape
    u = norm_forward(residual.view(-1, d), None, weights.norm, options.eps, 1, dtype)
    dropped = u if seed is None else dropout(u, seed, options.dropout)
    low = None if weights.lora_A is None else dropped @ weights.lora_A.to(dtype).T
    if kept is None:
        in_proj = weights.in_proj.to(dtype)
        if low is None or weights.lora_B is None:
            zxbcdt = u @ in_proj.T
        else:
            zxbcdt = (low @ (weights.lora_B * options.scaling).to(dtype).T).addmm_(u, in_proj.T)
        zxbcdt = zxbcdt.view(b, l, -1)
        xBC = conv_forward(split_parts(zxbcdt, options)[1], *rounded_conv(weights, dtype))
    else:
        zxbcdt, xBC = kept
    dt = positive_steps(split_parts(zxbcdt, options)[2], weights.dt_bias.float(), lengths)
    return Inputs(u, dropped, low, zxbcdt, xBC, dt)


def rounded_conv(weights: BlockWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weights.conv.to(dtype).T.contiguous(), weights.conv_bias.to(dtype)


class Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual: Tensor, lengths: Tensor | None, options: BlockOptions, *tensors: Tensor | None) -> Tensor:
        weights = BlockWeights(*tensors)
        b, l, d = residual.shape
        residual, dtype = residual.contiguous(), output_dtype(weights.norm)
        has_dropout = weights.lora_A is not None and options.dropout > 0
        seed = torch.randint(2**62, (1,), device=residual.device) if has_dropout else None
        with torch.autocast(residual.device.type, enabled=False):
            inputs = read(residual, weights, options, seed, lengths, dtype)
            z, _, _ = split_parts(inputs.zxbcdt, options)
            x, B, C = split_scan(inputs.xBC, options)
            y = scan_forward(x, inputs.dt, A_of(weights.A_log), B, C, weights.D.float()).y
            gated = norm_forward(y.view(b * l, -1), z.flatten(0, 1), weights.gated_norm, options.eps, options.num_groups, dtype)
            out = residual + (gated @ weights.out_proj.to(dtype).T).view(b, l, d)
        kept = () if options.recompute else (inputs.zxbcdt, inputs.xBC)
        ctx.save_for_backward(residual, y, seed, lengths, *tensors, *kept)
        ctx.options, ctx.dtype = options, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        residual, y, seed, lengths, *rest = ctx.saved_tensors
        num = len(BlockWeights._fields)
        weights, kept = BlockWeights(*rest[:num]), tuple(rest[num:])
        options, dtype = ctx.options, ctx.dtype
        needs = BlockWeights(*ctx.needs_input_grad[3:])
        b, l, d = residual.shape
        eps, groups = options.eps, options.num_groups
        with torch.autocast(residual.device.type, enabled=False):
            inputs = read(residual, weights, options, seed, lengths, dtype, kept or None)
            dzxbcdt = torch.empty(inputs.zxbcdt.shape, dtype=dtype, device=residual.device)
            z, xBC, _ = (m.flatten(0, 1) for m in split_parts(inputs.zxbcdt, options))
            dz, dxBC, ddt = split_parts(dzxbcdt, options)
            grads: dict[str, Tensor | None] = dict.fromkeys(BlockWeights._fields)

            # out_proj and the gated norm
            dout = dout.contiguous()
            dhidden = dout.view(-1, d).to(dtype)
            y = y.view(b * l, -1)
            if needs.out_proj:
                gated = norm_forward(y, z, weights.gated_norm, eps, groups, dtype)
                grads["out_proj"] = product(dhidden.T, gated, weights.out_proj.dtype)
                del gated
            dgated = dhidden @ weights.out_proj.to(dtype)
            dy, grads["gated_norm"] = norm_backward(y, z, weights.gated_norm, dgated, eps, groups, dgates=dz.flatten(0, 1))
            del dgated

            # the scan and the convolution
            A = A_of(weights.A_log)
            dscan = torch.empty(inputs.xBC.shape, dtype=dtype, device=residual.device)
            x, B, C = split_scan(inputs.xBC, options)
            dsteps, dA, grads["D"], _ = scan_backward(
                x, inputs.dt, A, B, C, weights.D.float(), None, dy.view(x.shape), None, *split_scan(dscan, options)
            )
            grads["A_log"] = dA * A
            dsteps *= -torch.expm1(-inputs.dt)  # the slope of softplus, 0 in padding
            grads["dt_bias"] = dsteps.sum((0, 1))
            ddt.copy_(dsteps)
            taps, bias = rounded_conv(weights, dtype)
            dtaps, grads["conv_bias"] = conv_backward(xBC.unflatten(0, (b, l)), taps, bias, None, dscan, dxBC)
            grads["conv"] = dtaps.T
            del dscan, dy

            # in_proj and LoRA
            dzxbcdt = dzxbcdt.view(b * l, -1)
            if weights.lora_A is None or weights.lora_B is None or inputs.low is None:
                du = dzxbcdt @ weights.in_proj.to(dtype)
            else:
                dlow = dzxbcdt @ (weights.lora_B * options.scaling).to(dtype)
                if needs.lora_B:
                    grads["lora_B"] = product(dzxbcdt.T, inputs.low, torch.float32) * options.scaling
                if needs.lora_A:
                    grads["lora_A"] = product(dlow.T, inputs.dropped, torch.float32)
                du = dlow @ weights.lora_A.to(dtype)
                du = (du if seed is None else dropout(du, seed, options.dropout)).addmm_(dzxbcdt, weights.in_proj.to(dtype))
            if needs.in_proj:
                grads["in_proj"] = product(dzxbcdt.T, inputs.u, weights.in_proj.dtype)
            dresidual, grads["norm"] = norm_backward(residual.view(-1, d), None, weights.norm, du, eps, 1, addend=dout.view(-1, d))
        found = [
            None if grad is None or weight is None or not needed else grad.to(weight.dtype)
            for weight, grad, needed in zip(weights, grads.values(), needs, strict=True)
        ]
        return dresidual.view(b, l, d) if ctx.needs_input_grad[0] else None, None, None, *found


def learn_block(residual: Tensor, weights: BlockWeights, options: BlockOptions, lengths: Tensor | None) -> Tensor:
    with torch.cuda.device_of(residual):
        return Block.apply(residual, lengths, options, *weights)
