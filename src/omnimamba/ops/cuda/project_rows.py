"""A layer's projections of a batch's rows on Hopper, norms included: the host's side of `project_in.cu` and `project_out.cu`.

Rows are divided by their root mean square after a product, not before: in between they are numbers times the norm's weight, and sums of
their squares.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnimamba.ops.cuda.compile import PROGRAMMATIC, Kernel, TensorMap, cluster_of, structure
from omnimamba.ops.cuda.hopper import is_hopper, tensor_map
from omnimamba.ops.triton.decode import LayerWeights, Shift, Weight

SOURCES = ("primitives.cuh", "tiles.cuh", "warpgroup.cuh", "channels.cuh", "rows_product.cuh")
MAX_ROWS = 256
WHOLE = 64  # rows of a tensor from which on it is read faster: boxes that go beyond its end take longer
STEP = 64  # columns of a stage


class Tile(NamedTuple):
    """What a block computes, and how."""

    n: int
    m: int
    """Times 64 rows."""
    weight_stages: int
    row_stages: int
    row_blocks: int = 1
    """Blocks for all rows."""
    cluster: int = 1
    """Blocks for all columns."""
    k_groups: int = 1
    """Warpgroups that have the same rows and outputs, and stages in turn."""
    pace: int = 0
    """Cycles that each tile of weights takes at least of those that come ahead of the rows."""


TILES = {
    "project_in": {
        1: [Tile(64, 1, 12, 14, k_groups=2), Tile(72, 1, 12, 14, k_groups=2), Tile(128, 1, 9, 9)],
        2: [Tile(72, 2, 9, 7), Tile(128, 2, 6, 6)],
        4: [Tile(136, 2, 6, 7, row_blocks=2), Tile(128, 4, 4, 4)],
    },
    "project_out": {
        1: [Tile(64, 1, 14, 8, cluster=4, k_groups=2, pace=600), Tile(72, 1, 14, 8, cluster=4, k_groups=2, pace=600)],
        2: [Tile(64, 2, 8, 4, cluster=4), Tile(72, 2, 8, 4, cluster=4)],
        4: [Tile(64, 2, 8, 7, row_blocks=2, cluster=2)],
    },
}
"""To choose from, by how many times 64 rows there are; as many stages as shared memory holds, or as gain anything."""
COLUMNS = {
    kernel: STEP * max(tile.cluster * tile.k_groups for choices in tiles.values() for tile in choices) for kernel, tiles in TILES.items()
}
"""Whose multiples k is: of steps for each group of each block."""

# as in the sources
InArguments = structure(maps=("u", "weights"), pointers=("squares", "out"), ints=("rows", "n", "k", "num_squares"), floats=("eps",))
OutArguments = structure(
    maps=("u", "weights"),
    pointers=("squares", "residual", "norm", "next", "next_squares", "conv", "slots", "newest"),
    longs=("conv_slot", "first"),
    ints=("rows", "n", "k", "num_squares"),
    floats=("eps",),
)


class Rows(NamedTuple):
    """What is to be normed and projected."""

    values: Tensor
    """[b or more, k] bf16: rows times the norm's weight, which have yet to be divided by their root mean square."""
    squares: Tensor
    """[b, any] fp32, whose sum is that of a row's squares."""


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    kernel: str
    tile: Tile
    d_state: int

    def defines(self) -> dict[str, Any]:
        n, m, weight_stages, row_stages, row_blocks, cluster, k_groups, pace = self.tile
        return {
            "N_TILE": n, "M_TILES": m, "K_GROUPS": k_groups, "ROW_BLOCKS": row_blocks, "CLUSTER": cluster, "WEIGHT_STAGES": weight_stages,
            "ROW_STAGES": row_stages, "PACE": pace, "D_STATE": self.d_state, "SHARED_BYTES": self.shared_bytes,
        }  # fmt: skip

    @property
    def threads(self) -> int:
        return 128 * self.tile.m * self.tile.k_groups + 32 * (2 + min(self.tile.m, 2))

    @property
    def shared_bytes(self) -> int:
        """`Shared` in the sources, which begins at a multiple of 1024, or a little more."""
        n, m, weight_stages, row_stages = self.tile[:4]
        rings = 2 * STEP * (weight_stages * n + row_stages * 64 * m) + 16 * (weight_stages + row_stages)
        parts = 256 * m * n if self.kernel == "project_out" else 0
        return 1024 + rings + parts + 256 * m + 64

    def num_tiles(self, n: int) -> int:
        """Of n outputs."""
        return -(-n // self.tile.n)

    def num_clusters(self, n: int) -> int:
        return self.num_tiles(n) * self.tile.row_blocks


@functools.cache
def kernel_of(shape: Shape, device: torch.device) -> Kernel:
    return Kernel((*SOURCES, f"{shape.kernel}.cu"), shape.kernel, shape.defines(), shared_bytes=shape.shared_bytes, device=device)


@functools.cache
def shape_of(kernel: str, b: int, n: int, d_state: int, device: torch.device) -> Shape:
    """For b rows and n outputs. Tiles are so large that all are at work at once, if that can be."""
    shapes = [Shape(kernel, tile, d_state) for tile in TILES[kernel][next(m for m in (1, 2, 4) if b <= 64 * m)]]

    def cost(shape: Shape) -> tuple[int, int]:
        at_once = kernel_of(shape, device).clusters_at_once(shape.tile.cluster, shape.threads)
        return -(-shape.num_clusters(n) // at_once) * shape.tile.n * shape.tile.m, -shape.tile.n

    return min(shapes, key=cost)


def fits(layer: LayerWeights, heads: Sequence[Weight], b: int, device: torch.device) -> bool:
    """Whether the kernels can project b rows of such layers, and for such heads: all in bf16, of whole steps of columns."""
    if not is_hopper(device) or b > MAX_ROWS or layer.packed is None:
        return False
    weights_in, weight_out = [layer.packed, *(head.values for head in heads)], layer.out_proj.values
    return (
        all(tensor.dtype == torch.bfloat16 for tensor in (layer.norm, layer.conv, *weights_in, weight_out))
        and all(tensor.data_ptr() % 16 == 0 for tensor in (*weights_in, weight_out))
        and all(weight.shape[0] % 8 == 0 and weight.shape[1] % COLUMNS["project_in"] == 0 for weight in weights_in)
        and weight_out.shape[0] % 4 == 0
        and weight_out.shape[1] % COLUMNS["project_out"] == 0
        and layer.conv.shape[2] == 4
        and layer.ssm.shape[3] % 16 == 0
    )


def num_squares(layer: LayerWeights, b: int, device: torch.device) -> int:
    """Partial sums of a row's squares that `project_out` leaves."""
    n = layer.out_proj.values.shape[0]
    return shape_of("project_out", b, n, layer.ssm.shape[3], device).num_tiles(n)


def launch(shape: Shape, arguments: ctypes.Structure, n: int, device: torch.device, pdl: bool) -> None:
    size = shape.tile.cluster
    attributes = [cluster_of(size)] + [PROGRAMMATIC] * pdl
    kernel_of(shape, device)(arguments, blocks=shape.num_clusters(n) * size, threads=shape.threads, attributes=attributes)


def maps_of(shape: Shape, rows: Rows, weight: Tensor) -> list[TensorMap]:
    assert weight.shape[1] >= STEP * shape.tile.cluster * shape.tile.k_groups, "a warpgroup without a step has no sums"
    return [tensor_map(rows.values[None], 64 * shape.tile.m), tensor_map(weight[None], shape.tile.n)]


def project_in(rows: Rows, weight: Tensor, out: Tensor, *, eps: float, pdl: bool = False) -> None:
    """out [b, n] = normed rows @ weight.T, all bf16. weight: [n, k], n a multiple of 8."""
    b, n = out.shape
    shape = shape_of("project_in", b, n, 0, out.device)
    maps, num_squares = maps_of(shape, rows, weight), rows.squares.shape[1]
    arguments = InArguments(*maps, rows.squares.data_ptr(), out.data_ptr(), b, n, weight.shape[1], num_squares, eps)
    launch(shape, arguments, n, out.device, pdl)


def project_out(
    rows: Rows, weight: Tensor, residual: Tensor, norm: Tensor, made: Rows, shift: Shift, *, eps: float, pdl: bool = False
) -> None:
    """residual [b, n] fp32 gains normed rows @ weight.T; `made` becomes the new residual times `norm` [n], yet to be divided.

    weight: [n, k]; made: values [b, n] bf16, squares [b, num_squares]; shift: see `ops.triton.decode.shift_conv_state`.
    """
    b, n = residual.shape
    d_state = shift.newest.shape[1] // 2
    shape = shape_of("project_out", b, n, d_state, residual.device)
    assert made.squares.shape[1] == shape.num_tiles(n)
    pointers = [tensor.data_ptr() for tensor in (rows.squares, residual, norm, made.values, made.squares, *shift)]
    first = (shift.conv.shape[1] - 2 * d_state) * shift.conv.shape[2]
    strides = shift.conv.stride(0), first
    arguments = OutArguments(*maps_of(shape, rows, weight), *pointers, *strides, b, n, weight.shape[1], rows.squares.shape[1], eps)
    launch(shape, arguments, n, residual.device, pdl)
