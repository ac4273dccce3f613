"""The scan's kernels for Hopper against its definition: on a CPU their sources, threads and tensor cores emulated and the kernels of Triton
around them interpreted; on a GPU the launches."""

import ctypes
import re

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.ops import norm, ssd
from omnimamba.ops.cuda import compile
from omnimamba.ops.cuda import scan as hopper
from omnimamba.ops.triton import prefill, ssd_backward
from omnimamba.ops.triton import ssd as kernel

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHARED_BYTES = 227 * 1024
EMULATED_BLOCKS = 2
LAUNCHES = {"scan", "scan_states", "scan_gradients"}


@pytest.fixture(params=[0, 1])
def launched(request, kernel_device, emulated, box_description, monkeypatch) -> set[str]:
    """The kernels that were launched. The parameter seeds the order in which emulated threads go on."""
    names = set()
    launch = hopper.launch
    monkeypatch.setattr(hopper, "MIN_POSITIONS", 1)

    def emulate(name, arguments, blocks, device, d_state, **defines) -> None:
        names.add(name)
        library = emulated(f"{name}.cpp", {"D_STATE": d_state, "SHARED_BYTES": SHARED_BYTES, **defines})
        assert library.emulate(ctypes.byref(arguments), min(blocks, EMULATED_BLOCKS), request.param), "threads waited for each other"

    def observe(name, *args, **defines) -> None:
        names.add(name)
        launch(name, *args, **defines)

    if kernel_device == "cpu":
        monkeypatch.setattr(hopper, "launch", emulate)
        monkeypatch.setattr(hopper, "tensor_map", box_description)
        monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    elif not hopper.is_hopper(torch.device(kernel_device, 0)):
        pytest.skip("not a Hopper GPU")
    else:
        monkeypatch.setattr(hopper, "launch", observe)
    return names


@pytest.fixture(name="inputs")
def inputs_that_fit(inputs):
    return lambda device, b, l, **sizes: inputs(device, torch.bfloat16, b, l, **{"h": 2, "p": 64, "n": 64} | sizes)


def plain(**tensors):
    return ssd.plain_ssd_chunk_scan(**tensors, chunk_size=64)


@pytest.mark.parametrize(
    ("b", "l", "sizes"),
    [
        (1, 1, {}),
        (1, 64, {"n": 128, "has_initial": False}),
        (2, 65, {"h": 4, "g": 2}),
        (1, 150, {"h": 4, "n": 128}),
    ],
)
def test_outputs_and_gradients(launched, inputs, kernel_device, compare, b, l, sizes):
    """One position, a whole chunk, one more, several; groups; more walks than blocks."""
    compare(kernel.ssd_chunk_scan, plain, inputs(kernel_device, b, l, **sizes))
    assert launched == LAUNCHES


def test_heads_of_a_group_in_several_blocks(launched, inputs, kernel_device, compare, monkeypatch):
    monkeypatch.setattr(ssd_backward, "head_splits", lambda num_programs, heads_per_group: 2)
    compare(kernel.ssd_chunk_scan, plain, inputs(kernel_device, 1, 70, h=4))
    assert launched == LAUNCHES


def test_slices_of_one_tensor(launched, inputs, kernel_device, compare):
    def strided(op):
        def run(x, B, C, **others):
            (h, p), (g, n) = x.shape[2:], B.shape[2:]
            packed = torch.cat([C.flatten(2), x.flatten(2), B.flatten(2)], -1)
            C, x, B = packed.split((g * n, h * p, g * n), -1)
            return op(x=x.unflatten(-1, (h, p)), B=B.unflatten(-1, (g, n)), C=C.unflatten(-1, (g, n)), **others)

        return run

    compare(strided(kernel.ssd_chunk_scan), strided(plain), inputs(kernel_device, 2, 67))
    assert launched == LAUNCHES


