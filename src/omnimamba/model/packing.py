"""8-bit storage of weights: matrices and convolutions as int8 with one scale per output row, everything small as it is.

A file so stored is half as large as in 16 bits. The scales stand beside the tensors as `NAME.scale`; reading gives back floats, so
nothing but the file knows. Rounded as int8 in `ops/quant.py`, whose quantised weights are another thing: those are computed with.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from omnimamba.ops.quant import int8_rows

SCALE_SUFFIX = ".scale"
SMALLEST_PACKED = 4096
"""Tensors with fewer numbers are kept: norms, biases, decays."""


def is_packable(name: str, tensor: Tensor) -> bool:
    """Whether it is large and holds floats; the parts of a quantised weight stay what they are."""
    is_quantized = tensor.itemsize == 1 or name.endswith(SCALE_SUFFIX)
    return tensor.is_floating_point() and not is_quantized and tensor.ndim >= 2 and tensor.numel() >= SMALLEST_PACKED


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are stored: int8 and fp32 scales [rows] for the large ones."""
    packed = {}
    for name, tensor in tensors.items():
        if not is_packable(name, tensor):
            packed[name] = tensor
            continue
        values, packed[name + SCALE_SUFFIX] = int8_rows(tensor.float().flatten(1))
        packed[name] = values.view(tensor.shape)
    return packed


def unpack(values: Tensor, scale: Tensor) -> Tensor:
    """The fp32 tensor of int8 values and the scales of their rows."""
    return values.float() * scale.view(-1, *[1] * (values.ndim - 1))
