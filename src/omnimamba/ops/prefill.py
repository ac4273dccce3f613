"""Reading a prompt: operators without gradients that update in place; activations pass through memory fewer times than in training."""

from collections.abc import Callable

import torch
from torch import Tensor

from omnimamba.ops.conv import causal_conv1d, plain_causal_conv1d
from omnimamba.ops.norm import length_mask, plain_rms_norm, softplus_dt
from omnimamba.ops.plain_path import runs_kernel


@torch.no_grad()
def add_rms_norm(residual: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """rms_norm of `residual`, which gains the addend first, in place.

    residual: [b, l, d] fp32, contiguous; addend: [b, l, d], None for nothing. Returns [b, l, d] in weight's dtype.
    """
    if runs_kernel(residual):
        from omnimamba.ops.triton import prefill as kernel  # Triton need not be installed

        return kernel.add_rms_norm(residual, addend, weight, eps)
    return plain_add_rms_norm(residual, addend, weight, eps)


def plain_add_rms_norm(residual: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The definition of `add_rms_norm`."""
    if addend is not None:
        residual += addend
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
