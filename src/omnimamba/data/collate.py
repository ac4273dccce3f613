"""From samples to padded id tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_right(rows: Sequence[Sequence[int]], value: int, multiple: int = 1) -> Tensor:
    """int64 [b, l]: rows padded on the right to the longest, rounded up to a multiple."""
    length = max(len(row) for row in rows)
    length += -length % multiple
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.as_tensor(row)
    return padded
