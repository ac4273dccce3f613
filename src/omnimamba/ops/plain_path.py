"""Which way an operator runs, its Triton kernel or its plain PyTorch definition, and one announcement where the plain way surprises."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger("omnimamba.ops")

KERNELS_DEFAULT = "1"


@functools.cache
def missing_for_kernels() -> str | None:
    """Why no kernels run in this process; None where they do.

    The environment variable OMNIMAMBA_KERNELS turns them on (1, the default) and off (0).
    """
    switch = os.environ.get("OMNIMAMBA_KERNELS", KERNELS_DEFAULT)
    if switch not in ("0", "1"):
        raise ValueError(f"OMNIMAMBA_KERNELS={switch!r}: set it to 1 (Triton kernels) or 0 (plain PyTorch)")
    if switch == "0":
        return "OMNIMAMBA_KERNELS=0 turns the fused kernels off; 1 turns them on"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def runs_kernel(x: Tensor) -> bool:
    """Whether the operator's kernel computes this call. Where the plain path runs on a GPU instead, says so once per process."""
    if not x.is_cuda or x.numel() == 0 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    reason = missing_for_kernels()
    if reason:
        announce_plain_path(x.device, reason)
    return reason is None


@functools.cache
def _announce(reason: str) -> None:
    logger.warning("sequence operators run as plain PyTorch on CUDA (%s): correct, but slower than fused kernels", reason)


def announce_plain_path(device: torch.device, reason: str) -> None:
    """Logs once per process and reason that the plain path runs on a GPU; says nothing on CPU and MPS, where it is the product path."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _announce(reason)
