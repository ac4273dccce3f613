"""Weights of finished parts: frozen encoders, and what a run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from omnimamba.model.files import TensorFile
from omnimamba.model.weights import check_names_and_shapes


def load_weights(module: nn.Module, file: str | Path) -> None:
    """Loads a safetensors file into the module, in place. ValueError, one line, if it is not there or does not fit."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the recipe that makes it comes first")
    tensors = TensorFile(path)
    check_names_and_shapes(module.state_dict(), tensors, str(path))
    module.load_state_dict(dict(tensors))


def load_frozen(module: Any, file: str, device: torch.device) -> Any:
    """The module with the weights of `file`, frozen; None where no file is named."""
    if not file:
        return None
    load_weights(module, file)
    return module.to(device).eval().requires_grad_(False)
