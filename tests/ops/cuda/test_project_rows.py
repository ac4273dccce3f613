"""Projections of a batch's rows: on a CPU the kernels' sources, threads, tensor cores and clusters emulated; on a GPU the launches."""

import ctypes
import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from omnimamba.ops.cuda import compile, hopper, project_rows
from omnimamba.ops.cuda.project_rows import TILES, Rows, Shape, Tile
from omnimamba.ops.triton.decode import Shift

EPS, D_STATE, NUM_SLOTS = 1e-5, 16, 5


@pytest.fixture
def emulate(emulated, box_description, monkeypatch):
    def launch(shape, arguments, n, device, pdl) -> None:
        library = emulated(f"{shape.kernel}.cpp", shape.defines())
        blocks = shape.num_clusters(n) * shape.tile.cluster
        assert library.emulate(ctypes.byref(arguments), blocks, blocks), "threads waited for each other"

    monkeypatch.setattr(project_rows, "launch", launch)
    monkeypatch.setattr(project_rows, "tensor_map", box_description)

    def use(tile: Tile) -> None:
        monkeypatch.setattr(project_rows, "shape_of", lambda kernel, b, n, d_state, device: Shape(kernel, tile, d_state))

    return use


class Projecting:
    """Rows, a weight and all else at random, and what becomes of them."""

    def __init__(self, b: int, n: int, k: int, num_squares: int, device: str) -> None:
        generator = torch.Generator().manual_seed(b)

        def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.b, self.n, self.k, self.device = b, n, k, device
        self.weight, self.norm = random(n, k), random(n)
        self.rows = Rows(random(b + 3, k), random(b, num_squares, dtype=torch.float32).square() * k / num_squares)
        self.residual = random(b, n, dtype=torch.float32)
        self.conv, self.newest = random(NUM_SLOTS, 3 + 2 * D_STATE, 4), random(b, 2 * D_STATE, dtype=torch.float32)
        self.slots = torch.tensor([[2, -1, 4, 0][i] if i < 4 else -1 for i in range(b)], device=device)

    def expected(self) -> Tensor:
        product = self.rows.values[: self.b].double() @ self.weight.double().T
        return product / (self.rows.squares.double().sum(1, keepdim=True) / self.k + EPS).sqrt()

    def nan(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.full(shape, torch.nan, device=self.device, dtype=dtype)

    def assert_projects_in(self, *, pdl: bool = False) -> None:
        out = self.nan(self.b, self.n)
        project_rows.project_in(self.rows, self.weight, out, eps=EPS, pdl=pdl)
        assert_near(out, self.expected(), 4e-3)

    def assert_projects_out(self, *, pdl: bool = False) -> None:
        shape = project_rows.shape_of("project_out", self.b, self.n, D_STATE, torch.device(self.device))
        num, num_additions = shape.num_tiles(self.n), self.k / shape.tile.cluster / 16
        made = Rows(self.nan(self.b, self.n), self.nan(self.b, num, dtype=torch.float32))
        expected, conv = self.residual + self.expected(), self.conv.clone()
        shift = Shift(self.conv, self.slots, self.newest)
        project_rows.project_out(self.rows, self.weight, self.residual, self.norm, made, shift, eps=EPS, pdl=pdl)
        tolerance = 1e-6 + num_additions * 2**-26  # tensor cores add sixteen products at once, rounding towards zero
        assert_near(self.residual, expected, tolerance)
        assert_near(made.values, expected * self.norm.double(), 4e-3)
        assert_near(made.squares.double().sum(1), expected.square().sum(1), 2 * tolerance)
        for row in (self.slots >= 0).nonzero()[:, 0].tolist():
            channels = conv[self.slots[row], 3:]
            channels[:] = torch.cat([channels[:, 1:], self.newest[row, :, None].bfloat16()], 1)
        assert torch.equal(self.conv, conv)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error <= tolerance, error  # not so for NaN


IN, OUT = TILES["project_in"], TILES["project_out"]


@pytest.mark.parametrize(
    ("b", "n", "k", "tile", "num_squares"),
    [
        (1, 64, 128, IN[1][0], 1),  # one step of each group
        (64, 296, 640, IN[1][0], 9),
        (33, 152, 512, IN[1][1], 1),
        (40, 136, 192, IN[1][2], 3),
        (64, 136, 448, Tile(72, 1, 6, 4, k_groups=2), 3),  # one group has a step more
        (100, 136, 640, Tile(72, 2, 4, 6, k_groups=2), 3),
        (100, 160, 512, IN[2][0], 5),
        (200, 296, 448, IN[4][0], 3),
        (130, 136, 128, IN[4][1], 2),
    ],
)
def test_the_emulated_project_in(emulate, b, n, k, tile, num_squares):
    emulate(tile)
    Projecting(b, n, k, num_squares, "cpu").assert_projects_in()


@pytest.mark.parametrize(
    ("b", "n", "k", "tile", "num_squares"),
    [
        (1, 64, 512, OUT[1][0], 1),
        (64, 200, 1792, OUT[1][0], 17),
        (40, 100, 512, OUT[1][1], 3),
        (100, 132, 256, OUT[2][0], 5),
        (200, 136, 512, OUT[4][0], 3),
    ],
)
def test_the_emulated_project_out(emulate, b, n, k, tile, num_squares):
    emulate(tile)
    Projecting(b, n, k, num_squares, "cpu").assert_projects_out()


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("b", [1, 63, 64, 65, 128, 200, 256])
@pytest.mark.parametrize(("n", "k"), [(8528, 2048), (2048, 4096), (72, 256), (72, 512), (2208, 512)])
def test_the_launches(b, n, k, pdl):
    if not hopper.is_hopper(torch.device("cuda", 0)):
        pytest.skip("not a Hopper GPU")
    Projecting(b, n, k, 29, "cuda").assert_projects_in(pdl=pdl)
    if k % project_rows.COLUMNS["project_out"] == 0:
        Projecting(b, n, k, 256, "cuda").assert_projects_out(pdl=pdl)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "tile"), [(kernel, tile) for kernel in TILES for tiles in TILES[kernel].values() for tile in tiles])
def test_it_compiles(kernel, tile):
    """Without a register spilled, and without products that wait for each other."""
    _, log = compile.compile_cubin((*project_rows.SOURCES, f"{kernel}.cu"), Shape(kernel, tile, 128).defines(), "sm_90a")
    assert "warning" not in log and "wgmma" not in log, log
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled and int(spilled[1]) == 0, log
