"""Scores of answers, pictures and rankings, and the figures made of them.

Every figure is a ratio of two sums over answers (an accuracy: right answers / answers; F1: 2 tp / (2 tp + fp + fn); a mean: values
/ their number), so one function gives them all their interval.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

NUM_RESAMPLES = 1000
RESAMPLES_AT_ONCE = 100
"""Draws in memory together: a hundred of the 40,504 images of COCO val2014 take 32 MB."""
CONFIDENCE = 95
MAX_PSNR = 100.0
"""dB given to equal images. A single step of 1/255 in one of 128 x 128 x 3 values is 95 dB."""

_QUOTES = str.maketrans("‘’“”", "''\"\"")
_END_PUNCTUATION = " .,:;!?\"'"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A value with its bootstrap interval; all three None where it is undefined (precision without a single yes)."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Answers, or pictures, that it is made of."""


def ratio_of_sums(images: Sequence[str], numerators: ArrayLike, denominators: ArrayLike | None = None, *, seed: int = 0) -> Figure:
    """sum(numerators) / sum(denominators), one of each for every answer; denominators are 1 unless given, which makes it the mean.

    images: the image of each answer. The percentile bootstrap (Efron 1979) draws images with all their answers, because answers
    about one image are not independent; draws without a value (a denominator of 0) are left out.
    """
    return sum_of_ratios([(images, numerators, denominators)], seed=seed)


def sum_of_ratios(parts: Sequence[tuple[Sequence[str], ArrayLike, ArrayLike | None]], *, scale: float = 1.0, seed: int = 0) -> Figure:
    """`scale` times the sum of the ratios of several parts, each as in `ratio_of_sums`; undefined if one of them is.

    Images that the parts share are drawn together, others within their own part.
    """
    row = {image: i for i, image in enumerate(dict.fromkeys(image for images, _, _ in parts for image in images))}
    per_image, is_in = np.zeros((len(row), len(parts), 2)), np.zeros((len(row), len(parts)), bool)
    for part, (images, numerators, denominators) in enumerate(parts):
        rows = [row[image] for image in images]
        is_in[rows, part] = True
        below = np.ones(len(images)) if denominators is None else denominators
        np.add.at(per_image, (rows, part), np.stack([numerators, below], axis=-1))
    num_answers = sum(len(images) for images, _, _ in parts)
    value = scale * _ratio(per_image.sum(0)).sum()
    if math.isnan(value):
        return Figure(None, None, None, num_answers)
    rng, draws = np.random.default_rng(seed), np.zeros((NUM_RESAMPLES, len(parts), 2))
    for kind in np.unique(is_in, axis=0):
        some = per_image[(is_in == kind).all(1)]
        for start in range(0, NUM_RESAMPLES, RESAMPLES_AT_ONCE):
            size = min(RESAMPLES_AT_ONCE, NUM_RESAMPLES - start)
            counts = rng.multinomial(len(some), np.full(len(some), 1 / len(some)), size=size)
            draws[start : start + size] += (counts @ some.reshape(len(some), -1)).reshape(size, len(parts), 2)
    tail = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(scale * _ratio(draws).sum(-1), [tail, 100 - tail])
    return Figure(float(value), float(low), float(high), num_answers)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """sums[..., 0] / sums[..., 1], NaN where the denominator is 0."""
    numerator, denominator = sums[..., 0], sums[..., 1]
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


# ---- answers


def normalise(text: str) -> str:
    """Text as it is compared: NFKC, case folded, straight quotes, dashes and underscores as spaces, single spaces, bare ends."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_QUOTES)
    return " ".join(re.sub(r"[-_\u2010-\u2015]", " ", text).split()).strip(_END_PUNCTUATION)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", normalise(text))


def is_match(answer: str, reference: str) -> bool:
    """Whether they are equal once normalised."""
    return normalise(answer) == normalise(reference)


def word_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, repeated words counted (SQuAD, arXiv:1606.05250, section 6.1)."""
    said, wanted = words(answer), words(reference)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else float(said == wanted)


def mentions(answer: str, phrase: str) -> bool:
    """Whether the words of `phrase` stand in the answer one after the other; False for a phrase without words."""
    return bool(words(phrase)) and f" {' '.join(words(phrase))} " in f" {' '.join(words(answer))} "


def yes_or_no(answer: str) -> bool | None:
    """True for yes, False for no: the first word if it is one of them, else the only one that occurs; None if that decides nothing."""
    said = words(answer)
    found = {word for word in said[:1] if word in ("yes", "no")} or {"yes", "no"} & set(said)
    return found == {"yes"} if len(found) == 1 else None


def yes_or_no_parts(truth: np.ndarray, yes: np.ndarray) -> dict[str, tuple[ArrayLike, ArrayLike | None]]:
    """Numerators and denominators of POPE's figures (arXiv:2305.10355), yes is positive. truth, yes: [b] bool."""
    hits = yes & truth
    return {
        "accuracy": (yes == truth, None),
        "precision": (hits, yes),
        "recall": (hits, truth),
        "f1": (2 * hits, yes.astype(int) + truth),  # 2 tp / (2 tp + fp + fn)
        "yes_ratio": (yes, None),
    }


# ---- pictures and rankings


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """10 log10(1 / mean squared error) in dB of two uint8 images on the scale [0, 1]; MAX_PSNR if they are equal."""
    if image.shape != reference.shape:
        raise ValueError(f"images of shapes {image.shape} and {reference.shape} cannot be compared; resize one")
    mse = np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2) / 255**2
    return min(MAX_PSNR, float(10 * np.log10(1 / mse))) if mse else MAX_PSNR


def ranks(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Place of each row's target, 1 is best, ties and NaN counted against it. scores: [b, t]; targets: [b] columns."""
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    return (~(scores < own)).sum(1)
