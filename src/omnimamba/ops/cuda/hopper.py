"""What kernels that only Hopper runs share on the host's side (`warpgroup.cuh`)."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from omnimamba.ops.cuda.compile import TensorMap, can_run, check_driver, driver


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Neither older nor newer tensor cores take these instructions."""
    return can_run(device) and torch.cuda.get_device_capability(device) == (9, 0)


def tensor_map(tensor: Tensor, positions: int = 64) -> TensorMap:
    """The driver's description of a bf16 tensor [b, l, columns], dense in its last axis, in boxes of so many positions and 64 columns.

    Its address and strides are multiples of 16 bytes. RuntimeError if the driver refuses.
    """
    bfloat16, no_interleaving, swizzle_128_bytes, promotion_to_256_bytes, zeros_outside = 9, 0, 3, 3, 0
    space = ctypes.create_string_buffer(128 + 64)
    address = -(-ctypes.addressof(space) // 64) * 64
    b, l, columns = tensor.shape
    sizes, strides = (ctypes.c_uint64 * 3)(columns, l, b), (ctypes.c_uint64 * 2)(2 * tensor.stride(1), 2 * tensor.stride(0))
    box, steps = (ctypes.c_uint32 * 3)(64, positions, 1), (ctypes.c_uint32 * 3)(1, 1, 1)
    check_driver(
        driver().cuTensorMapEncodeTiled(
            ctypes.c_void_p(address), bfloat16, 3, ctypes.c_void_p(tensor.data_ptr()), sizes, strides, box, steps,
            no_interleaving, swizzle_128_bytes, promotion_to_256_bytes, zeros_outside,
        )
    )  # fmt: skip
    return TensorMap.from_buffer_copy(ctypes.string_at(address, 128))
