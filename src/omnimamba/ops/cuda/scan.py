"""The Mamba-2 scan on Hopper, forwards and backwards, with the tensor cores' own instructions: the host's side of `scan.cu`,
`scan_states.cu` and `scan_gradients.cu`.

`omnimamba.ops.triton.ssd` and `ssd_backward` call these where `fits` says so, and have kernels of the same results for everything else.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from omnimamba.ops.cuda.compile import Kernel, TensorMap, structure
from omnimamba.ops.cuda.hopper import is_hopper, tensor_map

SOURCES = ("primitives.cuh", "tiles.cuh", "warpgroup.cuh", "scan.cuh")
CHUNK = 64  # positions
HEADDIM = 64
HEADS = 2  # that a block walks through at once
THREADS = 3 * 128  # two warpgroups compute, one copies
MIN_POSITIONS = 128
"""Of all rows; fewer leave most multiprocessors without a block, where Triton's kernels split heads."""


# as in the sources
ForwardArguments = structure(
    maps=("x", "B", "C", "z", "y"),
    pointers=("log_decay", "log_input", "D", "initial", "added", "decays", "weight", "squares", "final"),
    ints=("b", "h", "l", "span", "spans", "padded", "heads_per_group"),
)
StatesArguments = structure(
    maps=("x", "dy", "B", "C", "entering", "leaving"),
    pointers=("decays", "initial", "dfinal", "dinitial"),
    ints=("b", "h", "l", "heads_per_group"),
)
GradientsArguments = structure(
    maps=("x", "dy", "B", "C", "entering", "leaving", "dx"),
    pointers=("decays", "D", "dB", "dC", "part_B", "part_C", "parts"),
    longs=("dB_row", "dB_position", "dC_row", "dC_position"),
    ints=("b", "h", "l", "groups", "splits"),
)


def maps_of(*tensors: Tensor, positions: int = 64) -> list[TensorMap]:
    """Of [b, l, heads or groups, channels]."""
    return [tensor_map(tensor.flatten(2), positions) for tensor in tensors]


def pointers_of(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def fits(x: Tensor, B: Tensor, C: Tensor, *others: Tensor) -> bool:
    """Whether the kernels can take these: x and others like it [b, l, h, p], B and C and others like them [b, l, g, n]."""
    return (
        x.shape[0] * x.shape[1] >= MIN_POSITIONS
        and x.shape[3] == HEADDIM
        and B.shape[3] in (64, 128)
        and x.shape[2] // B.shape[2] % HEADS == 0
        and all(is_laid_out(tensor) for tensor in (x, B, C, *others))
        and is_hopper(x.device)
    )


def is_laid_out(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.bfloat16
        and tensor.stride(3) == 1
        and (tensor.shape[2] == 1 or tensor.stride(2) == tensor.shape[3])
        and tensor.stride(0) % 8 == tensor.stride(1) % 8 == tensor.data_ptr() % 16 == 0
    )


def launch(name: str, arguments: ctypes.Structure, blocks: int, device: torch.device, d_state: int, **defines: int) -> None:
    """As many blocks as have something to do, and one on a multiprocessor at most."""
    num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    kernel_of(name, device, D_STATE=d_state, **defines)(arguments, blocks=min(blocks, num_multiprocessors), threads=THREADS)


@functools.cache
def kernel_of(name: str, device: torch.device, **defines: int) -> Kernel:
    shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    defines |= {"SHARED_BYTES": shared_bytes}
    return Kernel((*SOURCES, f"{name}.cu"), name, defines, shared_bytes=shared_bytes, device=device)


class Spans(NamedTuple):
    """How a sequence is cut, and what is known of all spans but the last."""

    length: int
    """Positions of a span, whole chunks."""
    added: Tensor
    """[spans - 1, b, h, p, n] fp32, what each adds to the state."""
    decays: Tensor
    """[spans - 1, b, h] fp32, over each."""


def scan(
    x: Tensor, log_decay: Tensor, log_input: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor | None, spans: Spans,
    y: Tensor, final: Tensor, *, z: Tensor | None = None, weight: Tensor | None = None, squares: Tensor | None = None,
) -> None:  # fmt: skip
    """`forward_kernel` of ops/triton/ssd.py in chunks of 64: fills y [b, l, h, p], final [b, h, p, n], and squares [b, l, h] with the gate
    of z [b, l, h, p] and the norm's weight [h * p]. All but x, B, C and z are dense."""
    b, l, h, _ = x.shape
    g, n = B.shape[2:]
    maps = [*maps_of(x, B, C, x if z is None else z), *maps_of(y, positions=16)]
    pointers = pointers_of(log_decay, log_input, D, initial, spans.added, spans.decays, weight, squares, final)
    num_spans = -(-l // spans.length)
    arguments = ForwardArguments(*maps, *pointers, b, h, l, spans.length, num_spans, log_decay.shape[2], h // g)
    launch("scan", arguments, b * h // HEADS * num_spans, x.device, n, GATED=int(z is not None))


def scan_states(
    x: Tensor, dy: Tensor, B: Tensor, C: Tensor, decays: Tensor, initial: Tensor | None, dfinal: Tensor | None,
    entering: Tensor, leaving: Tensor, dinitial: Tensor,
) -> None:  # fmt: skip
    """`states_kernel` of ops/triton/ssd_backward.py in both directions: fills entering and leaving [b, chunks, h, p, n] and dinitial."""
    b, l, h, _ = x.shape
    g, n = B.shape[2:]
    maps = [*maps_of(x, dy, B, C), *(tensor_map(states.view(1, -1, n)) for states in (entering, leaving))]
    arguments = StatesArguments(*maps, *pointers_of(decays, initial, dfinal, dinitial), b, h, l, h // g)
    launch("scan_states", arguments, 2 * b * h // HEADS, x.device, n)


def scan_gradients(
    x: Tensor, dy: Tensor, B: Tensor, C: Tensor, D: Tensor, decays: Tensor, entering: Tensor, leaving: Tensor,
    dx: Tensor, dB: Tensor, dC: Tensor, partial: Tensor | None, parts: Tensor,
) -> None:  # fmt: skip
    """`inputs_kernel` and `weights_kernel` of ops/triton/ssd_backward.py: fills dx, parts, and partial [2, b, l, g * splits, n] or, without
    that, dB and dC."""
    b, l, h, _ = x.shape
    g, n = B.shape[2:]
    (of_x, of_B, of_dx), (of_dy, of_C) = maps_of(x, B, dx, positions=8), maps_of(dy, C)
    maps = [of_x, of_dy, of_B, of_C, *(tensor_map(states.view(1, -1, n)) for states in (entering, leaving)), of_dx]
    part_B, part_C = (None, None) if partial is None else partial
    pointers = pointers_of(decays, D, dB, dC, part_B, part_C, parts)
    strides = [stride for tensor in (dB, dC) for stride in tensor.stride()[:2]]
    splits = 1 if partial is None else partial.shape[3] // g
    arguments = GradientsArguments(*maps, *pointers, *strides, b, h, l, g, splits)
    launch("scan_gradients", arguments, b * -(-l // CHUNK) * g * splits, x.device, n)
