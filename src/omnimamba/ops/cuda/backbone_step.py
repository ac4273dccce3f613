"""One position of the whole backbone and the heads in one launch, for one row or two: the host's side of `backbone_step.cu`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from omnimamba.ops.cuda.compile import COOPERATIVE, Kernel, can_run, structure
from omnimamba.ops.triton.decode import LayerWeights, Weight

SOURCES = ("primitives.cuh", "channels.cuh", "mixer.cuh", "backbone_step.cu")
MAX_ROWS = 2
NUM_WARPS = 16  # of a block, beside the two that copy
THREADS = 32 * (NUM_WARPS + 2)
MAX_STAGES = 32
WEIGHTS = {torch.bfloat16: "Bf16", torch.int8: "Int8", torch.float8_e4m3fn: "Fp8"}
MAX_SLICES = 8  # warps that share a row of a matrix, 256 columns or more each
UNIT = 8  # channels that no block's share divides
PACE = {"Bf16": 0, "Int8": 82, "Fp8": 96}  # cycles that the stream takes for a KiB, or more: so that it fills a layer's time
SEGMENT = 64  # rows of a matrix whose sums are in shared memory at once

Arguments = structure(  # as in backbone_step.cu
    pointers=("layers", "heads", "final_norm", "slots", "is_t2i", "embedded", "residual", "common", "y", "counters"),
    longs=("conv_slot", "ssm_slot"),
    ints=("num_layers", "num_heads"),
    floats=("eps", "lora_scaling"),
)


class Shape(NamedTuple):
    """What the kernel is compiled for."""

    d_model: int
    d_inner: int
    num_heads: int
    d_state: int
    rank: int
    num_rows: int
    layer_weights: str
    head_weights: str
    half_state: bool
    channels: int
    """Of a warp, in the state update."""
    slices: int
    """Warps that share a row of a matrix."""
    num_stages: int

    @classmethod
    def of(cls, layer: LayerWeights, heads: Sequence[Weight], num_rows: int, blocks: int, shared_bytes: int) -> Shape | None:
        """Of such layers and heads on a device of so many multiprocessors, each with so much shared memory; None if the kernel cannot.

        It wants bf16 and matrices of bf16, int8 or float8, a d_model of 256, 512, 1024 or multiples of
        2048, a convolution of four taps, d_state 64 or 128, an even rank of LoRA.
        """
        num_heads, headdim, d_state = layer.ssm.shape[1:]
        d_inner, (d_in_proj, d_model) = num_heads * headdim, layer.in_proj.values.shape
        slices = max(1, min(MAX_SLICES, d_model // 256))
        channels = triton.cdiv(UNIT * triton.cdiv(d_inner // UNIT, blocks), NUM_WARPS)
        floats = (layer.norm, layer.gated_norm, layer.lora.A, layer.lora.B, layer.mixer.conv_weight, layer.mixer.conv_bias, layer.conv)
        kinds = {layer.in_proj.values.dtype, layer.out_proj.values.dtype}
        head_kinds = {head.values.dtype for head in heads}
        fits = (
            num_rows <= MAX_ROWS
            and all(tensor.dtype == torch.bfloat16 for tensor in floats)
            and layer.ssm.dtype in (torch.float32, torch.bfloat16)
            and len(kinds) == len(head_kinds) == 1
            and kinds | head_kinds <= WEIGHTS.keys()
            and d_model % (256 * slices) == d_inner % (256 * slices) == 0
            and slices & (slices - 1) == 0
            and d_inner <= 2 * d_model
            and num_heads % UNIT == 0
            and d_in_proj == 2 * d_inner + 2 * d_state + num_heads
            and layer.conv.shape[2] == 4
            and layer.lora.rank > 0
            and layer.lora.rank % 2 == 0
            and d_state * layer.ssm.itemsize in (256, 512)
            and d_state in (64, 128)
            and 2 * d_state + NUM_WARPS * channels <= 32 * NUM_WARPS
        )
        if not fits:
            return None
        shape = cls(
            d_model, d_inner, num_heads, d_state, layer.lora.rank, num_rows, WEIGHTS[kinds.pop()], WEIGHTS[head_kinds.pop()],
            layer.ssm.dtype == torch.bfloat16, channels, slices, MAX_STAGES,
        )  # fmt: skip
        num_groups = NUM_WARPS // slices
        num_stages = min(MAX_STAGES, (shared_bytes - shape.work_bytes) // shape.stage_bytes) // num_groups * num_groups
        return shape._replace(num_stages=num_stages) if num_stages > 0 else None

    def defines(self) -> dict[str, Any]:
        own = {name.upper(): int(value) if isinstance(value, bool) else value for name, value in self._asdict().items()}
        pace = PACE[self.layer_weights] * self.stage_bytes // 1024
        sizes = {"STAGE_BYTES": self.stage_bytes, "SHARED_BYTES": self.work_bytes}
        return own | sizes | {"PACE": pace, "NUM_WARPS": NUM_WARPS, "UNIT": UNIT, "SEGMENT": SEGMENT}

    @property
    def stage_bytes(self) -> int:
        """Of a stage of the ring."""
        return 8 * self.d_model

    @property
    def work_bytes(self) -> int:
        """Of a block's shared memory beside the ring, `Shared` in backbone_step.cu, or a little more."""
        b, own = self.num_rows, NUM_WARPS * self.channels
        conv = 2 * self.d_state + own
        lora = b * self.rank * 2 * (conv + own + self.num_heads)
        states = b * own * self.d_state * (2 if self.half_state else 4)
        extras = 8 * conv * (1 + b) + 2 * conv + lora + 12 * self.num_heads + states
        common = 2 * self.d_state + self.num_heads + 2 * self.rank
        floats = common + self.d_inner + 2 * SEGMENT * self.slices + 2 * NUM_WARPS + 6 * own + 4 * self.d_state
        return extras + 4 * b * floats + 16 * (MAX_STAGES + 3)

    @property
    def shared_bytes(self) -> int:
        return self.num_stages * self.stage_bytes + self.work_bytes


