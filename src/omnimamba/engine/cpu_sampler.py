"""The sampler of `sampler.py` on a CPU, compiled by Numba: one pass over the scores of a row instead of a sort and a dozen operators.

Tokens that top-p keeps are the first in the order of their scores. So no order is needed: if the token with the highest noisy score is not
among them, none at or behind its place is, and the highest of the others is looked for.
"""

# pyright: reportCallIssue=false
# An intrinsic's own first argument is Numba's, a call does not pass it.

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from omnimamba.engine.sampler import MIX_GAMMA, MIX_ROUNDS, SamplingRows
from omnimamba.ops.cpu.vector import bits_of, compiled, jit

GAMMA = np.uint64(MIX_GAMMA)
SHIFT_0, SHIFT_1, SHIFT_2 = (np.uint64(shift) for shift, _ in MIX_ROUNDS)
FACTOR_0, FACTOR_1, FACTOR_2 = (np.uint64(factor) for _, factor in MIX_ROUNDS)
float32, uint64 = numba.float32, numba.uint64


@jit
def mix(z):
    """SplitMix64."""
    z = z + GAMMA
    z = (z ^ (z >> SHIFT_0)) * FACTOR_0
    z = (z ^ (z >> SHIFT_1)) * FACTOR_1
    return (z ^ (z >> SHIFT_2)) * FACTOR_2


@jit
def comes_before(scores, i, j):
    """Whether token i stands before token j in the order of their scores."""
    return scores[i] > scores[j] or (scores[i] == scores[j] and i < j)


@jit
def keep_top_k(scores, k):
    """Scores become -inf behind the k-th place."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    num_equal = k
    for score in scores:
        num_equal -= score > least
    for i in range(len(scores)):
        if scores[i] == least and num_equal > 0:
            num_equal -= 1
        elif scores[i] <= least:
            scores[i] = -np.inf


@jit
def highest(scores, stream, behind):
    """The token with the highest noisy score of those that stand before the token `behind` (-1: of all)."""
    best, winner = float32(-np.inf), 0
    for i in range(len(scores)):
        if behind >= 0 and not comes_before(scores, i, behind):
            continue
        u = (float32(mix(stream + uint64(i) * GAMMA) >> uint64(11)) + float32(0.5)) * float32(2.0**-53)
        # the noise is at most -log(u), and u at least the power of two of its exponent
        exponent = float32(numba.int32(bits_of(u) >> numba.uint32(23)) - 127)
        if scores[i] - exponent * float32(0.6931473) < best:
            continue
        noisy = scores[i] - float32(math.log(-math.log1p(-min(u, float32(1 - 2.0**-24)))))
        if noisy > best:
            best, winner = noisy, i
    return winner


@jit
def share_before(scores, token):
    """Probability of the tokens that stand before `token`."""
    before, every = 0.0, 0.0
    for i in range(len(scores)):
        weight = math.exp(scores[i])
        every += weight
        if comes_before(scores, i, token):
            before += weight
    return before / every


@compiled
def draw(logits, temperature, top_k, top_p, keys, steps, is_greedy, tokens):
    """See `sample`. keys, steps: uint64."""
    for row in range(len(logits)):
        largest = np.argmax(logits[row])
        if is_greedy[row]:
            tokens[row] = largest
            continue
        scores = (logits[row] - logits[row, largest]) / temperature[row]
        if 0 < top_k[row] < len(scores):
            keep_top_k(scores, top_k[row])
        stream = mix(keys[row] + steps[row] * GAMMA)
        winner = highest(scores, stream, -1)
        if 0 < top_p[row] < 1:
            while winner != largest and share_before(scores, winner) >= top_p[row]:
                winner = highest(scores, stream, winner)
        tokens[row] = winner


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Token ids [b], those of `sampler.sample` but for rounding. logits: [b, v] fp32."""
    tokens = torch.empty(len(logits), dtype=torch.int64)
    draw(
        logits.contiguous().numpy(),
        rows.temperature.numpy(),
        rows.top_k.numpy(),
        rows.top_p.numpy(),
        rows.keys.numpy().view(np.uint64),
        rows.steps.numpy().view(np.uint64),
        rows.is_greedy.numpy(),
        tokens.numpy(),
    )
    return tokens
