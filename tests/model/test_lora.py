"""Task LoRA: which rows a pair reaches, and when dropout is on."""

import pytest
import torch

from omnimamba.config import LoraConfig, Task
from omnimamba.model import lora
from omnimamba.model.lora import TaskLoraLinear
from omnimamba.model.state import MambaState


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def linear(redraw):
    return redraw(TaskLoraLinear(12, 20, LoraConfig(rank=3, alpha=6, dropout=0.5)))


@pytest.mark.parametrize("task", Task)
def test_a_pair_adds_its_scaled_product(linear, task):
    u = randn(2, 5, 12)
    merged = linear.weight + 2 * linear.lora_B[task] @ linear.lora_A[task]
    torch.testing.assert_close(linear(u, task), u @ merged.mT)
    torch.testing.assert_close(linear(u, None), u @ linear.weight.mT)


def test_a_new_pair_adds_nothing():
    linear, u = TaskLoraLinear(12, 20, LoraConfig()).eval(), randn(2, 12)
    assert torch.equal(linear(u, Task.MMU), linear(u, None))


@pytest.mark.parametrize("shape", [(4, 12), (4, 7, 12)])
def test_rows_of_a_mixed_batch_have_their_own_task(linear, shape):
    u, is_t2i = randn(*shape), torch.tensor([True, False, False, True])
    expected = torch.where(is_t2i.view(-1, *[1] * (u.dim() - 1)), linear(u, Task.T2I), linear(u, Task.MMU))
    torch.testing.assert_close(linear(u, is_t2i), expected)


@torch.no_grad()
def test_mixed_batch_equals_single_task_batches(backbone):
    config = backbone.layers[0].mixer.config
    x, is_t2i = randn(4, 20, config.d_model), torch.tensor([True, False, True, False])
    mixed = MambaState.zeros(config, 4)
    hidden = [backbone(x[:, :-1], is_t2i, state=mixed), backbone.step(x[:, -1], is_t2i, mixed)]
    for task, rows in ((Task.T2I, [0, 2]), (Task.MMU, [1, 3])):
        alone = MambaState.zeros(config, 2)
        torch.testing.assert_close(hidden[0][rows], backbone(x[rows, :-1], task, state=alone), rtol=1e-5, atol=5e-5)
        torch.testing.assert_close(hidden[1][rows], backbone.step(x[rows, -1], task, alone), rtol=1e-5, atol=5e-5)
        torch.testing.assert_close(mixed.slots(rows).ssm, alone.ssm, rtol=1e-5, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 1, 7, 8, 30])
@pytest.mark.parametrize("task", [*Task, None])
def test_a_prompt_is_read_as_in_training(linear, monkeypatch, length, task):
    """Fewer positions than those from which on LoRA is merged, as many, and more."""
    monkeypatch.setattr(lora, "MERGED_POSITIONS", 16)
    u = randn(2, length, 12)
    torch.testing.assert_close(linear.eval().read(u, task), linear(u, task))


def test_only_the_active_pair_gets_a_gradient(linear):
    linear(randn(2, 12), Task.T2I).sum().backward()
    assert linear.lora_A[Task.T2I].grad.any() and linear.lora_B[Task.T2I].grad.any()
    assert linear.lora_A[Task.MMU].grad is None and linear.lora_B[Task.MMU].grad is None


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12)])
def test_training_computes_what_inference_does(linear, shape, is_frozen):
    linear.dropout = 0.0
    linear.weight.requires_grad_(not is_frozen)
    found = []
    for training in (False, True):
        linear.train(training)
        linear.zero_grad()
        u = randn(*shape).requires_grad_()
        y = linear(u, Task.T2I)
        (y * randn(*y.shape, seed=1)).sum().backward()
        found.append([y, u.grad, linear.lora_A[Task.T2I].grad, linear.lora_B[Task.T2I].grad, linear.weight.grad])
        assert (linear.weight.grad is None) == is_frozen and linear.lora_A[Task.MMU].grad is None
    for inference, training in zip(*found, strict=True):
        assert inference is training or torch.allclose(inference, training, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_training_under_autocast(linear, is_frozen):
    linear.dropout = 0.0
    linear.weight.requires_grad_(not is_frozen)
    u = randn(2, 5, 12)
    expected = linear(u, Task.MMU)
    linear.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(u, Task.MMU)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
    y.sum().backward()
    assert linear.lora_B[Task.MMU].grad.dtype == torch.float32


def test_dropout_is_on_in_training_only_and_on_the_pair_only(linear):
    u = randn(64, 12)
    assert torch.equal(linear(u, Task.MMU), linear(u, Task.MMU))
    linear.train()
    torch.manual_seed(0)
    assert not torch.equal(linear(u, Task.MMU), linear(u, Task.MMU))
    assert torch.equal(linear(u, None), linear(u, None))
    added = torch.stack([linear(u, Task.MMU) - linear(u, None) for _ in range(2000)]).mean(0)
    linear.eval()
    expected = linear(u, Task.MMU) - linear(u, None)
    assert (added - expected).abs().max() < 0.1 * expected.abs().max()  # inverted dropout keeps the mean
