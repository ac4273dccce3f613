"""Training of a whole Mamba-2 block in one operator where there are kernels for it.

Its definition is `omnimamba.model.mamba2.Mamba2Block.by_operators`, which is composed of the other operators.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from omnimamba.ops.conv import MAX_WIDTH
from omnimamba.ops.plain_path import runs_kernel
from omnimamba.ops.ssd import fits_kernel


class BlockWeights(NamedTuple):
    """In any dtype; products run in autocast's, or in that of the norms where autocast is off."""

    norm: Tensor  # [d]
    in_proj: Tensor  # [n, d], rows z | x | B | C | dt
    lora_A: Tensor | None  # [r, d]
    lora_B: Tensor | None  # [n, r]
    conv: Tensor  # [c, w]
    conv_bias: Tensor  # [c]
    dt_bias: Tensor  # [h]
    A_log: Tensor  # [h]
    D: Tensor  # [h]
    gated_norm: Tensor  # [d_inner]
    out_proj: Tensor  # [d, d_inner]


class Rounded(NamedTuple):
    """The weights of a block's large products, in the dtype of products."""

    in_proj: Tensor  # [n, d + p], beside it LoRA's B times its scaling, filled up with zeros
    lora_B: Tensor | None  # [n, r], the same B
    out_proj: Tensor  # [d, d_inner]


class RoundedWeights:
    """Those of blocks, made once for several passes through the same weights."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, ...], tuple[tuple[Tensor, ...], tuple[int, ...], Rounded]] = {}

    def get(self, weights: BlockWeights, make: Callable[[], Rounded]) -> Rounded:
        """Those of `weights`; what `make` returns if some have changed since, or were not asked for before."""
        sources = tuple(w for w in (weights.in_proj, weights.lora_B, weights.out_proj) if w is not None)
        key, versions = tuple(map(id, sources)), tuple(w._version for w in sources)
        if key not in self.found or self.found[key][1] != versions:
            self.found.pop(key, None)  # its memory first
            self.found[key] = sources, versions, make()
        return self.found[key][2]


class Saving(NamedTuple):
    """What training trades between time and memory."""

    recompute: bool = False
    """A backward pass computes most of a block a second time (activation checkpointing): all but the residual stream is computed again, or
    all but that, the scan and out_proj where a block is one operator."""
    rounded: RoundedWeights | None = None
    """Where the rounded weights of blocks stay, which are made for each pass otherwise."""


EVERYTHING_KEPT = Saving()


class BlockOptions(NamedTuple):
    num_heads: int
    headdim: int
    num_groups: int
    d_state: int
    d_conv: int
    eps: float
    scaling: float
    """Of LoRA."""
    dropout: float
    """Before LoRA."""
    recompute: bool
    """Whether the backward pass computes in_proj again instead of keeping its output."""


def can_learn_block(residual: Tensor, options: BlockOptions) -> bool:
    fits = fits_kernel(options.headdim, options.d_state) and options.d_conv <= MAX_WIDTH
    return torch.is_grad_enabled() and runs_kernel(residual) and fits


def learn_block(
    residual: Tensor,
    hidden: Tensor | None,
    weights: BlockWeights,
    options: BlockOptions,
    lengths: Tensor | None = None,
    rounded: RoundedWeights | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream [b, l, d] that the block reads, with `hidden` added, and what the block adds to it, where `can_learn_block`.

    residual, hidden: [b, l, d]; lengths: [b] valid positions of right-padded rows, whose padding is finite.
    """
    from omnimamba.ops.triton import block as kernel  # Triton need not be installed

    return kernel.learn_block(residual, hidden, weights, options, lengths, rounded)
