"""Benchmarks that ask about images: what one is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimamba.config import nearest_name
from omnimamba.engine.request import require_int
from omnimamba.eval.files import require_images
from omnimamba.eval.scores import Figure, ratio_of_sums

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA 1.5 appends to a question that has a short answer (arXiv:2310.03744, section 3.2)."""


@dataclasses.dataclass(frozen=True)
class Question:
    id: str
    """Unique in its benchmark."""
    image: Path | bytes
    """A file, or the content of one."""
    image_name: str
    """Equal for questions about one image."""
    text: str
    """The whole prompt."""
    reference: Any
    """What the scorer compares with, JSON-able; None where it is not published."""
    group: str = ""
    """The part of the benchmark with figures of its own."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    name: str
    title: str
    splits: tuple[str, ...]
    """The first one is the default."""
    read: Callable[[Path, str], list[Question]]
    """The questions of a folder and split. ValueError names what is missing or malformed."""
    images_from: str
    """Where the images are to be had."""
    score: Callable[[Question, str], float | None]
    """Of one answer; None if the reference is not published."""
    figures: Callable[[Sequence[Question], Sequence[str], int], dict[str, Figure]]
    """Of questions and answers; the last argument is the seed of the intervals."""
    protocol: str
    """Prompt and scoring in one line."""
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)
    upload: Callable[[Path, str, Sequence[Question], Sequence[str]], Any] | None = None
    """The JSON that a test server wants, of (data, split, questions, answers); None for a split that is scored here."""

    def questions(self, data: Path, split: str | None = None, limit: int | None = None) -> list[Question]:
        """The first `limit` questions of a split, whose images are all there."""
        split = self.split(split)
        require_int("limit", 1 if limit is None else limit, 1)
        questions = self.read(Path(data), split)[:limit]
        images = [question.image for question in questions if isinstance(question.image, Path)]
        require_images(Path(data), self.title, images, self.images_from)
        return questions

    def split(self, name: str | None) -> str:
        if name is None:
            return self.splits[0]
        if name not in self.splits:
            raise ValueError(f"{self.title} has no split {name!r}; {nearest_name(name, self.splits)}")
        return name


def mean_scores(
    questions: Sequence[Question], values: Sequence[float | None], parts: Mapping[str, Callable[[Question], bool]], seed: int
) -> dict[str, Figure]:
    """The mean of the values over the questions of each part; a part without any is left out, and values of None do not count."""
    scored = [(question, value) for question, value in zip(questions, values, strict=True) if value is not None]
    figures = {}
    for name, is_in in parts.items():
        if some := [(question.image_name, value) for question, value in scored if is_in(question)]:
            images, numbers = zip(*some, strict=True)
            figures[name] = ratio_of_sums(images, numbers, seed=seed)
    return figures


def every(question: Question) -> bool:
    """The part that is the whole."""
    return True


def in_group(*groups: str) -> Callable[[Question], bool]:
    return lambda question: question.group in groups
