"""Products with quantised weights on x86 CPUs, by the kernels that PyTorch brings (oneDNN, ATen): memory-bound at one row.

    int8   oneDNN multiplies unsigned by signed bytes and sums in int32, without rounding. Activations are no bytes, so each row is
           written with two digits of 7 bits, x = largest(x) / 8127 * (128 * hi + lo), and multiplied as two rows. At one row the time
           is that of reading the weights, so the second digit is nearly free; with one digit of 8 bits activations would add as much
           error as the weights have. 7 bits keep pairs of products within 16 bits, where CPUs without VNNI sum them.
    fp8    every float8 number is a bf16 number too: a bf16 product, of which the scales are taken. No faster than bf16.
    int4   ATen's kernel for few rows of bf16; for many rows the matrix is expanded to bf16 first.

What comes out for a row does not depend on the rows beside it, but for int4 between few and many rows (bf16 rounding).
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

DIGIT = 128
LARGEST = 63 * DIGIT + DIGIT // 2 - 1
"""The largest activation of a row in units of its low digit: 8127."""
OFFSET = DIGIT // 2
"""What stands for zero in a digit: digits are unsigned."""
MANY_ROWS = 64
"""From here on expanding an int4 matrix costs less than ATen's kernel loses to a bf16 product."""
EXPANDED_AT_ONCE = 2**18
"""Bytes of int4 that are expanded while they are in a core's cache."""
INT4_ROWS = 16
"""ATen packs whole blocks of this many rows."""


@functools.cache
def is_available() -> bool:
    """Whether this computer and this PyTorch have the kernels."""
    return platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


class Int8:
    """A packed int8 matrix. values: [n, k]; scale: [n]."""

    def __init__(self, values: Tensor, scale: Tensor, group_size: int) -> None:
        self.packed = torch.ops.onednn.qlinear_prepack(values, None)
        self.scale = scale / LARGEST
        self.zero_points = torch.zeros(len(scale), dtype=torch.int32)
        self.half = torch.tensor(0.5 + OFFSET * (DIGIT + 1))

    def linear(self, x: Tensor) -> Tensor:
        """x: [m, k] fp32; returns [m, n]."""
        largest = x.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        numbers = torch.addcdiv(self.half, x, largest, value=LARGEST).to(torch.int32)
        digits = torch.cat([numbers >> 7, numbers & (DIGIT - 1)]).to(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, OFFSET, self.packed, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        high, low = y.chunk(2)
        return torch.add(low, high, alpha=DIGIT).mul_(largest)


class Fp8:
    """A float8 matrix, packed as bf16. values: [n, k]; scale: [n]."""

    def __init__(self, values: Tensor, scale: Tensor, group_size: int) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(values.to(torch.bfloat16), None)
        self.scale = scale

    def linear(self, x: Tensor) -> Tensor:
        """x: [m, k] fp32; returns [m, n]."""
        y = torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), self.packed, None, "none", [], "")
        return y.float() * self.scale


class Int4:
    """A packed int4 matrix. numbers: [n, k] -8 to 7; scale: [n, groups], bf16 numbers."""

    def __init__(self, numbers: Tensor, scale: Tensor, group_size: int) -> None:
        self.num_rows, self.group_size = len(scale), group_size
        padding = -self.num_rows % INT4_ROWS
        numbers, scale = F.pad(numbers.int() + 8, (0, 0, 0, padding)), F.pad(scale.to(torch.bfloat16), (0, 0, 0, padding))
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        self.scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()

    def linear(self, x: Tensor) -> Tensor:
        """x: [m, k] fp32; returns [m, n]."""
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), self.packed, self.group_size, self.scale_and_zero)
        return y[:, : self.num_rows].float()


def expand_int4(values: Tensor, scale: Tensor) -> Tensor:
    """The bf16 matrix [n, k] of int4 values [n, k/2] and scale [n, groups]: a byte's two numbers are looked up as one 32-bit word."""
    byte = torch.arange(256)
    words = torch.stack([(byte & 15) - 8, (byte >> 4) - 8], -1).to(torch.bfloat16).view(torch.int32).flatten()
    n, half = values.shape
    matrix = torch.empty(n, 2 * half, dtype=torch.bfloat16)
    num_rows = max(1, EXPANDED_AT_ONCE // half)
    for out, part, part_scale in zip(*(t.split(num_rows) for t in (matrix, values, scale.to(torch.bfloat16))), strict=True):
        numbers = words.index_select(0, part.flatten().int()).view(torch.bfloat16)
        torch.mul(numbers.view(*part_scale.shape, -1), part_scale[..., None], out=out.view(*part_scale.shape, -1))
    return matrix


PACKED = {"int8": Int8, "fp8": Fp8, "int4": Int4}
Packed = Int8 | Fp8 | Int4
