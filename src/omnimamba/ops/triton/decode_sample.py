"""Logits to the next tokens without leaving the GPU; the definitions are in `omnimamba.engine.sampler`.

`score_kernel` finds the best token of each part of the vocabulary, `finish_kernel` the best of the parts, and moves the row on: its token
becomes the input of the next step, its counters advance, and a row that has ended gives up its slot (-1), so that further steps of the
same block leave its state alone.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from omnimamba.ops.triton.decode import log1p, start, wait
from omnimamba.ops.triton.launch import launch

GAMMA = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64 (Steele et al. 2014), as in `omnimamba.engine.sampler`
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
SUPPRESSED = tl.constexpr(1)
STOPS = tl.constexpr(2)


class Rows(NamedTuple):
    """The rows of a batch, one number each [b]: int64 but for the last two, which are fp32."""

    tokens: Tensor
    """The token that the next step reads."""
    slots: Tensor
    """Negative: the row is padding, or has ended."""
    is_t2i: Tensor
    null_rows: Tensor
    """The row of the null prompt, the row itself without guidance; negative for rows that sample nothing."""
    keys: Tensor
    steps: Tensor
    """Index of the token to draw."""
    top_k: Tensor
    is_greedy: Tensor
    remaining: Tensor
    """Tokens still to come."""
    emitted: Tensor
    """Tokens drawn since the block began."""
    temperature: Tensor
    top_p: Tensor
    guidance_scale: Tensor


class Partial(NamedTuple):
    """Per row and part of the vocabulary [b, parts]: the largest logit, the best score against it, and its token."""

    maximum: Tensor
    score: Tensor
    token: Tensor


@triton.jit
def mix64(z):
    z = z + GAMMA
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    return z ^ (z >> 31)


@triton.jit
def gumbel(key, step, o_v):
    bits = mix64(mix64(key.to(tl.uint64) + step.to(tl.uint64) * GAMMA) + o_v.to(tl.uint64) * GAMMA)
    u = ((bits >> 11).to(tl.float32) + 0.5) * 1.1102230246251565e-16  # 2**-53
    return -tl.log(-log1p(-tl.minimum(u, 0.99999994)))  # 1 - 2**-24


@triton.jit
def score_kernel(
    image_logits, text_logits, text_flags, slots, is_t2i, null_rows, keys, steps, is_greedy, temperature, guidance_scale,
    maximum, score, token, image_vocab, text_vocab, num_parts, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start(PDL)
    i_part = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    null = tl.load(null_rows + i_row)
    task = tl.load(is_t2i + i_row)
    o_v = i_part * TILE + tl.arange(0, TILE)
    noise = gumbel(tl.load(keys + i_row), tl.load(steps + i_row), o_v)
    degrees = tl.load(temperature + i_row)
    scale = tl.load(guidance_scale + i_row)
    greedy = tl.load(is_greedy + i_row) != 0
    vocab = tl.where(task != 0, image_vocab, text_vocab)
    m_v = o_v < vocab
    flags = tl.load(text_flags + o_v, mask=m_v & (task == 0), other=0)
    wait(PDL)
    if (null < 0) | (tl.load(slots + i_row) < 0) | (i_part * TILE >= vocab):
        return
    if task != 0:
        own = tl.load(image_logits + i_row * image_vocab + o_v, mask=m_v, other=0.0).to(tl.float32)
        other = tl.load(image_logits + null * image_vocab + o_v, mask=m_v, other=0.0).to(tl.float32)
    else:
        own = tl.load(text_logits + i_row * text_vocab + o_v, mask=m_v, other=0.0).to(tl.float32)
        other = tl.load(text_logits + null * text_vocab + o_v, mask=m_v, other=0.0).to(tl.float32)
    logits = tl.where(m_v & ((flags & SUPPRESSED) == 0), other + scale * (own - other), float("-inf"))
    highest = tl.max(logits, 0)
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    b_score = tl.where(greedy, logits, (logits - finite) / tl.where(degrees > 0, degrees, 1.0) + noise)
    best = tl.argmax(b_score, 0)
    p_part = i_row * num_parts + i_part
    tl.store(maximum + p_part, highest)
    tl.store(score + p_part, tl.max(b_score, 0))
    tl.store(token + p_part, (i_part * TILE + best).to(tl.int64))


@triton.jit
def finish_kernel(
    maximum, score, token, text_flags, tokens, slots, is_t2i, null_rows, steps, is_greedy, remaining, emitted, temperature, drawn,
    image_parts, text_parts, num_parts, drawn_row, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start(PDL)
    i_row = tl.program_id(0).to(tl.int64)
    o_part = tl.arange(0, TILE)
    wait(PDL)
    # all loads are under way at once
    null = tl.load(null_rows + i_row)
    slot = tl.load(slots + i_row)
    task = tl.load(is_t2i + i_row)
    degrees = tl.load(temperature + i_row)
    greedy = tl.load(is_greedy + i_row) != 0
    at = tl.load(emitted + i_row)
    left = tl.load(remaining + i_row) - 1
    step = tl.load(steps + i_row)
    p_part, is_there = i_row * num_parts + o_part, o_part < num_parts
    b_maximum = tl.load(maximum + p_part, mask=is_there, other=float("-inf"))
    b_score = tl.load(score + p_part, mask=is_there, other=float("-inf"))
    b_token = tl.load(token + p_part, mask=is_there, other=0)
    if (null < 0) | (slot < 0):
        return
    m_part = o_part < tl.where(task != 0, image_parts, text_parts)
    highest = tl.max(tl.where(m_part, b_maximum, float("-inf")), 0)
    if not greedy:  # each part's scores are relative to its own maximum
        b_score += (b_maximum - highest) / tl.where(degrees > 0, degrees, 1.0)
    best = tl.argmax(tl.where(m_part, b_score, float("-inf")), 0)
    next_token = tl.sum(tl.where(o_part == best, b_token, 0), 0)
    tl.store(drawn + i_row * drawn_row + at, next_token)
    tl.store(emitted + i_row, at + 1)
    tl.store(remaining + i_row, left)
    tl.store(steps + i_row, step + 1)
    tl.store(tokens + i_row, next_token)
    tl.store(tokens + null, next_token)
    flags = tl.load(text_flags + next_token, mask=task == 0, other=0)
    if (left <= 0) | ((flags & STOPS) != 0):
        tl.store(slots + i_row, -1)
        tl.store(slots + null, -1)


def num_parts(vocab_size: int) -> int:
    """Parts that a vocabulary is cut into."""
    return triton.cdiv(vocab_size, launch("decode_sample", vocab_size).columns)


def score(
    image_logits: Tensor | None, text_logits: Tensor | None, text_flags: Tensor, rows: Rows, partial: Partial, *, pdl: bool = False
) -> None:
    """Fills `partial` for rows that sample without top-k and top-p.

    logits: [b, v] of each vocabulary that a row needs; text_flags: [v] int32, SUPPRESSED | STOPS.
    """
    logits = [m for m in (image_logits, text_logits) if m is not None]
    vocab_size = max(m.shape[1] for m in logits)
    choice = launch("decode_sample", vocab_size)
    with torch.cuda.device_of(text_flags):
        score_kernel[(triton.cdiv(vocab_size, choice.columns), rows.tokens.shape[0])](
            logits[0] if image_logits is None else image_logits, logits[0] if text_logits is None else text_logits, text_flags,
            rows.slots, rows.is_t2i, rows.null_rows, rows.keys, rows.steps, rows.is_greedy, rows.temperature, rows.guidance_scale, *partial,
            0 if image_logits is None else image_logits.shape[1], 0 if text_logits is None else text_logits.shape[1],
            partial.token.shape[1], TILE=choice.columns, PDL=pdl, num_warps=choice.num_warps, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


def finish(text_flags: Tensor, rows: Rows, partial: Partial, drawn: Tensor, *, parts: tuple[int, int], pdl: bool = False) -> None:
    """The token of each row that samples, into `drawn` [b, block] at its place and into `rows`, whose counters advance, in place.

    parts: how many of `partial` hold for T2I rows and for MMU rows.
    """
    with torch.cuda.device_of(text_flags):
        finish_kernel[(rows.tokens.shape[0],)](
            *partial, text_flags, rows.tokens, rows.slots, rows.is_t2i, rows.null_rows, rows.steps, rows.is_greedy, rows.remaining,
            rows.emitted, rows.temperature, drawn, *parts, partial.token.shape[1], drawn.shape[1],
            TILE=triton.next_power_of_2(max(parts)), PDL=pdl, num_warps=1, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
