"""The chunked scan and the single step against the recurrence, one position after the other in fp64."""

import pytest
import torch

from omnimamba.ops import ssd_chunk_scan, ssd_step
from omnimamba.ops.ssd import segment_sums

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def inputs(b, l, *, h=4, p=3, g=2, n=5, seed=0):
    """Random inputs by name, with the step sizes and decays that a mixer starts from, and some ten times larger."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (b, l, h, p), "B": (b, l, g, n), "C": (b, l, g, n), "D": (h,), "initial_state": (b, h, p, n)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["dt"] = torch.rand((b, l, h), generator=generator).pow(3)
    tensors["A"] = -(1 + 15 * torch.rand(h, generator=generator))
    return {name: tensors[name] for name in NAMES}


def recurrence(x, dt, A, B, C, D, initial_state):
    heads_per_group = x.shape[2] // B.shape[2]
    B, C = (m.repeat_interleave(heads_per_group, dim=2) for m in (B, C))
    state, y = initial_state, []
    for x_t, dt_t, B_t, C_t in zip(*(m.unbind(1) for m in (x, dt, B, C)), strict=True):
        update = (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        state = (dt_t * A).exp()[..., None, None] * state + update
        y.append((state * C_t[:, :, None]).sum(-1) + D[:, None] * x_t)
    return torch.stack(y, 1) if y else x, state


def scan(x, dt, A, B, C, D, initial_state, *, chunk_size=256):
    return ssd_chunk_scan(x, dt, A, B, C, D=D, chunk_size=chunk_size, initial_state=initial_state)


def assert_near(found, expected, name, tolerance):
    """|found - expected| <= tolerance * max |expected|."""
    if expected.numel():
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize(
    ("l", "chunk_size"),
    [(0, 256), (1, 256), (255, 256), (256, 256), (257, 256), (255, 64), (256, 64), (257, 64), (257, 100), (9, 1), (7, 3)],
)
def test_outputs_and_gradients(l, chunk_size, g):
    tensors = inputs(2, l, g=g)
    fp32 = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    fp64 = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    y, state = scan(**fp32, chunk_size=chunk_size)
    expected_y, expected_state = recurrence(**fp64)
    assert y.shape == expected_y.shape and state.shape == expected_state.shape
    assert_near(y, expected_y, "y", 5e-6)
    assert_near(state, expected_state, "state", 5e-6)

    generator = torch.Generator().manual_seed(1)
    towards = [torch.randn(out.shape, generator=generator) for out in (y, state)]
    sum((out * way).sum() for out, way in zip((y, state), towards, strict=True)).backward()
    sum((out * way).sum() for out, way in zip((expected_y, expected_state), towards, strict=True)).backward()
    for name in NAMES:
        if l or name == "initial_state":
            assert_near(fp32[name].grad, fp64[name].grad, f"gradient of {name}", 1e-5)
    for name, tensor in tensors.items():
        assert torch.equal(fp32[name], tensor), name


def test_gradient_of_strong_decays():
    """As differences of a cumulative sum the decays cancel, and the gradient of A is the first to lose its digits."""
    tensors = inputs(1, 137, h=2, g=1) | {"A": torch.tensor([-0.01, -40.0])}
    tensors["x"] = tensors["x"] + 3
    tensors["B"] = tensors["C"] = tensors["B"].abs()
    grads = []
    for op, dtype in ((scan, torch.float32), (recurrence, torch.float64)):
        arguments = {name: tensor.to(dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}
        op(**arguments)[0].sum().backward()
        grads.append(arguments["A"].grad)
    assert ((grads[0] - grads[1]) / grads[1]).abs().max() <= 1e-5


def test_state_is_zero_before_anything():
    tensors = inputs(2, 9)
    tensors["initial_state"] = torch.zeros_like(tensors["initial_state"])
    for found, expected in zip(scan(**tensors | {"initial_state": None}), scan(**tensors), strict=True):
        assert torch.equal(found, expected)


def test_padding_with_dt_0_changes_nothing():
    lengths = [300, 0, 1, 255, 256, 257]
    tensors = inputs(len(lengths), max(lengths))
    for i, length in enumerate(lengths):
        tensors["dt"][i, length:] = 0
    y, state = scan(**tensors)
    for i, length in enumerate(lengths):
        row = {name: m if m.dim() == 1 else m[i : i + 1] for name, m in tensors.items()}
        row |= {name: row[name][:, :length] for name in ("x", "dt", "B", "C")}
        alone_y, alone_state = scan(**row)
        torch.testing.assert_close(y[i : i + 1, :length], alone_y)
        torch.testing.assert_close(state[i : i + 1], alone_state)


@pytest.mark.parametrize("cuts", [(1,), (255,), (256,), (257,), (0, 300), (100, 100, 201)])
def test_pieces_equal_the_whole(cuts):
    tensors = inputs(2, 300)
    whole_y, whole_state = scan(**tensors)
    y, state = [], tensors["initial_state"]
    over_time = {name: tensors[name].tensor_split(cuts, dim=1) for name in ("x", "dt", "B", "C")}
    for i in range(len(cuts) + 1):
        piece_y, state = scan(**tensors | {name: pieces[i] for name, pieces in over_time.items()} | {"initial_state": state})
        y.append(piece_y)
    torch.testing.assert_close(torch.cat(y, 1), whole_y)
    torch.testing.assert_close(state, whole_state)


def steps(x, dt, A, B, C, D, initial_state):
    state = initial_state.clone()
    y = [ssd_step(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D=D) for t in range(x.shape[1])]
    return torch.stack(y, 1), state


@pytest.mark.parametrize("g", [1, 2, 4])
def test_steps_equal_the_whole(g):
    tensors = inputs(2, 40, g=g)
    expected = recurrence(**{name: tensor.double() for name, tensor in tensors.items()})
    for name, found, exact in zip(("y", "state"), steps(**tensors), expected, strict=True):
        assert_near(found, exact, name, 5e-6)


def test_bf16_keeps_fp32_states():
    tensors = inputs(2, 70)
    half = tensors | {name: tensors[name].bfloat16() for name in ("x", "B", "C")}
    expected_y, expected_state = recurrence(**{name: tensor.double() for name, tensor in half.items()})
    for y, state in (scan(**half, chunk_size=32), steps(**half)):
        assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
        assert_near(y, expected_y, "y", 0.01)
        assert_near(state, expected_state, "state", 0.01)


def test_step_rounds_into_a_state_of_lower_precision():
    x, dt, A, B, C, D, initial_state = inputs(2, 1).values()
    state = initial_state.bfloat16()
    expected_y, expected = steps(x, dt, A, B, C, D, state.float())
    y = ssd_step(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=D)
    assert torch.equal(y, expected_y[:, 0]) and torch.equal(state, expected.bfloat16())


def test_huge_decays_neither_overflow_nor_turn_nan():
    tensors = inputs(1, 64)
    tensors["dt"] = tensors["dt"] * 1e4
    leaf = tensors["dt"].requires_grad_()
    y, state = scan(**tensors, chunk_size=16)
    (y.sum() + state.sum()).backward()
    assert y.isfinite().all() and state.isfinite().all() and leaf.grad.isfinite().all()


def test_segment_sums():
    decay = torch.tensor([5.0, 1.0, 10.0])
    assert segment_sums(decay).tolist() == [[0, -torch.inf, -torch.inf], [1, 0, -torch.inf], [11, 10, 0]]


def test_a_step_does_not_depend_on_the_rows_beside_it():
    b, h, p, n, g = 5, 8, 16, 32, 2
    state = torch.randn(b, h, p, n)
    rows = torch.randn(b, h, p), torch.rand(b, h), torch.randn(b, g, n), torch.randn(b, g, n)
    A, D = -torch.rand(h), torch.randn(h)
    states = [state.clone(), state.clone()]
    x, dt, B, C = rows
    whole = ssd_step(states[0], x, dt, A, B, C, D=D)
    for i in range(b):
        x, dt, B, C = (row[i : i + 1] for row in rows)
        assert torch.equal(ssd_step(states[1][i : i + 1], x, dt, A, B, C, D=D), whole[i : i + 1])
    assert torch.equal(*states)
