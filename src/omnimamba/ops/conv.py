"""Causal depthwise convolution over x|B|C with SiLU, and its one-step form (Mamba, arXiv:2312.00752).

The conv state of a sequence is its last `w` inputs, oldest first, zeros where it is shorter: [b, c, w].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimamba.ops.cpu import LANES
from omnimamba.ops.plain_path import announce_plain_path, runs_compiled, runs_kernel

MAX_WIDTH = 4
"""Of a convolution that the kernels compute; the one for CPUs knows no smaller ones."""


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, initial_state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """silu(conv(x) + bias) and the conv state after each row's last valid input.

    x: [b, l, c]; weight: [c, w]; bias: [c]; initial_state: [b, c, w]; lengths: [b] valid inputs of right-padded rows.
    Returns y [b, l, c] and the new state [b, c, w]; `initial_state` is not changed.
    """
    if runs_kernel(x):
        if weight.shape[1] <= MAX_WIDTH:
            from omnimamba.ops.triton import conv as kernel  # Triton need not be installed

            return kernel.causal_conv1d(x, weight, bias, initial_state=initial_state, lengths=lengths)
        announce_plain_path(x.device, f"there is no kernel for d_conv={weight.shape[1]}; {MAX_WIDTH} is the largest")
    elif weight.shape[1] == MAX_WIDTH and x.shape[2] % LANES == 0 and runs_compiled(x, weight, bias, initial_state):
        from omnimamba.ops.cpu import conv  # Numba takes a moment to load

        return conv.causal_conv1d(x, weight, bias, initial_state=initial_state, lengths=lengths)
    return plain_causal_conv1d(x, weight, bias, initial_state=initial_state, lengths=lengths)


def plain_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, *, initial_state: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of `causal_conv1d`."""
    b, l, c = x.shape
    w = weight.shape[1]
    past = x.new_zeros(b, w, c) if initial_state is None else initial_state.transpose(1, 2).to(x.dtype)
    inputs = torch.cat([past, x], dim=1)  # input t sits at row w + t
    y = bias.to(x.dtype)
    for tap in range(w):
        y = y + inputs[:, tap + 1 : tap + 1 + l] * weight[:, tap].to(x.dtype)
    if lengths is None:
        last = inputs[:, l:]
    else:
        rows = lengths[:, None] + torch.arange(w, device=x.device)
        last = inputs.gather(1, rows[:, :, None].expand(b, w, c))
    return F.silu(y), last.transpose(1, 2)


def causal_conv1d_step(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(conv + bias) for one new input; `conv_state` [b, c, w] is shifted in place.

    x: [b, c]; weight: [c, w]; bias: [c]. Returns [b, c].
    """
    conv_state.copy_(torch.cat([conv_state[:, :, 1:], x[:, :, None].to(conv_state.dtype)], dim=2))
    y = (conv_state.to(x.dtype) * weight.to(x.dtype)).sum(-1)
    return F.silu(y + bias.to(x.dtype))
