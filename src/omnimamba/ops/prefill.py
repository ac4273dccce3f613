"""Reading a prompt: operators without gradients that update in place; activations pass through memory fewer times than in training."""

from collections.abc import Callable

import torch
from torch import Tensor

from omnimamba.ops.conv import causal_conv1d, plain_causal_conv1d
from omnimamba.ops.norm import Squares, gated_rms_norm, length_mask, plain_rms_norm, softplus_dt
from omnimamba.ops.plain_path import runs_kernel
from omnimamba.ops.ssd import fits_kernel, ssd_chunk_scan


@torch.no_grad()
def add_rms_norm(residual: Tensor, addend: Tensor | None, weight: Tensor, eps: float, squares: Squares | None = None) -> Tensor:
    """rms_norm of `residual`, which gains the addend first, in place.

    residual: [b, l, d] fp32, contiguous; addend: [b, l, d], None for nothing; squares: of the rows that the addend is a product of, which
    divide it by their rms (with the same eps) only now. Returns [b, l, d] in weight's dtype.
    """
    if runs_kernel(residual):
        from omnimamba.ops.triton import prefill as kernel  # Triton need not be installed

        return kernel.add_rms_norm(residual, addend, weight, eps, squares)
    return plain_add_rms_norm(residual, addend, weight, eps, squares)


def plain_add_rms_norm(residual: Tensor, addend: Tensor | None, weight: Tensor, eps: float, squares: Squares | None = None) -> Tensor:
    """The definition of `add_rms_norm`."""
    if addend is not None:
        residual += addend if squares is None else addend / squares.rms(eps)
    return plain_rms_norm(residual, weight, eps)


@torch.no_grad()
def scan_inputs(
    xBC: Tensor, dt: Tensor, *, weight: Tensor, bias: Tensor, dt_bias: Tensor, conv_state: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """silu(conv(xBC) + bias) [b, l, c] and step sizes [b, l, h] fp32, those of padding 0; `conv_state` is updated in place.

    xBC: [b, l, c]; dt: [b, l, h]; weight: [c, w]; bias: [c]; dt_bias: [h] fp32; conv_state: [b, c, w]; lengths: [b] valid positions of
    right-padded rows.
    """
    if runs_kernel(xBC):
        from omnimamba.ops.triton import prefill as kernel

        return kernel.scan_inputs(xBC, dt, weight=weight, bias=bias, dt_bias=dt_bias, conv_state=conv_state, lengths=lengths)
    return plain_scan_inputs(
        xBC, dt, weight=weight, bias=bias, dt_bias=dt_bias, conv_state=conv_state, lengths=lengths, convolve=causal_conv1d
    )


def plain_scan_inputs(
    xBC: Tensor,
    dt: Tensor,
    *,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    lengths: Tensor | None = None,
    convolve: Callable[..., tuple[Tensor, Tensor]] = plain_causal_conv1d,
) -> tuple[Tensor, Tensor]:
    """The definition of `scan_inputs`."""
    y, last = convolve(xBC, weight, bias, initial_state=conv_state, lengths=lengths)
    conv_state.copy_(last)
    dt = softplus_dt(dt, dt_bias)
    return y, dt if lengths is None else dt * length_mask(lengths, dt.shape[1])[..., None]


@torch.no_grad()
def gated_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    norm_weight: Tensor,
    eps: float,
    num_groups: int,
    chunk_size: int,
    initial_state: Tensor,
) -> tuple[Tensor, Squares | None, Tensor]:
    """gated_rms_norm of ssd_chunk_scan's y [b, l, h * p], the division that it still lacks (None: nothing), and the final state.

    With one group, what the norm divides a row by may come after a product with that row: the scan then writes y * silu(z) * norm_weight,
    and y itself never reaches memory. z: [b, l, h * p]; norm_weight: [h * p]; the rest as in `ssd_chunk_scan` and `gated_rms_norm`.
    """
    # fp16 could overflow before the division
    if runs_kernel(x) and fits_kernel(x.shape[3], B.shape[3]) and num_groups == 1 and x.dtype != torch.float16:
        from omnimamba.ops.triton import prefill as kernel

        return kernel.gated_scan(x, dt, A, B, C, D=D, z=z, norm_weight=norm_weight, initial_state=initial_state)
    y, final = ssd_chunk_scan(x, dt, A, B, C, D=D, chunk_size=chunk_size, initial_state=initial_state)
    return gated_rms_norm(y.flatten(-2), z, norm_weight, eps, num_groups=num_groups), None, final
