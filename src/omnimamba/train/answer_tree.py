"""Answers learned with the tower's doubts: at each token, the probabilities of all answers that begin alike.

The tower gives each text of a label column a probability. Given the tokens so far, the next one has the summed probability of the texts
that go on with it, over that of all texts that begin so. These are the targets of distillation (Hinton et al. 2015, arXiv:1503.02531) for
a model that answers token by token; learning from answers drawn by the same probabilities has the same optimum and more noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimamba.config import IGNORE_INDEX

TRACE = 1e-6
"""Of probability that an answer is given at least, so that its tokens are never impossible."""


class AnswerTree:
    """The answers of a label column as token ids."""

    def __init__(self, answers: Sequence[Sequence[int]], device: torch.device) -> None:
        longest = max(map(len, answers))
        padded = [[*ids, *[IGNORE_INDEX] * (longest - len(ids))] for ids in answers]
        self.answers = [list(ids) for ids in answers]
        self.ids = torch.tensor(padded, device=device)
        """[t, longest]"""
        self.levels: list[tuple[Tensor, Tensor]] = []
        """At each depth the tokens [k] that occur there, and which of them each answer has: one-hot rows [t, k], zeros after its end."""
        for column in self.ids.T:
            tokens = column[column != IGNORE_INDEX].unique()
            self.levels.append((tokens, (column[:, None] == tokens).float()))

    def next_tokens(self, chances: Tensor, own: Tensor, vocab_size: int) -> list[Tensor]:
        """At each depth probabilities [b', v] of the next token, of those of the b answers that have a token there.

        chances: [b, t] of all answers; own: [b] which one each row gives.
        """
        alive = chances + TRACE * F.one_hot(own, len(self.ids))
        ids, found = self.ids[own], []
        for depth, (tokens, has) in enumerate(self.levels):
            goes_on = ids[:, depth] != IGNORE_INDEX
            alive, ids = alive[goes_on], ids[goes_on]
            mass = alive @ has
            found.append(alive.new_zeros(len(alive), vocab_size).index_copy_(1, tokens, mass / mass.sum(1, keepdim=True)))
            alive = alive * (self.ids[:, depth] == ids[:, depth, None])
        return found
