"""Task LoRA (paper section 3.3): one low-rank pair per task beside one shared weight."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnimamba.config import LoraConfig, Task
from omnimamba.ops.quant import QuantizedWeight, linear

MERGED_POSITIONS = 8192
"""From so many on, a product with weight + scaling * B A costs less than LoRA's way through an output of as many rows."""
Tasks = Task | Tensor | None
"""Which LoRA a call uses: one task for the whole batch, `is_t2i` [b] bool for a mixed batch, None for no LoRA at all."""


class TaskLoraLinear(nn.Module):
    """Linear layer without bias whose output gains scaling * B_task(A_task(dropout(u))) for the task of each row."""

    def __init__(self, in_features: int, out_features: int, lora: LoraConfig, tasks: Iterable[Task] = tuple(Task)) -> None:
        super().__init__()
        self.weight: nn.Parameter | QuantizedWeight = nn.Parameter(torch.empty(out_features, in_features))
        tasks = tuple(tasks) if lora.rank else ()
        self.lora_A = nn.ParameterDict({str(task): torch.empty(lora.rank, in_features) for task in tasks})
        self.lora_B = nn.ParameterDict({str(task): torch.empty(out_features, lora.rank) for task in tasks})
        self.scaling = lora.scaling
        self.dropout = lora.dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        assert isinstance(self.weight, nn.Parameter)
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        for task in self.lora_A:
            nn.init.kaiming_uniform_(self.lora_A[task], a=5**0.5)
            nn.init.zeros_(self.lora_B[task])

    def forward(self, u: Tensor, task: Tasks) -> Tensor:
        """u: [b, d] or [b, l, d]. Returns the same shape with out_features last."""
        y = linear(u, self.weight)
        if task is None or not self.lora_A:
            return y
        if isinstance(task, Task):
            return y + self.lora(u, task)
        is_t2i = task.view(-1, *[1] * (u.dim() - 1))
        return y + torch.where(is_t2i, self.lora(u, Task.T2I), self.lora(u, Task.MMU))

    @torch.no_grad()
    def read(self, u: Tensor, task: Tasks) -> Tensor:
        """`forward` without gradients. The large product is added to what LoRA gives, not the other way round: the output [b, l, n] then
        passes through memory three times fewer. But on a CPU a quantised matrix has a product of its own, to which LoRA is added. For a
        long prompt LoRA's product is added to the weight instead, which is the smaller of the two by far."""
        if not isinstance(task, Task) or not self.lora_A:
            return self(u, task)
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            if u.device.type == "cpu":
                return add_product(linear(u, weight), F.linear(u, self.lora_A[task]) * self.scaling, self.lora_B[task])
            weight = weight.dequantize(u.dtype)
        if u[..., 0].numel() >= MERGED_POSITIONS:
            A, B = self.lora_A[task], self.lora_B[task]
            return F.linear(u, torch.addmm(weight, B, A, alpha=self.scaling))
        return add_product(self.lora(u, task), u, weight)

    def pair(self, task: Task | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """A and B of a task; none for no task, or where there is no LoRA."""
        return (self.lora_A[task], self.lora_B[task]) if task is not None and self.lora_A else (None, None)

    def lora(self, u: Tensor, task: Task) -> Tensor:
        """What the pair of `task` adds to the output."""
        u = F.dropout(u, self.dropout, self.training)
        return F.linear(F.linear(u, self.lora_A[task]) * self.scaling, self.lora_B[task])


def add_product(y: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """y + u @ weight.T in y's type and memory. y: [..., n]; u: [..., k]; weight: [n, k]."""
    return y.flatten(0, -2).addmm_(u.flatten(0, -2).to(y.dtype), weight.to(y.dtype).T).unflatten(0, y.shape[:-1])
