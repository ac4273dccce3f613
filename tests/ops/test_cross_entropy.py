"""The chunked cross entropy of a head against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from omnimamba.ops.cross_entropy import linear_cross_entropy


def inputs(n=37, d=16, v=50, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(v, d).requires_grad_(), torch.randint(v, (n,))


def gradients(hidden, weight, labels, chunk):
    loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
    return loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000])
def test_loss_and_gradients(chunk):
    hidden, weight, labels = inputs()
    expected = F.cross_entropy(hidden @ weight.mT, labels, reduction="sum")
    grads = torch.autograd.grad(3 * expected, (hidden, weight))
    for found, wanted in zip(gradients(hidden, weight, labels, chunk), (expected.detach(), *grads), strict=True):
        torch.testing.assert_close(found, wanted)


def test_autocast():
    hidden, weight, labels = inputs(n=200)
    exact = gradients(hidden, weight, labels, 0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, chunked = (gradients(hidden, weight, labels, chunk) for chunk in (0, 16))
    for wanted, reference, found in zip(exact, rounded, chunked, strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= 1.2 * (reference - wanted).abs().max() + 1e-6


def test_frozen_parts_get_no_gradient():
    hidden, weight, labels = inputs()
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels, chunk=5), hidden)
    assert grad.shape == hidden.shape
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, labels, chunk=5), weight)
    assert grad.shape == weight.shape


def test_memory_does_not_grow_with_the_number_of_positions():
    """No tensor larger than a chunk's scores, the hidden states or the head is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    hidden, weight, labels = inputs(n=4096, d=8, v=256)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk=64).backward()
    assert largest.numel == 4096 * 8


@pytest.mark.parametrize("chunk", [0, 5])
def test_shares(chunk):
    hidden, weight, labels = inputs()
    shares = torch.rand(len(labels))
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, shares=shares, chunk=chunk), (hidden, weight))
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.mT, labels, reduction="none") @ shares, (hidden, weight))
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("chunk", [0, 5, 36])
def test_probabilities_as_labels(chunk):
    hidden, weight, labels = inputs()
    probabilities, shares = torch.rand(len(hidden), len(weight)).softmax(1), torch.rand(len(hidden))
    found = linear_cross_entropy(hidden, weight, probabilities, shares=shares, chunk=chunk)
    expected = -((hidden @ weight.mT).log_softmax(1) * probabilities).sum(1) @ shares
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(gradient, wanted)
    certain = F.one_hot(labels, len(weight)).bfloat16()
    torch.testing.assert_close(*(linear_cross_entropy(hidden, weight, target, chunk=chunk) for target in (certain, labels)))
