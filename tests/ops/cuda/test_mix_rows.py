"""The kernel between the projections, for many rows: on a CPU its source against the operators, threads emulated; on a GPU the launch."""

import ctypes
import itertools
import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from omnimamba.ops.conv import causal_conv1d_step
from omnimamba.ops.cuda import compile, mix_rows
from omnimamba.ops.cuda.mix_rows import Mixed, Shape, arguments_of
from omnimamba.ops.ssd import ssd_step
from omnimamba.ops.triton.decode import LayerWeights, Lora, MixerWeights, Weight

NUM_BLOCKS, SHARED_BYTES = 3, 227 * 1024
SLOTS = {  # of the rows; a negative one is padding
    "one row": [2],
    "rows of several blocks": [4, 0, 3],
    "padding": [1, -1, 3, 0, -1],
    "padding alone": [-1, -1],
}
CASES = {  # heads, d_state, rank, type of the states
    "chunks of a row": (16, 128, 8, torch.float32),
    "half states": (12, 128, 3, torch.bfloat16),
    "small states": (2, 64, 1, torch.float32),
}
HEADDIM, NUM_SLOTS = 64, 6


class Mixing:
    """A layer, projected rows and states at random, and what becomes of them."""

    def __init__(self, case: str, slots: list[int], device: str) -> None:
        self.h, self.n, self.rank, dtype = CASES[case]
        generator = torch.Generator().manual_seed(len(slots))

        def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.d_inner, b = self.h * HEADDIM, len(slots)
        self.d_in_proj = 2 * self.d_inner + 2 * self.n + self.h
        conv_dim = self.d_inner + 2 * self.n
        mixer = MixerWeights(
            random(conv_dim, 4), random(conv_dim), random(self.h, dtype=torch.float32).mul(0.3), random(self.h, dtype=torch.float32),
            random(self.h, dtype=torch.float32),
        )  # fmt: skip
        lora = Lora(random(2 * self.rank, 16), random(2, self.d_in_proj, self.rank), 0.5)
        self.projected = random(b, self.d_in_proj + 2 * self.rank)
        self.slots = torch.tensor(slots, device=device)
        self.is_t2i = torch.arange(b, device=device) % 2
        unused = Weight(self.projected)
        self.layer = LayerWeights(
            self.projected, unused, None, lora, mixer, random(self.d_inner), unused, random(NUM_SLOTS, conv_dim, 4),
            random(NUM_SLOTS, self.h, HEADDIM, self.n, dtype=dtype),
        )  # fmt: skip
        shape = Shape.of(self.layer, b, SHARED_BYTES)
        assert shape is not None
        self.mixed = Mixed(
            torch.full((b, self.d_inner), torch.nan, device=device, dtype=torch.bfloat16),
            torch.full((b, shape.row_chunks), torch.nan, device=device),
            torch.full((b, 2 * self.n), torch.nan, device=device),
        )
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def values(self) -> tuple[Tensor, LayerWeights, Tensor, Tensor, Mixed, Tensor]:
        return self.projected, self.layer, self.slots, self.is_t2i, self.mixed, self.counter

    def assert_mixes(self, mix) -> None:
        """`mix()` computes what the operators do in fp32, and touches nothing else."""
        layer, mixer, live = self.layer, self.layer.mixer, self.slots >= 0
        slots, others = self.slots[live], [slot for slot in range(NUM_SLOTS) if slot not in self.slots.tolist()]
        is_t2i, rows = self.is_t2i[live], self.projected[live].float()
        low = rows[:, self.d_in_proj :].unflatten(1, (2, self.rank))[torch.arange(len(slots)), is_t2i] * layer.lora.scaling
        projected = rows[:, : self.d_in_proj] + (layer.lora.B.float()[is_t2i] @ low[:, :, None])[:, :, 0]
        z, xBC, dt = projected.split((self.d_inner, self.d_inner + 2 * self.n, self.h), dim=1)
        before = layer.conv.clone(), layer.ssm.clone()
        conv, ssm = layer.conv[slots].float(), layer.ssm[slots].float()
        mixed = causal_conv1d_step(xBC, conv, mixer.conv_weight.float(), mixer.conv_bias.float())
        x, B, C = mixed.split((self.d_inner, self.n, self.n), dim=1)
        x, step = x.unflatten(1, (self.h, HEADDIM)), torch.nn.functional.softplus(dt + mixer.dt_bias)
        y = ssd_step(ssm, x, step, -mixer.A_log.exp(), B[:, None], C[:, None], D=mixer.D).flatten(1) * torch.nn.functional.silu(z)
        mix()
        if len(slots):
            assert_near(self.mixed.gated[live], y * layer.gated_norm.float(), 4e-3)
            assert_near(self.mixed.squares[live].sum(1), y.square().sum(1), 1e-5)
            assert_near(self.mixed.newest[live], xBC[:, self.d_inner :], 1e-5)
            assert_near(layer.ssm[slots], ssm, 1e-5 if layer.ssm.dtype == torch.float32 else 4e-3)
            assert torch.equal(layer.conv[slots, : self.d_inner], conv[:, : self.d_inner].bfloat16())
        assert torch.equal(layer.conv[:, self.d_inner :], before[0][:, self.d_inner :])
        assert torch.equal(layer.conv[others], before[0][others]) and torch.equal(layer.ssm[others], before[1][others])
        assert all(part[~live].isnan().all() for part in self.mixed)
        assert self.counter == 0


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, error  # not so for NaN


