"""Filters against the authors' sampler, and the noise that tokens are drawn with."""

import pytest
import torch

from omnimamba.engine.request import SamplingParams
from omnimamba.engine.sampler import SamplingRows, filter_logits, guide, gumbel_noise, probabilities, sample, stream_key


@pytest.fixture
def filtered(recorded):
    """Logits, the settings of each recorded filter, and the probabilities it left."""
    case, settings = recorded.case("sampling"), recorded.sizes["sampling_settings"]
    return case["logits"], settings, [case[f"probs.{i}"] for i in range(len(settings))]


def test_golden_probabilities(filtered):
    logits, settings, expected = filtered
    for setting, probs in zip(settings, expected, strict=True):
        b = len(logits)
        rows = [torch.full((b,), float(setting["temperature"])), torch.full((b,), setting["top_k"]), torch.full((b,), setting["top_p"])]
        actual = probabilities(logits, *rows)
        assert torch.equal(actual > 0, probs > 0), setting
        assert (actual - probs).abs().max() <= 1e-6, setting


def test_rows_have_settings_of_their_own(filtered):
    """All settings in one batch give what each gives alone."""
    logits, settings, expected = filtered
    row = logits[:1].expand(len(settings), -1)
    params = [torch.tensor([float(setting[name]) for setting in settings]) for name in ("temperature", "top_k", "top_p")]
    assert (probabilities(row, *params) - torch.stack([probs[0] for probs in expected])).abs().max() <= 1e-6


def test_ties_keep_exactly_k():
    kept = filter_logits(torch.zeros(1, 9), torch.tensor([4]), torch.tensor([1.0])).isfinite().sum()
    assert kept == 4


def rows_of(n, *, sample_idx=0, **params):
    return SamplingRows.of([SamplingParams(**params)] * n, [stream_key(5, sample_idx)] * n, range(n))


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 2.0, "top_k": 6, "top_p": 0.8}])
def test_tokens_follow_the_distribution(params):
    n = 40_000
    logits = torch.tensor([[2.0, 0.1, -1.0, 1.5, 0.0, -3.0, 0.7, -torch.inf]])
    full = SamplingParams(**params)
    expected = probabilities(logits, torch.tensor([full.temperature]), torch.tensor([full.top_k]), torch.tensor([full.top_p]))[0]
    counts = torch.bincount(sample(logits.expand(n, -1), rows_of(n, **params)), minlength=8)
    assert not counts[expected == 0].any()
    possible = expected > 0
    chi_square = ((counts - n * expected)[possible] ** 2 / (n * expected[possible])).sum()
    assert chi_square < 24  # 6 degrees of freedom at most: p < 0.0005


def test_noise_is_standard_gumbel():
    noise = gumbel_noise(torch.tensor([1, 2]), torch.tensor([0, 9]), 200_000).double()
    assert noise.isfinite().all()
    assert (noise.mean(1) - 0.5772).abs().max() < 0.01
    assert (noise.var(1) - torch.pi**2 / 6).abs().max() < 0.03
    assert torch.corrcoef(noise)[0, 1].abs() < 0.01


def test_noise_is_the_published_hash():
    """SplitMix64 in Python integers; the first output of state 0 is a published constant."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z + gamma) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    assert mix(0) == 0xE220A8397B1DCDAF
    key = stream_key(123, 4)
    assert key == mix((mix(123) + 4 * gamma) & mask)
    rows = SamplingRows.of([SamplingParams()], [key], [17])
    noise = gumbel_noise(rows.keys, rows.steps, 50)[0]
    for token_id in range(50):
        u = ((mix((mix((key + 17 * gamma) & mask) + token_id * gamma) & mask) >> 11) + 0.5) * 2.0**-53
        expected = -torch.log(-torch.log1p(-torch.tensor(u, dtype=torch.float64)))
        assert noise[token_id].item() == pytest.approx(expected.item(), abs=1e-4)


def test_streams_differ():
    first = gumbel_noise(*keys_and_steps((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**64 - 1, 0, 0)), 64)
    assert len({tuple(row.tolist()) for row in first}) == 5
    again = gumbel_noise(*keys_and_steps((0, 1, 0)), 64)
    assert torch.equal(first[2:3], again)


def keys_and_steps(*streams):
    keys = [stream_key(seed, sample_idx) for seed, sample_idx, _ in streams]
    rows = SamplingRows.of([SamplingParams()] * len(streams), keys, [step for *_, step in streams])
    return rows.keys, rows.steps


def test_neighbours_do_not_matter():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(), SamplingParams(top_k=5, temperature=0.3), SamplingParams(temperature=0)]
    keys, steps = [stream_key(i, 0) for i in range(3)], [4, 5, 6]
    together = sample(logits, SamplingRows.of(params, keys, steps))
    for i in range(3):
        assert sample(logits[i : i + 1], SamplingRows.of(params[i : i + 1], keys[i : i + 1], steps[i : i + 1])) == together[i]
    assert together[2] == logits[2].argmax()


def test_greedy_and_tiny_temperatures():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 30
    for params in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-30}, {"temperature": 1e-30, "top_p": 0.5}, {"top_p": 1e-9}):
        assert torch.equal(sample(logits, rows_of(4, **params)), logits.argmax(-1)), params


def test_guidance():
    logits, null = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.0, 1.0, 2.5])
    guided = guide(logits, null, scale)
    assert torch.equal(guided[0], null[0])
    assert torch.allclose(guided[1], logits[1], atol=1e-6)
    assert torch.allclose(guided[2], 2.5 * logits[2] - 1.5 * null[2], atol=1e-5)
    assert torch.equal(guide(logits, logits, scale), logits)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"past_last_position": "wrap"}, "past_last_position='wrap'"),
    ],
)
def test_impossible_values(params, message):
    with pytest.raises(ValueError, match=message) as error:
        SamplingParams(**params)
    assert "\n" not in str(error.value)
