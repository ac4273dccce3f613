"""Cross entropy of a linear head, chunk by chunk, so that the scores of all positions never exist at once.

Scores of 23,000 image tokens over 16,384 codes take 1.5 GB in fp32, and as much for each of softmax and gradient. Here a chunk's
gradients are computed as soon as its scores are, so the backward pass needs neither the scores nor a second product with the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, shares: Tensor | None = None, chunk: int = 0) -> Tensor:
    """The summed cross entropy of labels under softmax(hidden @ weight.T), fp32. hidden: [n, d]; weight: [v, d].

    labels: [n] classes, or [n, v] probabilities that sum to one in each row. shares: [n] fp32, what each position counts (None: one each).
    chunk: positions at once; 0 is all, which is the reference.
    """
    shares = torch.ones(len(hidden), device=hidden.device) if shares is None else shares
    if 0 < chunk < len(hidden):
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, shares, chunk)  # type: ignore[return-value]
    labels = labels.float() if labels.ndim == 2 else labels
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none").mul(shares).sum()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shares: Tensor, chunk: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            loss = torch.zeros((), device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros(weight.shape, device=weight.device) if needs_weight else None
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                x, target = hidden[rows].to(dtype), labels[rows]
                scores = F.linear(x, head).float()
                log_sum = scores.logsumexp(1, keepdim=True)
                # the gradient of the scores: softmax minus probability, which is one at a label
                if target.ndim == 2:
                    probabilities = target.float()
                    loss += ((log_sum[:, 0] - (scores * probabilities).sum(1)) * shares[rows]).sum()
                    grad = scores.sub_(log_sum).exp_().sub_(probabilities)
                else:
                    target = target[:, None]
                    loss += ((log_sum - scores.gather(1, target))[:, 0] * shares[rows]).sum()
                    grad = scores.sub_(log_sum).exp_()
                    grad = grad.scatter_add_(1, target, grad.new_full((), -1).expand_as(target))
                grad = grad.mul_(shares[rows, None]).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ head
                if grad_weight is not None:
                    grad_weight += grad.mT @ x
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad_loss).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype),
            None,
            None,
            None,
        )
