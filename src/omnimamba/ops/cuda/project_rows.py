"""A layer's projections of a batch's rows on Hopper, norms included: the host's side of `project_in.cu` and `project_out.cu`.

Rows are divided by their root mean square after a product, not before: in between they are numbers times the norm's weight, and sums of
their squares.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnimamba.ops.cuda.compile import PROGRAMMATIC, Kernel, cluster_of
from omnimamba.ops.cuda.hopper import TensorMap, is_hopper, structure, tensor_map
from omnimamba.ops.triton.decode import LayerWeights, Shift

SOURCES = ("primitives.cuh", "tiles.cuh", "warpgroup.cuh", "channels.cuh", "rows_product.cuh")
MAX_ROWS = 256
STEP = 64  # columns of a stage
CLUSTERS = {"project_in": 2, "project_out": 4}


class Tile(NamedTuple):
    """What a block computes, and how."""

    n: int
    m: int
    """Times 64 rows."""
    weight_stages: int
    row_stages: int
    sharing_weights: int = 1
    """Blocks of a cluster that have the same outputs, and rows of their own."""
    sharing_rows: int = 1
    """The other way round."""


TILES = {
    "project_in": {
        1: [Tile(64, 1, 13, 8, sharing_rows=2), Tile(72, 1, 13, 8, sharing_rows=2)],
        2: [Tile(144, 1, 7, 7, sharing_weights=2)],
        4: [Tile(144, 2, 6, 6, sharing_weights=2)],
    },
    "project_out": {
        1: [Tile(64, 1, 16, 6), Tile(72, 1, 16, 6)],  # all weights of a block
        2: [Tile(64, 2, 8, 4), Tile(72, 2, 8, 4)],
        4: [Tile(64, 4, 5, 3), Tile(72, 4, 5, 3)],
    },
}
"""To choose from, by how many times 64 rows there are; as many stages as shared memory holds, or as gain anything."""

# as in the sources
InArguments = structure(("u", "weights"), ("squares", "out"), (), ("rows", "n", "k", "num_squares"), ("eps",))
OutArguments = structure(
    ("u", "weights"),
    ("squares", "residual", "norm", "next", "next_squares", "conv", "slots", "newest"),
    ("conv_slot", "first"),
    ("rows", "n", "k", "num_squares"),
    ("eps",),
)


class Rows(NamedTuple):
    """What is to be projected."""

    values: Tensor
    """[b, k] bf16."""
    squares: Tensor | None
    """[b, any] fp32, whose sum is that of a row's squares, by whose mean's root it has yet to be divided; None: it has been."""


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    kernel: str
    tile: Tile
    d_state: int

    def defines(self) -> dict[str, Any]:
        tile = self.tile
        return {
            "N_TILE": tile.n, "M_TILES": tile.m, "D_STATE": self.d_state, "CLUSTER": CLUSTERS[self.kernel],
            "SHARING_WEIGHTS": tile.sharing_weights, "SHARING_ROWS": tile.sharing_rows,
            "WEIGHT_STAGES": tile.weight_stages, "ROW_STAGES": tile.row_stages, "SHARED_BYTES": self.shared_bytes,
        }  # fmt: skip

    @property
    def threads(self) -> int:
        return 160 * self.tile.m + 64

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
        return -(-self.num_tiles(n) // self.tile.sharing_rows)


@functools.cache
def kernel_of(shape: Shape, device: torch.device) -> Kernel:
    return Kernel((*SOURCES, f"{shape.kernel}.cu"), shape.kernel, shape.defines(), shared_bytes=shape.shared_bytes, device=device)


@functools.cache
def shape_of(kernel: str, b: int, n: int, d_state: int, device: torch.device) -> Shape:
    """For b rows and n outputs. Tiles are so large that all are at work at once, if that can be."""
    shapes = [Shape(kernel, tile, d_state) for tile in TILES[kernel][next(m for m in (1, 2, 4) if b <= 64 * m)]]

    def cost(shape: Shape) -> tuple[int, int]:
        at_once = kernel_of(shape, device).clusters_at_once(CLUSTERS[kernel], shape.threads)
        return -(-shape.num_clusters(n) // at_once) * shape.tile.n, shape.tile.n

    return min(shapes, key=cost)


def fits(layer: LayerWeights, b: int, device: torch.device) -> bool:
    """Whether the kernels can project b rows of such layers: all in bf16, of whole steps of columns."""
    return (
        is_hopper(device)
        and b <= MAX_ROWS
        and layer.packed is not None
        and all(tensor.dtype == torch.bfloat16 for tensor in (layer.norm, layer.packed, layer.out_proj.values, layer.conv))
        and layer.packed.data_ptr() % 16 == layer.out_proj.values.data_ptr() % 16 == 0
        and layer.conv.shape[2] == 4
        and layer.packed.shape[0] % 8 == 0
        and layer.packed.shape[1] % STEP == 0
        and layer.out_proj.values.shape[1] % (STEP * CLUSTERS["project_out"]) == 0
        and layer.ssm.shape[3] % 16 == 0
    )


def num_squares(layer: LayerWeights, b: int, device: torch.device) -> int:
    """Partial sums of a row's squares that `project_out` leaves."""
    n = layer.out_proj.values.shape[0]
    return shape_of("project_out", b, n, layer.ssm.shape[3], device).num_tiles(n)


def launch(shape: Shape, arguments: ctypes.Structure, n: int, device: torch.device, pdl: bool) -> None:
    size = CLUSTERS[shape.kernel]
    attributes = [cluster_of(size)] + [PROGRAMMATIC] * pdl
    kernel_of(shape, device)(arguments, blocks=shape.num_clusters(n) * size, threads=shape.threads, attributes=attributes)


def maps_of(shape: Shape, rows: Rows, weight: Tensor) -> list[TensorMap]:
    """In boxes that one block brings."""
    tile = shape.tile
    return [tensor_map(rows.values[None], 64 * tile.m // tile.sharing_rows), tensor_map(weight[None], tile.n // tile.sharing_weights)]


def squares_of(rows: Rows) -> tuple[int | None, int]:
    return (None, 0) if rows.squares is None else (rows.squares.data_ptr(), rows.squares.shape[1])


def project_in(rows: Rows, weight: Tensor, out: Tensor, *, eps: float, pdl: bool = False) -> None:
    """out [b, n] = normed rows @ weight.T, all bf16. weight: [n, k], n a multiple of 8."""
    b, n = out.shape
    shape = shape_of("project_in", b, n, 0, out.device)
    squares, num = squares_of(rows)
    arguments = InArguments(*maps_of(shape, rows, weight), squares, out.data_ptr(), b, n, weight.shape[1], num, eps)
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
    squares, num = squares_of(rows)
    assert made.squares is not None and made.squares.shape[1] == shape.num_tiles(n)
    pointers = [tensor.data_ptr() for tensor in (residual, norm, made.values, made.squares, *shift)]
    first = (shift.conv.shape[1] - 2 * d_state) * shift.conv.shape[2]
    strides = shift.conv.stride(0), first
    arguments = OutArguments(*maps_of(shape, rows, weight), squares, *pointers, *strides, b, n, weight.shape[1], num, eps)
    launch(shape, arguments, n, residual.device, pdl)
