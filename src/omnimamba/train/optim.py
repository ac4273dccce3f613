"""AdamW with a warm-up and a cosine schedule, and an exponential moving average of the weights."""

import math
from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from omnimamba.train.config import Train
from omnimamba.train.parallel import local


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
    device = parameters[0].device
    is_recorded = train.graphs and device.type == "cuda"
    lr = torch.tensor(train.lr, dtype=torch.float32, device=device) if is_recorded else train.lr  # a recorded update reads it where it lies
    return torch.optim.AdamW(groups, lr=lr, betas=(train.beta1, train.beta2), fused=device.type == "cuda", capturable=is_recorded)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def learned_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: the parameters that learn, and the buffers (statistics of BatchNorm)."""
    return {**trainable(module), **dict(module.named_buffers())}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's tensors by parameter and kind, as in `layers.0.weight/exp_avg`; none for parameters that have had no update."""
    return {
        f"{name}/{kind}": tensor for name, parameter in trainable(module).items() for kind, tensor in optimizer.state[parameter].items()
    }


def prepare_optimizer(module: nn.Module, optimizer: torch.optim.AdamW, names: Container[str]) -> None:
    """Gives the parameters that have had an update, as `names` of `optimizer_tensors` say, a state to load values into."""
    is_fused = optimizer.defaults["fused"]
    for name, parameter in trainable(module).items():
        if f"{name}/step" in names:
            step = torch.zeros((), device=parameter.device if is_fused else "cpu")
            moments = {kind: torch.zeros_like(parameter, memory_format=torch.preserve_format) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": step, **moments}


class MovingAverage:
    """Exponential moving average of what training changes; decay grows from 0.1 to its final value over the first steps."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.tensors = {name: tensor for name, tensor in learned_state(module).items() if tensor.is_floating_point()}
        self.decay = decay
        self.averages = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, tensors = ([local(tensor) for tensor in group.values()] for group in (self.averages, self.tensors))
        torch._foreach_lerp_(averages, tensors, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the values of averages and tensors; call it twice around a validation."""
        for name, tensor in self.tensors.items():
            shard, average = local(tensor), local(self.averages[name])
            value = shard.clone()
            shard.copy_(average)
            average.copy_(value)