@pytest.mark.parametrize("chunk_bytes", [8192, 65536])
@pytest.mark.parametrize(("case", "name", "seed"), [(c, n, s) for s, (c, n) in enumerate(itertools.product(CASES, SLOTS))])
def test_the_emulated_kernel_equals_the_operators(emulated, monkeypatch, case, name, seed, chunk_bytes):
    """More chunks than blocks, and fewer; seed: of the order in which threads go on."""
    monkeypatch.setattr(mix_rows, "CHUNK_BYTES", chunk_bytes)
    mixing = Mixing(case, SLOTS[name], "cpu")
    shape = Shape.of(mixing.layer, len(mixing.slots), SHARED_BYTES)
    assert shape is not None and shape.num_stages > 2
    if seed % 2:
        shape = shape._replace(num_stages=2)
    arguments = arguments_of(*mixing.values)

    def mix() -> None:
        assert emulated("mix_rows.cpp", shape.defines()).emulate(ctypes.byref(arguments), NUM_BLOCKS, seed), "threads waited for each other"

    mixing.assert_mixes(mix)


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SLOTS)
def test_the_launch_equals_the_operators(case, name, pdl):
    mixing = Mixing(case, SLOTS[name], "cuda")
    shape = mix_rows.device_shape(mixing.layer, len(mixing.slots), torch.device("cuda", 0))
    assert shape is not None
    mixing.assert_mixes(lambda: mix_rows.mix_rows(shape, *mixing.values, pdl=pdl))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_of_the_large_shape(monkeypatch, dtype):
    """More rows than blocks, in any order of their slots, a part of them padding."""
    monkeypatch.setitem(CASES, "large", (64, 128, 8, dtype))
    monkeypatch.setitem(globals(), "NUM_SLOTS", 160)
    slots = torch.randperm(160, generator=torch.Generator().manual_seed(0))[:150].tolist()
    mixing = Mixing("large", [slot if i % 9 else -1 for i, slot in enumerate(slots)], "cuda")
    shape = mix_rows.device_shape(mixing.layer, len(mixing.slots), torch.device("cuda", 0))
    assert shape is not None
    mixing.assert_mixes(lambda: mix_rows.mix_rows(shape, *mixing.values, pdl=True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "sm_120"])  # Hopper and two of Blackwell
@pytest.mark.parametrize("half_state", [False, True])
def test_it_compiles(architecture, half_state):
    """At the 1.3B shape, without a register spilled."""
    _, log = compile.compile_cubin(mix_rows.SOURCES, Shape(4096, 64, 128, 8, half_state, 3).defines(), architecture)
    assert "warning" not in log, log
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled and int(spilled[1]) == 0, log


def test_shapes_that_it_leaves_to_others():
    layer = Mixing("chunks of a row", [0], "cpu").layer
    assert mix_rows.device_shape(layer, 1, torch.device("cpu")) is None
    assert Shape.of(layer, mix_rows.MAX_ROWS, SHARED_BYTES) == Shape(1024, 16, 128, 8, False, 3)
    assert Shape.of(layer, mix_rows.MAX_ROWS + 1, SHARED_BYTES) is None
    assert Shape.of(layer, 1, 48 * 1024) is None
    assert Shape.of(layer._replace(gated_norm=layer.gated_norm.float()), 1, SHARED_BYTES) is None
    assert Shape.of(layer._replace(ssm=layer.ssm[..., :16]), 1, SHARED_BYTES) is None
    assert Shape.of(layer._replace(ssm=layer.ssm[:, :, :20]), 1, SHARED_BYTES) is None  # heads that are no whole tiles
