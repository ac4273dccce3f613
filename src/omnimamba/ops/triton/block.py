"""Training of a whole Mamba-2 block as one function with a backward pass of its own.

Autograd would keep what every operator reads, [b, l, 2 * d_inner + ...] several times over, and join the gradients of in_proj's parts by
copies. Here a block keeps the residual stream, the scan's output y and, if there is room, in_proj's output. Everything else is computed a
second time, but neither the scan nor out_proj, and each gradient of a part is written where in_proj's products read it.

The definition is `Mamba2Block.by_operators`; the dropout before LoRA draws its own numbers, which depend on one seed and the position, so
that the backward pass draws the same.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnimamba.ops.block import BlockOptions, BlockWeights, Ready, ReadyWeights
from omnimamba.ops.norm import output_dtype
from omnimamba.ops.ssd import A_of, split_scan_inputs
from omnimamba.ops.triton.conv import conv_backward, conv_forward
from omnimamba.ops.triton.lora import Dropout, add_up, down, inner_gradient, outer_gradients
from omnimamba.ops.triton.norm import norm_backward, norm_forward
from omnimamba.ops.triton.prefill import add_norm, positive_steps
from omnimamba.ops.triton.ssd import scan_forward
from omnimamba.ops.triton.ssd_backward import scan_backward


class Inputs(NamedTuple):
    """What leads to the scan."""

    u: Tensor  # [b * l, d], the normed residual stream
    low: Tensor | None  # [b * l, r], LoRA's A times u after dropout
    zxbcdt: Tensor  # [b, l, n], in_proj's output
    xBC: Tensor  # [b, l, c], the convolution's output
    dt: Tensor  # [b, l, h]


def make_ready(weights: BlockWeights, scaling: float, dtype: torch.dtype) -> Ready:
    if weights.lora_B is None:
        joined, lora_B = weights.in_proj.to(dtype), None
    else:
        (n, d), r = weights.in_proj.shape, weights.lora_B.shape[1]
        joined, lora_B = rows_of(n, d + padded(r), weights.in_proj.device, dtype), (weights.lora_B * scaling).to(dtype)
        joined[:, :d] = weights.in_proj
        joined[:, d : d + r] = lora_B
        joined[:, d + r :] = 0
    return Ready(
        joined, lora_B, weights.out_proj.to(dtype), weights.conv.to(dtype).T.contiguous(), weights.conv_bias.to(dtype),
        weights.dt_bias.float(), A_of(weights.A_log).contiguous(), weights.D.float(),
    )  # fmt: skip


def padded(r: int) -> int:
    """Columns of LoRA's inner numbers beside d others: rows of a matrix product have to be multiples of 16 bytes."""
    return -(-r // 8) * 8


def rows_of(num: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An empty [num, width] whose rows begin at multiples of 128 bytes."""
    return torch.empty((num, -(-width // 64) * 64), dtype=dtype, device=device)[:, :width]


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
    residual: Tensor, addend: Tensor | None, weights: BlockWeights, ready: Ready, options: BlockOptions, dropout: Dropout,
    lengths: Tensor | None, kept: tuple[Any, ...] = (),
) -> tuple[Tensor, Inputs]:  # fmt: skip
    """The residual stream with the addend, and what follows from it. kept: zxbcdt and low, where they are there from the forward pass."""
    b, l, d = residual.shape
    dtype = ready.in_proj.dtype
    wide = rows_of(b * l, ready.in_proj.shape[1], residual.device, dtype)
    u, low = wide[:, :d], None
    residual = residual.contiguous()
    total = residual if addend is None else torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    add_norm(residual, addend, weights.norm, options.eps, u, total=total)
    if kept:
        zxbcdt, low = kept
    else:
        if weights.lora_A is not None:
            down(u, weights.lora_A, dropout, wide[:, d:])
            low = wide[:, d : d + weights.lora_A.shape[0]]
        zxbcdt = (wide @ ready.in_proj.T).view(b, l, -1)
    _, xBC, dt = split_parts(zxbcdt, options)
    xBC, dt = conv_forward(xBC, ready.taps, ready.conv_bias), positive_steps(dt, ready.dt_bias, lengths)
    return total, Inputs(u, low, zxbcdt, xBC, dt)


class Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        residual: Tensor,
        addend: Tensor | None,
        lengths: Tensor | None,
        options: BlockOptions,
        ready: Ready | None,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor]:
        weights = BlockWeights(*tensors)
        b, l, d = residual.shape
        dtype = output_dtype(weights.norm)
        has_dropout = weights.lora_A is not None and options.dropout > 0
        seed = torch.randint(2**62, (1,), device=residual.device) if has_dropout else None
        ctx.ready = ready
        with torch.autocast(residual.device.type, enabled=False):
            ready = make_ready(weights, options.scaling, dtype) if ready is None else ready
            residual, inputs = read(residual, addend, weights, ready, options, Dropout(seed, options.dropout), lengths)
            z, _, _ = split_parts(inputs.zxbcdt, options)
            x, B, C = split_scan(inputs.xBC, options)
            y = scan_forward(x, inputs.dt, ready.A, B, C, ready.D).y
            gated = torch.empty((b * l, y.shape[2] * y.shape[3]), dtype=dtype, device=y.device)
            norm_forward(y.view(b * l, -1), z.flatten(0, 1), weights.gated_norm, options.eps, options.num_groups, gated)
            hidden = (gated @ ready.out_proj.T).view(b, l, d)
        kept = () if options.recompute else (inputs.zxbcdt, None if inputs.low is None else inputs.low.contiguous())
        ctx.save_for_backward(residual, y, seed, lengths, *tensors, *kept)
        ctx.options, ctx.dtype, ctx.addend_dtype = options, dtype, None if addend is None else addend.dtype
        return residual, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, dresidual: Tensor, dhidden: Tensor):
        residual, y, seed, lengths, *rest = ctx.saved_tensors
        num = len(BlockWeights._fields)
        weights, kept = BlockWeights(*rest[:num]), tuple(rest[num:])
        options, dtype = ctx.options, ctx.dtype
        needs = BlockWeights(*ctx.needs_input_grad[5:])
        b, l, d = residual.shape
        eps, groups = options.eps, options.num_groups
        dropout = Dropout(seed, options.dropout)
        with torch.autocast(residual.device.type, enabled=False):
            ready = make_ready(weights, options.scaling, dtype) if ctx.ready is None else ctx.ready
            _, inputs = read(residual, None, weights, ready, options, dropout, lengths, kept)
            dzxbcdt = torch.empty(inputs.zxbcdt.shape, dtype=dtype, device=residual.device)
            z, xBC, _ = (m.flatten(0, 1) for m in split_parts(inputs.zxbcdt, options))
            dz, dxBC, ddt = split_parts(dzxbcdt, options)
            grads: dict[str, Tensor | None] = dict.fromkeys(BlockWeights._fields)

            # out_proj and the gated norm
            dhidden = dhidden.reshape(-1, d)
            y = y.view(b * l, -1)
            if needs.out_proj:
                gated = norm_forward(y, z, weights.gated_norm, eps, groups, torch.empty(y.shape, dtype=dtype, device=y.device))
                grads["out_proj"] = product(dhidden.T, gated, weights.out_proj.dtype)
                del gated
            dgated = dhidden @ ready.out_proj
            dy, grads["gated_norm"] = norm_backward(
                y, z, weights.gated_norm, dgated, eps, groups, dgates=dz.flatten(0, 1), learns_weight=bool(needs.gated_norm)
            )
            del dgated

            # the scan and the convolution
            dscan = torch.empty(inputs.xBC.shape, dtype=dtype, device=residual.device)
            x, B, C = split_scan(inputs.xBC, options)
            dx, dB, dC = split_scan(dscan, options)
            sums, _ = scan_backward(x, inputs.dt, ready.A, B, C, ready.D, None, dy.view(x.shape), None, dx, ddt, dB, dC, is_softplus=True)
            if needs.A_log or needs.D or needs.dt_bias:
                dA, grads["D"], grads["dt_bias"] = sums.sum((1, 2))
                grads["A_log"] = dA * ready.A
            inputs_of_conv, learns = xBC.unflatten(0, (b, l)), bool(needs.conv or needs.conv_bias)
            dtaps, grads["conv_bias"] = conv_backward(inputs_of_conv, ready.taps, ready.conv_bias, None, dscan, dxBC, learns_weights=learns)
            grads["conv"] = None if dtaps is None else dtaps.T
            del dscan, dy

            # in_proj and LoRA
            dzxbcdt = dzxbcdt.view(b * l, -1)
            du = dzxbcdt @ ready.in_proj[:, :d]
            if weights.lora_A is not None and ready.lora_B is not None and inputs.low is not None:
                dlow, dB = outer_gradients(dzxbcdt, inputs.low, ready.lora_B)
                grads["lora_B"] = dB * options.scaling
                if needs.lora_A:
                    grads["lora_A"] = inner_gradient(inputs.u, dlow, dropout)
                add_up(du, dlow, weights.lora_A, dropout)
            if needs.in_proj:
                grads["in_proj"] = product(dzxbcdt.T, inputs.u, weights.in_proj.dtype)
            rows, daddend = residual.view(-1, d), None
            if ctx.addend_dtype is not None:
                daddend = torch.empty(rows.shape, dtype=ctx.addend_dtype, device=rows.device)
            addend = dresidual.contiguous().view(-1, d)
            dtotal, grads["norm"] = norm_backward(
                rows, None, weights.norm, du, eps, 1, addend=addend, second=daddend, learns_weight=bool(needs.norm)
            )
        found = [
            None if grad is None or weight is None or not needed else grad.to(weight.dtype)
            for weight, grad, needed in zip(weights, grads.values(), needs, strict=True)
        ]
        return dtotal.view(b, l, d), None if daddend is None else daddend.view(b, l, d), None, None, None, *found


def learn_block(
    residual: Tensor,
    hidden: Tensor | None,
    weights: BlockWeights,
    options: BlockOptions,
    lengths: Tensor | None,
    kept: ReadyWeights | None,
) -> tuple[Tensor, Tensor]:
    dtype = output_dtype(weights.norm)
    with torch.cuda.device_of(residual):
        with torch.no_grad():
            ready = None if kept is None else kept.get(weights, lambda: make_ready(weights, options.scaling, dtype))
        return Block.apply(residual, hidden, lengths, options, ready, *weights)
