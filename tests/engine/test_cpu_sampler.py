"""The compiled sampler against its definition: the same token for the same stream."""

import pytest
import torch

from omnimamba.engine import cpu_sampler
from omnimamba.engine.request import SamplingParams
from omnimamba.engine.sampler import SamplingRows, filter_logits, plain_sample, stream_key

SETTINGS = [
    {},
    {"temperature": 0},
    {"temperature": 1e-4},
    {"temperature": 50.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 3000},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"temperature": 2.0, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.5},
    {"temperature": 30.0, "top_k": 5, "top_p": 0.3},
]


def rows_of(settings, first_key=0):
    keys = [stream_key(first_key + i, i % 3) for i in range(len(settings))]
    return SamplingRows.of([SamplingParams(**setting) for setting in settings], keys, [i * i for i in range(len(settings))])


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("size", [2, 37, 2048, 16384])
def test_draws_the_same_tokens(size, spread):
    generator = torch.Generator().manual_seed(size)
    num_equal, num = 0, 0
    for first_key in range(0, 300, 100):
        logits = torch.randn(len(SETTINGS), size, generator=generator) * spread
        logits[:, 1::5] = -torch.inf
        rows = rows_of(SETTINGS, first_key)
        num_equal += (cpu_sampler.sample(logits, rows) == plain_sample(logits, rows)).sum().item()
        num += len(SETTINGS)
    assert num_equal >= num - 1  # a sum of probabilities, or two scores, may differ in the last bit


@pytest.mark.parametrize("setting", SETTINGS)
def test_draws_nothing_that_is_filtered_out(setting):
    n = 4000
    logits = torch.tensor([1.0, 1.0, 0.5, -torch.inf, 1.0, 0.5, -2.0, 0.5])
    params = SamplingParams(**setting)
    rows = rows_of([setting] * n)
    found = cpu_sampler.sample(logits.expand(n, -1), rows)
    assert torch.equal(found, plain_sample(logits.expand(n, -1), rows))
    if params.temperature > 0:
        scores = (logits - 1) / params.temperature
        kept = filter_logits(scores[None], torch.tensor([params.top_k]), torch.tensor([params.top_p]))[0].isfinite()
        assert set(found.tolist()) <= set(kept.nonzero()[:, 0].tolist())


def test_rows_that_are_no_neighbours_in_memory():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).T
    rows = rows_of(SETTINGS[:6])
    assert torch.equal(cpu_sampler.sample(logits, rows), plain_sample(logits, rows))