@pytest.mark.parametrize(("l", "spans"), [(64, 2), (130, 2), (257, 3)])
def test_spans(launched, inputs, kernel_device, assert_near, l, spans):
    """One span after all; a last one that is shorter; several chunks each. Padding leaves the state as it is."""
    tensors = inputs(kernel_device, 2, l, n=128)
    tensors["dt"][1, l // 2 :] = 0
    found = kernel.ssd_chunk_scan(**tensors, spans=spans)
    expected = plain(**{name: tensor.float() for name, tensor in tensors.items()})
    for name, one, other in zip(("y", "final state"), found, expected, strict=True):
        assert_near(one, other, name, torch.bfloat16)
    assert launched == {"scan"}


@pytest.mark.parametrize(("l", "n"), [(5, 64), (130, 128)])
def test_gate(launched, inputs, kernel_device, assert_near, l, n):
    """z is a slice of a wider projection; y lacks the division by the root mean square."""
    tensors = inputs(kernel_device, 2, l, h=4, n=n)
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn((2, l, 4 * 64 + 8), generator=generator).to(kernel_device, torch.bfloat16)
    weight = (1 + torch.randn(4 * 64, generator=generator) / 2).to(kernel_device, torch.bfloat16)
    y, squares, final = prefill.gated_scan(**tensors, z=wide[..., 8:], norm_weight=weight)
    expected_y, expected_final = plain(**{name: tensor.float() for name, tensor in tensors.items()})
    expected_y = norm.plain_gated_rms_norm(expected_y.flatten(-2), wide[..., 8:].float(), weight.float(), 1e-5)
    assert_near(y.float() / squares.rms(1e-5), expected_y, "y", torch.bfloat16)
    assert_near(final, expected_final, "final state", torch.bfloat16)
    assert launched == {"scan"}


def test_what_it_leaves_to_others(monkeypatch):
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    x, B = torch.zeros(2, 70, 4, 64, dtype=torch.bfloat16), torch.zeros(2, 70, 2, 64, dtype=torch.bfloat16)
    assert hopper.fits(x, B, B)
    assert not hopper.fits(x[:, :63], B[:, :63], B[:, :63]), "few positions"
    assert not hopper.fits(x.float(), B, B) and not hopper.fits(x.half(), B, B)
    assert not hopper.fits(x[..., :32], B, B), "headdim"
    assert not hopper.fits(x, B[..., :32], B[..., :32]), "d_state"
    assert not hopper.fits(x[:, :, :2], B, B), "one head a group"
    assert not hopper.fits(x, B, B, x.transpose(1, 2)), "heads apart"
    packed = torch.zeros(2, 70, 4 * 64 + 4, dtype=torch.bfloat16)
    assert not hopper.fits(packed[..., 4:].unflatten(-1, (4, 64)), B, B), "not at a multiple of 16 bytes"


@pytest.mark.gpu
@pytest.mark.parametrize(("b", "l", "sizes"), [(3, 329, {"h": 64, "n": 128}), (20, 293, {"h": 8}), (1, 4096, {"h": 64, "n": 128})])
def test_other_kernels_give_the_same(inputs, monkeypatch, b, l, sizes):
    """What is rounded alike in both: outputs, states, and gradients but those of dt and A, which are more exact here."""
    device = torch.device("cuda", 0)
    if not hopper.is_hopper(device):
        pytest.skip("not a Hopper GPU")

    def results():
        tensors = {name: tensor.requires_grad_() for name, tensor in inputs(device, b, l, **sizes).items()}
        y, state = kernel.ssd_chunk_scan(**tensors)
        way = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        torch.autograd.backward((y, state), (way, torch.ones_like(state)))
        return {"y": y, "state": state} | {name: tensors[name].grad for name in ("x", "B", "C", "D", "initial_state")}

    found = results()
    monkeypatch.setattr(hopper, "is_hopper", lambda device: False)
    for name, expected in results().items():
        error = (found[name].double() - expected.double()).norm() / expected.double().norm()
        assert error <= 2e-3, f"{name}: {error}"  # not so for NaN


@pytest.mark.slow
@pytest.mark.parametrize(("name", "defines"), [("scan", {"GATED": 0}), ("scan", {"GATED": 1}), ("scan_states", {}), ("scan_gradients", {})])
@pytest.mark.parametrize("d_state", [64, 128])
def test_it_compiles(name, defines, d_state):
    """The compiler does not wait for each product either."""
    values = {"D_STATE": d_state, "SHARED_BYTES": SHARED_BYTES, **defines}
    _, log = compile.compile_cubin((*hopper.SOURCES, f"{name}.cu"), values, "sm_90a")
    assert all(int(number) <= 64 for number in re.findall(r"(\d+) bytes spill stores", log)), log
    assert "serialized" not in log
