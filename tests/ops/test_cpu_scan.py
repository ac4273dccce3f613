"""The recurrence compiled for CPUs against its definition, at odd lengths and layouts, in pieces and beside other sequences."""

import pytest
import torch

pytest.importorskip("numba")

from omnimamba.ops import ssd
from omnimamba.ops.cpu.scan import ssd_chunk_scan
from omnimamba.ops.ssd import plain_ssd_chunk_scan

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(b, l, h=4, p=32, g=2, n=16, dtype=torch.float32, seed=0):
    """x, B and C are parts of one tensor, as in the model; dt is 0 at some positions, as where a row is padded."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(b, l, h * p + 2 * g * n, generator=generator).to(dtype)
    x, B, C = both.split((h * p, g * n, g * n), -1)
    dt = torch.rand(b, l, h, generator=generator) * (torch.rand(b, l, 1, generator=generator) > 0.1)
    A, D = -torch.rand(h, generator=generator) * 4, torch.randn(h, generator=generator)
    x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "initial_state": torch.randn(b, h, p, n, generator=generator)}


def assert_near(found, expected, dtype):
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= LIMITS[dtype], error  # not so for NaN


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("l", [1, 2, 15, 255, 256, 257])
@pytest.mark.parametrize("sizes", [{}, {"h": 8, "p": 64, "g": 1, "n": 64}, {"h": 2, "p": 16, "g": 2, "n": 2}])
def test_definition(l, sizes, dtype):
    given = inputs(3, l, dtype=dtype, **sizes)
    before = {name: tensor.clone() for name, tensor in given.items()}
    for change in ({}, {"initial_state": None}):
        y, state = ssd_chunk_scan(**(given | change))
        expected_y, expected_state = plain_ssd_chunk_scan(**(given | change), chunk_size=64)
        assert y.dtype == dtype and state.dtype == torch.float32
        assert_near(y, expected_y, dtype)
        assert_near(state, expected_state, dtype)
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", LIMITS)
def test_pieces_and_single_sequences_are_the_same_to_the_bit(dtype):
    given = inputs(3, 37, dtype=dtype)
    y, state = ssd_chunk_scan(**given)
    for cut in (1, 8, 21):
        between, pieces = given["initial_state"], []
        for part in (slice(cut), slice(cut, None)):
            cut_inputs = given | {name: given[name][:, part] for name in ("x", "dt", "B", "C")}
            piece, between = ssd_chunk_scan(**(cut_inputs | {"initial_state": between}))
            pieces.append(piece)
        assert torch.equal(torch.cat(pieces, 1), y) and torch.equal(between, state)
    for row in range(3):
        alone = {name: tensor[row : row + 1] if name not in ("A", "D") else tensor for name, tensor in given.items()}
        found, last = ssd_chunk_scan(**alone)
        assert torch.equal(found[0], y[row]) and torch.equal(last[0], state[row])


def test_threads_change_nothing():
    given, num = inputs(1, 9), torch.get_num_threads()
    expected = ssd_chunk_scan(**given)
    try:
        for other in (1, 3, 64):
            torch.set_num_threads(other)
            assert all(map(torch.equal, ssd_chunk_scan(**given), expected))
    finally:
        torch.set_num_threads(num)


def test_other_layouts():
    given = inputs(2, 7)
    expected = ssd_chunk_scan(**given)
    for name in ("x", "dt", "B", "C", "initial_state"):
        strided = given[name].transpose(0, -1).contiguous().transpose(0, -1)
        assert all(map(torch.equal, ssd_chunk_scan(**(given | {name: strided})), expected))
    given = inputs(1, 7, h=1, g=1)
    expected = ssd_chunk_scan(**given)
    given["dt"] = given["dt"].as_strided((1, 7, 1), (1, 1, 7))  # contiguous, too: the only head is nowhere else
    assert all(map(torch.equal, ssd_chunk_scan(**given), expected))


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "initial_state"])
def test_other_types(name):
    given = inputs(2, 7)
    assert all(map(torch.equal, ssd_chunk_scan(**(given | {name: given[name].double()})), ssd_chunk_scan(**given)))


def test_the_default_device_changes_nothing():
    given = inputs(2, 7) | {"initial_state": None}
    expected = ssd_chunk_scan(**given)
    with torch.device("meta"):
        assert all(map(torch.equal, ssd_chunk_scan(**given), expected))


def test_it_is_used_where_no_gradient_is_asked_for(monkeypatch):
    given = inputs(1, 5)
    calls = []
    monkeypatch.setattr(ssd, "plain_ssd_chunk_scan", lambda *args, **options: calls.append(args) or plain_ssd_chunk_scan(*args, **options))
    ssd.ssd_chunk_scan(**given, chunk_size=64)
    assert not calls
    odd = inputs(1, 5, p=20)
    ssd.ssd_chunk_scan(**odd, chunk_size=64)
    ssd.ssd_chunk_scan(**{name: tensor.double() for name, tensor in given.items()}, chunk_size=64)
    assert len(calls) == 2
    given["dt"].requires_grad_()
    y, _ = ssd.ssd_chunk_scan(**given, chunk_size=64)
    y.sum().backward()
    assert len(calls) == 3 and given["dt"].grad is not None
    with torch.no_grad():
        ssd.ssd_chunk_scan(**given, chunk_size=64)
    assert len(calls) == 3
