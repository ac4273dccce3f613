"""What kernels over whole sequences share: where numbers lie, in fp32 or bf16, and threads that each take a part of the work."""

# pyright: reportCallIssue=false
# An intrinsic's own first argument is Numba's, a call does not pass it.

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from omnimamba.ops.cpu.vector import jit, load_bf16, load_f32, store_bf16, store_f32


class Strided(NamedTuple):
    """A tensor [b, l, ...] whose last dimension is contiguous."""

    address: int
    sequence: int
    """Bytes from one sequence to the next."""
    position: int

    @classmethod
    def of(cls, tensor: Tensor) -> Strided:
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        return cls(tensor.data_ptr(), *(stride * tensor.itemsize for stride in tensor.stride()[:2]))


@jit
def row_at(tensor, b, t):
    return tensor.address + tensor.sequence * b + tensor.position * t


@jit
def load(address, is_bf16):
    return load_bf16(address) if is_bf16 else load_f32(address)


@jit
def store(address, vector, is_bf16):
    if is_bf16:
        store_bf16(address, vector)
    else:
        store_f32(address, vector)


def in_parts(work: Callable[[int, int, int], None], num: int) -> None:
    """Calls work(thread, first, last) for ranges that together are range(num), each in a thread."""
    num_threads = torch.get_num_threads()
    num_parts = max(1, min(num_threads, num))

    def part(thread: int) -> None:
        work(thread, num * thread // num_parts, num * (thread + 1) // num_parts)

    others: list[Future[None]] = []
    try:
        for thread in range(1, num_parts):
            others.append(_threads(num_threads - 1).submit(part, thread))
        part(0)
    finally:
        for other in others:
            other.result()


@functools.cache
def _threads(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num, "sequences")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # the threads stay with the parent
