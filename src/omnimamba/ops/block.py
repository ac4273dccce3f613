"""Training of a whole Mamba-2 block, residual + mixer(norm(residual)), in one operator where there are kernels for it.

Its definition is `omnimamba.model.mamba2.Mamba2Block.forward`, which is composed of the other operators.
"""

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
    """Whether the backward pass computes in_proj and the convolution again instead of keeping their outputs."""


def can_learn_block(residual: Tensor, options: BlockOptions) -> bool:
    fits = fits_kernel(options.headdim, options.d_state) and options.d_conv <= MAX_WIDTH
    return torch.is_grad_enabled() and runs_kernel(residual) and fits


def learn_block(residual: Tensor, weights: BlockWeights, options: BlockOptions, lengths: Tensor | None = None) -> Tensor:
    """The residual stream [b, l, d] after the block, where `can_learn_block`.

    residual: [b, l, d]; lengths: [b] valid positions of right-padded rows, whose padding is finite.
    """
    from omnimamba.ops.triton import block as kernel  # Triton need not be installed

    return kernel.learn_block(residual, weights, options, lengths)
