"""The causal convolution against sums written out position by position; in fp64, so that gradients can be checked numerically."""

import pytest
import torch
import torch.nn.functional as F

from omnimamba.ops import causal_conv1d, causal_conv1d_step

CHANNELS, WIDTH = 3, 4


def inputs(b, l, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, l, CHANNELS), (CHANNELS, WIDTH), (CHANNELS,), (b, CHANNELS, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_position(x, weight, bias, past=None):
    """y and the last WIDTH inputs."""
    seen = [x.new_zeros(x.shape[0], CHANNELS)] * WIDTH if past is None else list(past.unbind(2))
    y = []
    for x_t in x.unbind(1):
        seen.append(x_t)
        total = bias + sum(weight[:, tap] * seen[-WIDTH + tap] for tap in range(WIDTH))
        y.append(total * torch.sigmoid(total))
    return torch.stack(y, 1) if y else x, torch.stack(seen[-WIDTH:], 2)


@pytest.mark.parametrize("has_past", [False, True])
@pytest.mark.parametrize("l", [0, 1, 2, 3, 4, 5, 257])
def test_whole_sequence(l, has_past):
    x, weight, bias, past = inputs(2, l)
    past = past if has_past else None
    kept = None if past is None else past.clone()
    y, state = causal_conv1d(x, weight, bias, initial_state=past)
    expected_y, expected_state = by_position(x, weight, bias, past)
    torch.testing.assert_close(y, expected_y)
    assert torch.equal(state, expected_state)
    assert past is None or torch.equal(past, kept)


def test_it_is_the_conv1d_of_pytorch():
    x, weight, bias, _ = inputs(2, 20)
    expected = F.conv1d(F.pad(x.mT, (WIDTH - 1, 0)), weight[:, None], bias, groups=CHANNELS).mT
    torch.testing.assert_close(causal_conv1d(x, weight, bias)[0], F.silu(expected))


@pytest.mark.parametrize("lengths", [None, [5, 0, 2]])
def test_gradients(lengths):
    x, weight, bias, past = (tensor.requires_grad_() for tensor in inputs(3, 5))
    lengths = None if lengths is None else torch.tensor(lengths)
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, past: causal_conv1d(x, weight, bias, initial_state=past, lengths=lengths), (x, weight, bias, past)
    )


@pytest.mark.parametrize("has_past", [False, True])
def test_rows_of_unequal_lengths_equal_rows_alone(has_past):
    lengths = [6, 0, 1, 3, 4]
    x, weight, bias, past = inputs(len(lengths), max(lengths))
    for i, length in enumerate(lengths):
        x[i, length:] = torch.nan  # what stands in the padding reaches neither a valid output nor a state
    past = past if has_past else torch.zeros_like(past)
    y, state = causal_conv1d(x, weight, bias, initial_state=past, lengths=torch.tensor(lengths))
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        alone_y, alone_state = causal_conv1d(x[row, :length], weight, bias, initial_state=past[row])
        torch.testing.assert_close(y[row, :length], alone_y)
        assert torch.equal(state[row], alone_state)


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (0, 9), (5, 5)])
def test_pieces_equal_the_whole(cuts):
    x, weight, bias, past = inputs(2, 9)
    whole_y, whole_state = causal_conv1d(x, weight, bias, initial_state=past)
    pieces, state = [], past
    for piece in x.tensor_split(cuts, dim=1):
        y, state = causal_conv1d(piece, weight, bias, initial_state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole_y)
    assert torch.equal(state, whole_state)


def test_steps_equal_the_whole():
    x, weight, bias, past = inputs(2, 9)
    whole_y, whole_state = causal_conv1d(x, weight, bias, initial_state=past)
    state = past.clone()
    y = torch.stack([causal_conv1d_step(x_t, state, weight, bias) for x_t in x.unbind(1)], 1)
    torch.testing.assert_close(y, whole_y)
    assert torch.equal(state, whole_state)


def test_bf16_inputs_and_a_state_of_another_dtype():
    x, weight, bias, past = inputs(2, 9, dtype=torch.float32)
    expected, _ = causal_conv1d(x, weight, bias, initial_state=past)
    x = x.bfloat16()
    y, state = causal_conv1d(x, weight, bias, initial_state=past)
    assert y.dtype == state.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.1)
    stepped = past.clone()
    steps = torch.stack([causal_conv1d_step(x_t, stepped, weight, bias) for x_t in x.unbind(1)], 1)
    assert steps.dtype == torch.bfloat16 and stepped.dtype == torch.float32
    torch.testing.assert_close(steps.float(), expected, rtol=0, atol=0.1)