def device_shape(layer: LayerWeights, heads: Sequence[Weight], num_rows: int, device: torch.device) -> Shape | None:
    """What to compile for this device; None if the kernel cannot run there."""
    if not can_run(device):
        return None
    properties = torch.cuda.get_device_properties(device)
    return Shape.of(layer, heads, num_rows, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def table(rows: Sequence[Sequence[Tensor | int | None]], device: torch.device) -> Tensor:
    """Structs of pointers and numbers of eight bytes, as int64 [rows, fields]."""
    words = [[value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in row] for row in rows]
    return torch.tensor(words, dtype=torch.int64, device=device)


class Buffers(NamedTuple):
    """What a step reads and writes beside weights and states; b rows, all fp32 but the first two, which are int64."""

    slots: Tensor
    """[b]; negative: nothing is stored for the row."""
    is_t2i: Tensor
    embedded: Tensor
    """[b, d], the tokens'."""
    logits: Sequence[Tensor]
    """[b, v] of each head."""


def arguments_of(
    layers: Sequence[LayerWeights], final_norm: Tensor, heads: Sequence[Weight], buffers: Buffers, *, eps: float
) -> tuple[ctypes.Structure, list[Tensor]]:
    """The kernel's argument, and the tensors that it points to and nobody else holds."""
    device = buffers.embedded.device
    layer_table = table(
        [
            (
                layer.in_proj.values, layer.in_proj.scale, layer.lora.A, layer.lora.B, layer.norm, *layer.mixer, layer.gated_norm,
                layer.out_proj.values, layer.out_proj.scale, layer.conv, layer.ssm,
            )
            for layer in layers
        ],
        device,
    )  # fmt: skip
    head_table = table(
        [(head.values, head.scale, logits, head.values.shape[0]) for head, logits in zip(heads, buffers.logits, strict=True)], device
    )
    num_rows, d_model = buffers.embedded.shape
    d_inner, num_common = layers[0].gated_norm.shape[0], layers[0].in_proj.values.shape[0] - 2 * layers[0].gated_norm.shape[0]
    widths = (d_model, num_common + layers[0].lora.A.shape[0], d_inner)
    published = [torch.zeros(num_rows, width, device=device) for width in widths]
    counters = torch.zeros(3, dtype=torch.int32, device=device)
    pointers = (
        layer_table, head_table, final_norm, buffers.slots, buffers.is_t2i, buffers.embedded, *published, counters
    )  # fmt: skip
    arguments = Arguments(
        *(tensor.data_ptr() for tensor in pointers),
        layers[0].conv.stride(0),
        layers[0].ssm.stride(0),
        len(layers),
        len(heads),
        eps,
        layers[0].lora.scaling,
    )
    return arguments, [layer_table, head_table, *published, counters]


@functools.cache
def kernel_of(shape: Shape, device: torch.device) -> Kernel:
    return Kernel(SOURCES, "backbone_step", shape.defines(), shared_bytes=shape.shared_bytes, device=device)


class BackboneStep:
    """The launch for given weights, states and buffers, whose addresses it holds: as long as it lives they must not move."""

    def __init__(
        self, shape: Shape, layers: Sequence[LayerWeights], final_norm: Tensor, heads: Sequence[Weight], buffers: Buffers, *, eps: float
    ) -> None:
        device = buffers.embedded.device
        self.kernel = kernel_of(shape, device)
        self.num_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self.arguments, self._kept = arguments_of(layers, final_norm, heads, buffers, eps=eps)

    def __call__(self) -> None:
        """States and logits, in place."""
        self.kernel(self.arguments, blocks=self.num_blocks, threads=THREADS, attributes=[COOPERATIVE])
