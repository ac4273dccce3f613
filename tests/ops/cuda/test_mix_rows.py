"""The kernel between the projections, for many rows: on a CPU its source against the operators, threads emulated; on a GPU the launch."""

import ctypes
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from omnimamba.ops.conv import causal_conv1d_step
from omnimamba.ops.cuda import compile, mix_rows
from omnimamba.ops.cuda.mix_rows import Shape, arguments_of
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
        self.weights = MixerWeights(
            random(conv_dim, 4), random(conv_dim), random(self.h, dtype=torch.float32).mul(0.3), random(self.h, dtype=torch.float32),
            random(self.h, dtype=torch.float32),
        )  # fmt: skip
        self.lora = Lora(random(2 * self.rank, 16), random(2, self.d_in_proj, self.rank), 0.5)
        self.projected = random(b, self.d_in_proj + 2 * self.rank)
        self.slots = torch.tensor(slots, device=device)
        self.is_t2i = torch.arange(b, device=device) % 2
        self.conv, self.ssm = random(NUM_SLOTS, conv_dim, 4), random(NUM_SLOTS, self.h, HEADDIM, self.n, dtype=dtype)
        self.y = torch.full((b, self.d_inner), torch.nan, device=device)
        self.newest = torch.full((b, 2 * self.n), torch.nan, device=device)

    @property
    def values(self) -> tuple[Any, ...]:
        return self.projected, self.lora, self.weights, self.conv, self.ssm, self.slots, self.is_t2i, self.y, self.newest

    def shape(self, shared_bytes: int) -> Shape | None:
        weight = Weight(self.projected)
        layer = LayerWeights(
            self.weights.conv_bias, weight, None, self.lora, self.weights, self.weights.conv_bias, weight, self.conv, self.ssm
        )
        return Shape.of(layer, self.slots.shape[0], shared_bytes)

    def assert_mixes(self, mix) -> None:
        """`mix()` computes what the operators do in fp32, and touches nothing else."""
        live = self.slots >= 0
        slots, others = self.slots[live], [slot for slot in range(NUM_SLOTS) if slot not in self.slots.tolist()]
        is_t2i, scaled = self.is_t2i[live], self.projected[live].float()
        low = torch.stack([scaled[:, self.d_in_proj :][:, : self.rank], scaled[:, self.d_in_proj + self.rank :]])
        low = low[is_t2i, torch.arange(len(slots), device=low.device)] * self.lora.scaling
        projected = scaled[:, : self.d_in_proj] + (self.lora.B.float()[is_t2i] @ low[:, :, None])[:, :, 0]
        z, xBC, dt = projected.split((self.d_inner, self.d_inner + 2 * self.n, self.h), dim=1)
        before = self.conv.clone(), self.ssm.clone()
        conv, ssm = self.conv[slots].float(), self.ssm[slots].float()
        mixed = causal_conv1d_step(xBC, conv, self.weights.conv_weight.float(), self.weights.conv_bias.float())
        x, B, C = mixed.split((self.d_inner, self.n, self.n), dim=1)
        step = torch.nn.functional.softplus(dt + self.weights.dt_bias)
        A = -self.weights.A_log.exp()
        y = ssd_step(ssm, x.unflatten(1, (self.h, HEADDIM)), step, A, B[:, None], C[:, None], D=self.weights.D)
        y = y.flatten(1) * torch.nn.functional.silu(z)
        mix()
        if len(slots):
            tolerance = 1e-5 if self.ssm.dtype == torch.float32 else 4e-3
            assert_near(self.y[live], y, 1e-5)
            assert_near(self.newest[live], xBC[:, self.d_inner :], 1e-5)
            assert_near(self.ssm[slots], ssm, tolerance)
            assert torch.equal(self.conv[slots, : self.d_inner], conv[:, : self.d_inner].bfloat16())
        assert torch.equal(self.conv[:, self.d_inner :], before[0][:, self.d_inner :])
        assert torch.equal(self.conv[others], before[0][others]) and torch.equal(self.ssm[others], before[1][others])
        assert self.y[~live].isnan().all() and self.newest[~live].isnan().all()


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, error  # not so for NaN


@pytest.mark.parametrize(("case", "name", "seed"), [(c, n, s) for s, (c, n) in enumerate(itertools.product(CASES, SLOTS))])
def test_the_emulated_kernel_equals_the_operators(emulated, case, name, seed):
    """seed: of the order in which threads go on."""
    mixing = Mixing(case, SLOTS[name], "cpu")
    shape = mixing.shape(SHARED_BYTES)
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
    shape = mixing.shape(torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin)
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
    shape = mixing.shape(torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin)
    assert shape is not None
    mixing.assert_mixes(lambda: mix_rows.mix_rows(shape, *mixing.values, pdl=True))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "sm_120"])  # Hopper and two of Blackwell
@pytest.mark.parametrize("half_state", [False, True])
def test_it_compiles(architecture, half_state):
    """At the 1.3B shape, without a register spilled."""
    _, log = compile.compile_cubin(mix_rows.SOURCES, Shape(4096, 64, 128, 8, half_state, 4).defines(), architecture)
    assert "warning" not in log, log
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled and int(spilled[1]) == 0, log


def test_shapes_that_it_leaves_to_others():
    mixing = Mixing("chunks of a row", [0, 1], "cpu")
    assert mixing.shape(SHARED_BYTES) == Shape(1024, 16, 128, 8, False, 4)
    assert mixing.shape(48 * 1024) is None
    weight = Weight(mixing.projected)
    layer = LayerWeights(mixing.y, weight, None, mixing.lora, mixing.weights, mixing.y, weight, mixing.conv, mixing.ssm)
    assert mix_rows.device_shape(layer, 2, torch.device("cpu")) is None
    assert Shape.of(layer, 2, SHARED_BYTES) is None  # a norm in fp32
    mixing.slots = torch.zeros(mix_rows.MAX_ROWS + 1, dtype=torch.int64)
    assert mixing.shape(SHARED_BYTES) is None
