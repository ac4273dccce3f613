"""AdamW with a warm-up and a cosine schedule, and an exponential moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from omnimamba.train.config import Train


def learning_rate(step: int, train: Train) -> float:
    """Linear warm-up, then a cosine from `lr` to `min_lr_ratio * lr`, which it reaches where the steps end."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def adamw(parameters: Iterable[nn.Parameter], train: Train) -> torch.optim.AdamW:
    """AdamW whose weight decay spares vectors and scalars (norms, biases, A_log, D, dt_bias)."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=parameters[0].is_cuda)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: the parameters that learn, and the buffers (statistics of BatchNorm)."""
    return {**trainable(module), **dict(module.named_buffers())}


class MovingAverage:
    """Exponential moving average of what training changes; decay grows from 0.1 to its final value over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.tensors = {name: tensor for name, tensor in learned_state(module).items() if tensor.is_floating_point()}
        self.decay = decay
        self.averages = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        tensors = [tensor.data for tensor in self.tensors.values()]
        torch._foreach_lerp_(list(self.averages.values()), tensors, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def swap(self) -> None:
        """Exchanges averages and tensors in place; call it twice around a validation."""
        for name, tensor in self.tensors.items():
            tensor.data, self.averages[name] = self.averages[name], tensor.data

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(tensors[name])
