"""Which way an operator runs, its fused kernel or its plain PyTorch definition, and one announcement where the plain way surprises."""

import contextlib
import functools
import importlib.util
import logging
import os
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("omnimamba.ops")

KERNELS_DEFAULT = "1"


@functools.cache
def missing_for_kernels(compiler: str = "triton") -> str | None:
    """Why no kernels run in this process, those of Triton or those of Numba; None where they do.

    The environment variable OMNIMAMBA_KERNELS turns them on (1, the default) and off (0).
    """
    switch = os.environ.get("OMNIMAMBA_KERNELS", KERNELS_DEFAULT)
    if switch not in ("0", "1"):
        raise ValueError(f"OMNIMAMBA_KERNELS={switch!r}: set it to 1 (fused kernels) or 0 (plain PyTorch)")
    if switch == "0":
        return "OMNIMAMBA_KERNELS=0 turns the fused kernels off; 1 turns them on"
    return None if importlib.util.find_spec(compiler) else f"{compiler.capitalize()} is not installed"


def runs_kernel(x: Tensor) -> bool:
    """Whether the operator's kernel computes this call. Where the plain path runs on a GPU instead, says so once per process."""
    if not x.is_cuda or x.numel() == 0 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    reason = missing_for_kernels()
    if reason:
        announce_plain_path(x.device, reason)
    return reason is None


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within, a GPU is the thread's current one, where Triton launches and graphs are captured, wherever the tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def runs_compiled(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel compiled for CPUs computes this call of an operator: one without gradients."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and type(x) is Tensor  # others, as those of FakeTensorMode, need not lie in memory
        and x.device.type == "cpu"
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *others)))
        and missing_for_kernels("numba") is None
    )


@functools.cache
def _announce(device_type: str, reason: str, what: str) -> None:
    logger.warning("%s as plain PyTorch on %s (%s): correct, but slower than fused kernels", what, device_type.upper(), reason)


def announce_plain_path(device: torch.device, reason: str, what: str = "sequence operators run") -> None:
    """Logs once per process and reason that the plain path runs where fused kernels could."""
    if not torch.compiler.is_compiling():
        _announce(device.type, reason, what)
