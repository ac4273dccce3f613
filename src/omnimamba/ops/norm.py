"""RMSNorm (Zhang & Sennrich 2019) and Mamba-2's gated RMSNorm (arXiv:2405.21060, section 7)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimamba.ops.plain_path import runs_kernel


class Squares(NamedTuple):
    """Of rows of k numbers that have yet to be divided by their root mean square."""

    sums: Tensor
    """[..., s], whose sum over the last axis is that of their squares."""
    k: int

    def rms(self, eps: float) -> Tensor:
        """[..., 1]"""
        return (self.sums.sum(-1, keepdim=True) / self.k + eps).sqrt()


def output_dtype(weight: Tensor) -> torch.dtype:
    """That of a norm: `weight`'s; under autocast that of the products which read it."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in fp32, returned in `output_dtype(weight)`.

    x: [..., d]; weight: [d].
    """
    if runs_kernel(x):
        from omnimamba.ops.triton import norm as kernel  # Triton need not be installed

        return kernel.rms_norm(x, weight, eps)
    return plain_rms_norm(x, weight, eps)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition of `rms_norm`."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(output_dtype(weight))


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, *, num_groups: int = 1) -> Tensor:
    """rms_norm(y * silu(z)): the gate comes before the norm. Each of `num_groups` equal parts has an rms of its own (mamba_ssm).

    y, z: [..., d]; weight: [d].
    """
    if runs_kernel(y):
        from omnimamba.ops.triton import norm as kernel

        return kernel.gated_rms_norm(y, z, weight, eps, num_groups=num_groups)
    return plain_gated_rms_norm(y, z, weight, eps, num_groups=num_groups)


def plain_gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, *, num_groups: int = 1) -> Tensor:
    """The definition of `gated_rms_norm`."""
    gated = (y.float() * F.silu(z.float())).unflatten(-1, (num_groups, -1))
    return (F.rms_norm(gated, gated.shape[-1:], eps=eps).flatten(-2) * weight.float()).to(output_dtype(weight))


def softplus_dt(dt: Tensor, dt_bias: Tensor) -> Tensor:
    """The step size softplus(dt + dt_bias) in fp32. dt: [..., h]; dt_bias: [h]."""
    return F.softplus(dt.float() + dt_bias.float(), threshold=20.0)


def length_mask(lengths: Tensor, l: int) -> Tensor:
    """True at the valid positions of right-padded rows. lengths: [b]; returns [b, l]."""
    return torch.arange(l, device=lengths.device) < lengths[:, None]
