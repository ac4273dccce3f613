"""One announcement when an operator runs its plain PyTorch definition on a CUDA device."""

import functools
import logging

import torch

logger = logging.getLogger("omnimamba.ops")


@functools.cache
def _announce(reason: str) -> None:
    logger.warning("sequence operators run as plain PyTorch on CUDA (%s): correct, but slower than fused kernels", reason)


def announce_plain_path(device: torch.device) -> None:
    """Logs once per process that the plain path runs on a GPU; says nothing on CPU and MPS, where it is the product path."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        _announce("this version has no fused kernels")
