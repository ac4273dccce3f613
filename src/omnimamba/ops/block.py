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


class Ready(NamedTuple):
    """The weights of a block as its kernels and products read them: in the dtype of products, but for the last three, which are fp32."""

    in_proj: Tensor  # [n, d + p], beside it LoRA's B times its scaling, filled up with zeros
    lora_B: Tensor | None  # [n, r], the same B
    out_proj: Tensor  # [d, d_inner]
    taps: Tensor  # [w, c]
    conv_bias: Tensor  # [c]
    dt_bias: Tensor  # [h]
    A: Tensor  # [h]
    D: Tensor  # [h]


class ReadyWeights:
    """Those of blocks, kept for several passes through the same weights; of each block those with the LoRA that was asked for last.

    Whoever changes weights has to call `clear`: they do not tell (a fused optimizer leaves a tensor's version as it is).
    """

    def __init__(self) -> None:
        self.found: dict[int, tuple[BlockWeights, Ready]] = {}

    def get(self, weights: BlockWeights, make: Callable[[], Ready]) -> Ready:
        """Those of `weights`; what `make` returns if they were not asked for last."""
        block = id(weights.in_proj)
        if block in self.found and self.found[block][0].lora_B is weights.lora_B:
            return self.found[block][1]
        self.found.pop(block, None)  # its memory first
        self.found[block] = weights, make()
        return self.found[block][1]

    def clear(self) -> None:
        self.found.clear()


class Saving(NamedTuple):
    """What training trades between time and memory."""

    recompute: bool = False
    """A backward pass computes most of a block a second time (activation checkpointing): all but the residual stream is computed again, or
    all but that, the scan and out_proj where a block is one operator."""
    ready: ReadyWeights | None = None
    """Where weights stay that are ready for kernels; they are made ready for each pass otherwise."""


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
    ready: ReadyWeights | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream [b, l, d] that the block reads, with `hidden` added, and what the block adds to it, where `can_learn_block`.

    residual, hidden: [b, l, d]; lengths: [b] valid positions of right-padded rows, whose padding is finite.
    """
    from omnimamba.ops.triton import block as kernel  # Triton need not be installed

    return kernel.learn_block(residual, hidden, weights, options, lengths, ready)
