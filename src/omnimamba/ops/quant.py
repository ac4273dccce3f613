"""Weight-only quantisation: a matrix of 8 or 4 bits a number with fp32 scales, and the product with it.

    scheme  values                     scale            relative error of a normally distributed weight
    int8    [n, k] int8                [n] per row      0.8 %
    fp8     [n, k] float8_e4m3fn       [n] per row      2.6 %
    int4    [n, k/2] uint8, see below  [n, k/64]        9.0 %

Activations are not quantised; on a CPU they are rounded (quant_cpu.py). This is about what is computed with: weights that only lie on
disk in 8 bits are the matter of `model/packing.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimamba.ops import quant_cpu

GROUP_SIZE = 64
"""Columns that share a scale in int4. 32 would have 8.2 % error at 5 bits a number, 128 has 9.7 % at 4.25; 64 takes 4.5."""
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's largest number that int4 tries as its range; the one with the least squared error stays."""
TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
"""Of the values, by scheme."""


class QuantizedWeight(nn.Module):
    """The matrix [n, k] that `values` and `scale` stand for; takes the place of a weight parameter.

    int4: byte i of a row holds column 2i in its low and column 2i+1 in its high four bits, each 8 more than the number (-8 to 7). Its
    scales are bf16 numbers kept in fp32, some negative: the number of largest magnitude in a group becomes -8.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self._packed: tuple[Tensor, quant_cpu.Packed] | None = None

    @property
    def scheme(self) -> str:
        return next(scheme for scheme, dtype in TYPES.items() if dtype is self.values.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.values.shape
        return (n, 2 * k) if self.scheme == "int4" else (n, k)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole matrix [n, k]."""
        return dequantize(self.values, self.scale, dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of the matrix as an embedding looks them up. ids: [...]; returns [..., k]."""
        flat = ids.flatten()
        values = self.values.view(torch.uint8)[flat].view(self.values.dtype)  # torch 2.8 takes no rows of fp8 on a CPU
        return dequantize(values, self.scale[flat], dtype).view(*ids.shape, self.shape[1])

    def packed(self) -> quant_cpu.Packed:
        """The matrix as the CPU's kernels want it: a copy beside `values`, made on first use."""
        if self._packed is None or self._packed[0] is not self.values:
            numbers = unpack_int4(self.values) if self.scheme == "int4" else self.values
            self._packed = self.values, quant_cpu.PACKED[self.scheme](numbers, self.scale, GROUP_SIZE)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}  # oneDNN's tensors can be neither copied nor pickled

    def extra_repr(self) -> str:
        return f"{self.scheme}, {self.shape[0]}x{self.shape[1]}"


@torch.no_grad()
def quantize(weight: Tensor, scheme: str) -> QuantizedWeight:
    """The matrix weight [n, k] in a scheme. ValueError if it is not known or k is not whole groups of int4."""
    if scheme not in TYPES:
        raise ValueError(f"unknown quantization {scheme!r}; valid: {', '.join(TYPES)}")
    weight = weight.detach().float()
    if scheme == "int4":
        return QuantizedWeight(*int4_groups(weight))
    if scheme == "int8":
        return QuantizedWeight(*int8_rows(weight))
    scale = largest(weight) / torch.finfo(torch.float8_e4m3fn).max
    return QuantizedWeight((weight / scale[:, None]).to(torch.float8_e4m3fn), scale)


def int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and scales [n] of rows [n, k]: symmetric, round to nearest, the largest of a row at 127."""
    scale = largest(rows) / 127
    return (rows / scale[:, None]).round().to(torch.int8), scale


def largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row [n], positive also where a row is zero."""
    return rows.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)


def int4_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed values [n, k/2] and scales [n, k/64] of weight [n, k]; see `QuantizedWeight`."""
    k = weight.shape[1]
    if k % GROUP_SIZE:
        raise ValueError(f"int4 weights share a scale among {GROUP_SIZE} columns, and {k} columns are not a multiple; use int8 or fp8")
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    scale = torch.where(extreme == 0, 1.0, torch.nan)  # what no try improves: groups of zeros, and those with NaN, which stay NaN
    numbers, error = torch.zeros_like(groups), torch.full_like(extreme, torch.inf)
    for share in CLIPPING:
        tried = (extreme * (share / -8)).to(torch.bfloat16).float()
        steps = groups / torch.where(tried == 0, 1, tried)[..., None]
        nearest = steps.round().clamp(-8, 7)
        tried_error = (steps - nearest).square().sum(-1) * (tried / extreme).square()  # no overflow: in units of the extreme
        is_better = tried_error < error
        scale, error = torch.where(is_better, tried, scale), torch.where(is_better, tried_error, error)
        numbers = torch.where(is_better[..., None], nearest, numbers)
    nibbles = numbers.add(8).to(torch.uint8).flatten(1)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale


def unpack_int4(values: Tensor) -> Tensor:
    """The numbers -8 to 7 [n, k] int8 of packed values [n, k/2]."""
    return torch.stack([values & 15, values >> 4], -1).flatten(1).to(torch.int8) - 8


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [n, k] of values and scales of a `QuantizedWeight`."""
    if values.dtype is torch.uint8:
        return (unpack_int4(values).unflatten(1, (-1, GROUP_SIZE)).float() * scale[..., None]).flatten(1).to(dtype)
    return (values.float() * scale[:, None]).to(dtype)


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """x @ weight.T in x's dtype. x: [..., k]; weight: [n, k]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    if x.device.type != "cpu" or not quant_cpu.is_available():
        return F.linear(x, weight.dequantize(x.dtype))
    if weight.scheme == "int4" and x.numel() >= quant_cpu.MANY_ROWS * x.shape[-1]:
        return F.linear(x.to(torch.bfloat16), quant_cpu.expand_int4(weight.values, weight.scale)).to(x.dtype)
    y = weight.packed().linear(x.reshape(-1, x.shape[-1]).float())
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])
