"""Everything between a layer's two projections for one position of many rows: the host's side of `mix_rows.cu`."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnimamba.ops.cuda.compile import PROGRAMMATIC, Kernel, can_run, structure
from omnimamba.ops.triton.decode import LayerWeights

SOURCES = ("primitives.cuh", "channels.cuh", "mixer.cuh", "mix_rows.cu")
TILE_BYTES = 4096
NUM_WARPS = 8  # that update states
NUM_PREPARING = 8  # warps that make what the others need
THREADS = 32 * (NUM_WARPS + NUM_PREPARING)
MAX_ROWS = THREADS
CHUNK_BYTES = 65536  # of states, whose channels are prepared at once
MAX_STAGES = 3  # more make nothing faster
PACE = 1800  # cycles from one of a warp's first tiles, which travel while the kernel before ends, to the next

Arguments = structure(  # as in mix_rows.cu
    pointers=(
        "projected", "lora_B", "conv_weight", "conv_bias", "A_log", "D", "dt_bias", "conv", "ssm", "slots", "is_t2i", "norm", "gated",
        "squares", "newest", "counter",
    ),
    longs=("projected_row", "conv_slot", "ssm_slot"),
    ints=("num_rows",),
    floats=("lora_scaling",),
)  # fmt: skip


class Shape(NamedTuple):
    """What the kernel is compiled for."""

    d_inner: int
    num_heads: int
    d_state: int
    rank: int
    half_state: bool
    num_stages: int

    @classmethod
    def of(cls, layer: LayerWeights, num_rows: int, shared_bytes: int) -> Shape | None:
        """Of such layers on a device of so much shared memory for a block; None if the kernel cannot.

        It wants bf16, states in bf16 or fp32, a convolution of four taps, d_state 64 or 128, and heads of whole tiles.
        """
        num_heads, headdim, d_state = layer.ssm.shape[1:]
        floats = (layer.gated_norm, layer.lora.B, layer.mixer.conv_weight, layer.mixer.conv_bias, layer.conv)
        fits = (
            num_rows <= MAX_ROWS
            and all(tensor.dtype == torch.bfloat16 for tensor in floats)
            and layer.ssm.dtype in (torch.float32, torch.bfloat16)
            and layer.conv.shape[2] == 4
            and d_state in (64, 128)
        )
        shape = cls(num_heads * headdim, num_heads, d_state, layer.lora.rank, layer.ssm.dtype == torch.bfloat16, 0)
        if not fits or headdim % shape.tile:
            return None
        num_stages = min(MAX_STAGES, (shared_bytes - shape.work_bytes) // (NUM_WARPS * TILE_BYTES))
        return shape._replace(num_stages=num_stages) if num_stages > 1 else None

    def defines(self) -> dict[str, Any]:
        own = {name.upper(): int(value) for name, value in self._asdict().items()}
        sizes = {"TILE_BYTES": TILE_BYTES, "SHARED_BYTES": self.work_bytes, "CHUNK": self.chunk}
        return own | sizes | {"NUM_WARPS": NUM_WARPS, "NUM_PREPARING": NUM_PREPARING, "PACE": PACE}

    @property
    def tile(self) -> int:
        """Channels that are updated at once."""
        return TILE_BYTES // (self.d_state * (2 if self.half_state else 4))

    @property
    def chunk(self) -> int:
        """Channels that are prepared at once: whole tiles, and of a row a whole number."""
        tiles = self.d_inner // self.tile
        most = CHUNK_BYTES // TILE_BYTES
        return self.tile * next(num for num in range(min(most, tiles), 0, -1) if tiles % num == 0)

    @property
    def row_chunks(self) -> int:
        """Chunks of a row."""
        return self.d_inner // self.chunk

    @property
    def work_bytes(self) -> int:
        """Of a block's shared memory beside the rings, `Shared` in mix_rows.cu, or a little more."""
        tiles = self.chunk // self.tile
        places = (MAX_STAGES * NUM_WARPS - 1) // tiles + 3
        barriers = NUM_WARPS * MAX_STAGES + places + 4
        return 2 * (24 * self.chunk + 8 * self.d_state + 4 * tiles) + 8 * MAX_ROWS + 4 * (THREADS // 32 + places) + 8 * barriers + 16

    @property
    def shared_bytes(self) -> int:
        return self.num_stages * NUM_WARPS * TILE_BYTES + self.work_bytes


def device_shape(layer: LayerWeights, num_rows: int, device: torch.device) -> Shape | None:
    """What to compile for this device; None if the kernel cannot run there."""
    if not can_run(device):
        return None
    return Shape.of(layer, num_rows, torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


class Mixed(NamedTuple):
    """What the kernel makes of b rows, for what follows it."""

    gated: Tensor
    """[b or more, h * p] bf16: y * silu(z), times the weight of the gated norm."""
    squares: Tensor
    """[b, row_chunks] fp32, whose sum is that of the squares of y * silu(z)."""
    newest: Tensor
    """[b, 2 * n] fp32: B and C before the convolution, for `ops.triton.decode.Shift`."""


def arguments_of(projected: Tensor, layer: LayerWeights, slots: Tensor, is_t2i: Tensor, mixed: Mixed, counter: Tensor) -> ctypes.Structure:
    tensors = (projected, layer.lora.B, *layer.mixer, layer.conv, layer.ssm, slots, is_t2i, layer.gated_norm, *mixed, counter)
    strides = (projected.stride(0), layer.conv.stride(0), layer.ssm.stride(0))
    return Arguments(*(tensor.data_ptr() for tensor in tensors), *strides, slots.shape[0], layer.lora.scaling)


@functools.cache
def kernel_of(shape: Shape, device: torch.device) -> Kernel:
    return Kernel(SOURCES, "mix_rows", shape.defines(), shared_bytes=shape.shared_bytes, device=device)


def mix_rows(
    shape: Shape, projected: Tensor, layer: LayerWeights, slots: Tensor, is_t2i: Tensor, mixed: Mixed, counter: Tensor, *,
    pdl: bool = False,
) -> None:  # fmt: skip
    """Fills `mixed`; the layer's SSM states and x's part of its conv states are updated in place.

    projected: [b, z|x|B|C|dt|A u of MMU|A u of T2I] bf16; slots, is_t2i: [b] int64, a negative slot is padding; counter: [1] int32, 0
    before and after, by which blocks agree on who does what: each layer of a step has its own.
    """
    device = projected.device
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    arguments = arguments_of(projected, layer, slots, is_t2i, mixed, counter)
    kernel_of(shape, device)(arguments, blocks=blocks, threads=THREADS, attributes=[PROGRAMMATIC] if pdl else [])
