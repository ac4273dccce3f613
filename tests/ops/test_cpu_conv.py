"""The convolution compiled for CPUs against its definition."""

import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("numba")

from omnimamba.ops import conv
from omnimamba.ops.conv import plain_causal_conv1d
from omnimamba.ops.cpu.conv import causal_conv1d


def inputs(b, l, c=48, dtype=torch.float32):
    generator = torch.Generator().manual_seed(l)
    x = torch.randn(b, l, c + 24, generator=generator).to(dtype)[:, :, 8 : 8 + c]  # a part of wider rows, as in the model
    weight, bias = torch.randn(c, 4, generator=generator).to(dtype), torch.randn(c, generator=generator).to(dtype)
    return x, weight, bias, torch.randn(b, c, 4, generator=generator).to(dtype)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("l", [1, 2, 3, 4, 5, 255, 256, 257])
def test_definition(l, dtype, limit):
    x, weight, bias, past = inputs(3, l, dtype=dtype)
    before = [tensor.clone() for tensor in (x, weight, bias, past)]
    for initial_state in (None, past):
        for lengths in (None, torch.tensor([0, l, l // 2])):
            y, state = causal_conv1d(x, weight, bias, initial_state=initial_state, lengths=lengths)
            expected, expected_state = plain_causal_conv1d(
                x.float(), weight.float(), bias.float(), initial_state=None if initial_state is None else past.float(), lengths=lengths
            )
            assert y.dtype == dtype and (y.float() - expected).norm() <= limit * expected.norm()
            assert torch.equal(state, expected_state.to(dtype))
    assert all(map(torch.equal, (x, weight, bias, past), before))


def test_pieces_are_the_same_to_the_bit():
    x, weight, bias, past = inputs(2, 19)
    y, state = causal_conv1d(x, weight, bias, initial_state=past, lengths=None)
    for cut in (1, 2, 3, 10):
        first, between = causal_conv1d(x[:, :cut], weight, bias, initial_state=past, lengths=None)
        second, last = causal_conv1d(x[:, cut:], weight, bias, initial_state=between, lengths=None)
        assert torch.equal(torch.cat([first, second], 1), y) and torch.equal(last, state)


def test_the_default_device_changes_nothing():
    x, weight, bias, _ = inputs(2, 5)
    for lengths in (None, torch.tensor([2, 5])):
        expected = causal_conv1d(x, weight, bias, initial_state=None, lengths=lengths)
        with torch.device("meta"):
            assert all(map(torch.equal, causal_conv1d(x, weight, bias, initial_state=None, lengths=lengths), expected))


def test_short_inputs_have_no_threads_of_their_own():
    num = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        before = threading.active_count()
        for l in range(1, 12):
            x, weight, bias, _ = inputs(1, l)
            causal_conv1d(x, weight, bias, initial_state=None, lengths=None)
        assert threading.active_count() <= before + 6
    finally:
        torch.set_num_threads(num)


def test_it_is_not_used_where_numbers_do_not_lie_in_memory():
    with FakeTensorMode():
        y, state = conv.causal_conv1d(torch.empty(2, 5, 48), torch.empty(48, 4), torch.empty(48))
    assert y.shape == (2, 5, 48) and state.shape == (2, 48, 4)


def test_it_is_used_where_no_gradient_is_asked_for(monkeypatch):
    x, weight, bias, past = inputs(1, 5)
    calls = []
    monkeypatch.setattr(conv, "plain_causal_conv1d", lambda *args, **options: calls.append(args) or plain_causal_conv1d(*args, **options))
    conv.causal_conv1d(x, weight, bias, initial_state=past)
    assert not calls
    conv.causal_conv1d(x[:, :, :20], weight[:20], bias[:20])
    conv.causal_conv1d(x, weight[:, :3], bias)
    assert len(calls) == 2
    y, _ = conv.causal_conv1d(x, weight.requires_grad_(), bias)
    y.sum().backward()
    assert len(calls) == 3 and weight.grad is not None
