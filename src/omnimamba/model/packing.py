"""8-bit storage of weights: matrices and convolutions as int8 with one scale per output row, everything small as it is.

A file so stored is half as large as in 16 bits. The scales stand beside the tensors as `NAME.scale`; reading gives back floats, so
nothing but the file knows. Symmetric, round to nearest, the largest value of a row at 127.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE_SUFFIX = ".scale"
SMALLEST_PACKED = 4096
"""Tensors with fewer numbers are kept: norms, biases, decays."""


def is_packable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() >= SMALLEST_PACKED


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are stored: int8 and fp32 scales [rows] for the large ones."""
    packed = {}
    for name, tensor in tensors.items():
        if not is_packable(tensor):
            packed[name] = tensor
            continue
        rows = tensor.float().flatten(1)
        scale = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        packed[name] = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
        packed[name + SCALE_SUFFIX] = scale
    return packed


def unpack(values: Tensor, scale: Tensor) -> Tensor:
    """The fp32 tensor of int8 values and the scales of their rows."""
    return values.float() * scale.view(-1, *[1] * (values.ndim - 1))
