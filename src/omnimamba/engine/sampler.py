"""Logits to tokens: guidance, temperature, top-k, top-p, and noise that depends on nothing but seed, sample, step and token id.

Filters follow the authors' sampler (mamba_ssm): divide by the temperature, keep the top k, then the top p of what is left.

A token is drawn by the Gumbel-max trick: argmax(logits + g), g = -log(-log(u)). Each u is a SplitMix64 hash (Steele et al.
2014) of (seed, sample, step, token id), computed in integers, equal on every device. So a sample does not depend on its
neighbours in the batch, and rounding differences between batch sizes change a token only where two scores nearly tie; with an
inverse CDF they would shift all later boundaries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from omnimamba.engine.request import SamplingParams
from omnimamba.ops.plain_path import missing_for_kernels

MIX_GAMMA = 0x9E3779B97F4A7C15
MIX_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_MASK = 2**64 - 1


def guide(logits: Tensor, null_logits: Tensor, guidance_scale: Tensor) -> Tensor:
    """null + scale * (logits - null). logits: [b, v]; guidance_scale: [b]. A row that is its own null comes back unchanged."""
    return null_logits + guidance_scale[:, None] * (logits - null_logits)


def temper(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - their maximum) / temperature, so that no temperature overflows; 0 divides by 1. logits: [b, v]; temperature: [b]."""
    return (logits - logits.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature, 1)[:, None]


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits [b, v] with -inf where top-k or top-p excludes a token. top_k, top_p: [b]; off: top_k 0, top_p 0 or 1."""
    top_k, top_p = top_k[:, None], top_p[:, None]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill((top_k > 0) & (rank >= top_k), -torch.inf)
    share = ordered.softmax(-1)
    before = share.cumsum(-1) - share  # probability of the tokens ahead of this one
    ordered = ordered.masked_fill((top_p > 0) & (top_p < 1) & (before >= top_p) & (rank > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def probabilities(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The distribution [b, v] that is sampled from; arguments as `temper` and `filter_logits`."""
    return filter_logits(temper(logits, temperature), top_k, top_p).softmax(-1)


def stream_key(seed: int, sample_idx: int) -> int:
    """The 64-bit key of one sample's random stream."""
    return _mix_int(_mix_int(seed) + sample_idx * MIX_GAMMA)


def _mix_int(z: int) -> int:
    z = (z + MIX_GAMMA) & _MASK
    for shift, factor in MIX_ROUNDS:
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return z


def signed(z: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return z - 2**64 if z >= 2**63 else z


def _mix(z: Tensor) -> Tensor:
    """`_mix_int` for int64 tensors, whose products wrap around."""
    z = z + signed(MIX_GAMMA)
    for shift, factor in MIX_ROUNDS:
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * signed(factor)
    return z


def gumbel_noise(keys: Tensor, steps: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [b, v] in fp32. keys: [b] stream keys as int64; steps: [b] index of the token to draw."""
    token_ids = torch.arange(vocab_size, device=keys.device)
    bits = _mix(_mix(keys + steps * signed(MIX_GAMMA))[:, None] + token_ids * signed(MIX_GAMMA))
    u = (((bits >> 11) & (2**53 - 1)).float() + 0.5) * 2.0**-53
    # small u win, and fp32 is fine near 0; u that rounds to 1 would give -inf, the mark of an excluded token
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))


@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """The settings of a batch: tensors of one row a sample [b], and what they have in common."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    guidance_scale: Tensor
    keys: Tensor
    steps: Tensor
    is_greedy: Tensor
    all_greedy: bool
    any_filter: bool

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], keys: Sequence[int], steps: Sequence[int], device: torch.device | str = "cpu"
    ) -> SamplingRows:
        """A row for each of `params`, with its stream key and the index of the token to draw."""
        is_greedy = [p.temperature == 0 or p.top_k == 1 for p in params]
        has_filter = [not greedy and (p.top_k > 0 or p.top_p < 1) for p, greedy in zip(params, is_greedy, strict=True)]
        floats = torch.tensor([[p.temperature, p.top_p, p.guidance_scale] for p in params]).to(device)
        ints = torch.tensor([[p.top_k for p in params], [signed(key) for key in keys], steps, is_greedy], dtype=torch.int64).to(device)
        temperature, top_p, guidance_scale = floats.unbind(1)
        top_k, key, step, greedy = ints
        return cls(temperature, top_k, top_p, guidance_scale, key, step, greedy.bool(), all(is_greedy), any(has_filter))


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """Token ids [b]. logits: [b, v] after guidance; -inf excludes a token."""
    logits = logits.float()
    if logits.device.type == "cpu" and missing_for_kernels("numba") is None:
        from omnimamba.engine import cpu_sampler  # Numba takes a moment to load

        return cpu_sampler.sample(logits, rows)
    return plain_sample(logits, rows)


def plain_sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The definition of `sample`. logits: [b, v] fp32."""
    if rows.all_greedy:
        return logits.argmax(-1)
    scores = temper(logits, rows.temperature)
    if rows.any_filter:
        scores = filter_logits(scores, rows.top_k, rows.top_p)
    scores = scores + gumbel_noise(rows.keys, rows.steps, logits.shape[-1])
    return torch.where(rows.is_greedy[:, None], logits, scores).argmax(-1)
