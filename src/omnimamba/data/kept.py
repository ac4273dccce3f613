"""What several runs of one process make of the same data, made once: decoded images, VQ ids, conversations, tokenised texts.

Whoever starts the runs makes a `Kept`, passes it to each and drops it, which frees everything. A key names all that its value depends
on; files that are read count as unchanged meanwhile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import nn

Value = TypeVar("Value")
MOST_VALUES = 64
"""A run of two tasks and two splits makes a dozen."""


class Kept:
    """Values by key, those last asked for: with one more than `most`, the one that was not asked for longest is forgotten."""

    def __init__(self, most: int = MOST_VALUES) -> None:
        self.most = most
        self.values: dict[Hashable, Any] = {}

    def find(self, key: Hashable) -> Any:
        """The value of the key; None if there is none."""
        if key not in self.values:
            return None
        self.values[key] = self.values.pop(key)  # the last in order
        return self.values[key]

    def keep(self, key: Hashable, value: Any) -> None:
        self.values[key] = value
        while len(self.values) > self.most:
            del self.values[next(iter(self.values))]

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of the key, made if there is none."""
        if (value := self.find(key)) is None:
            self.keep(key, value := make())
        return value


def weights_digest(module: nn.Module) -> str:
    """Of the names, shapes and values of all that a module has learned."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
