"""Asking a model many questions about images: in batches, images read ahead in threads, answers kept in a file as they come.

The file holds JSON lines, an answer each, so a run that was interrupted goes on where it was. Several computers share the work as
shards i of n, each with a file of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.eval.files import fields, json_lines, read_ahead
from omnimamba.processor import prompt as layout
from omnimamba.processor.image import ImageSource, load_image

Progress = Callable[[str, int, int], None]
"""(stage, number done, number in all)"""


def no_progress(stage: str, done: int, total: int) -> None: ...


def answer_in_batches(
    model: OmniMamba,
    images: Mapping[str, ImageSource],
    asked: Sequence[tuple[str, str]],
    *,
    max_new_tokens: int,
    past_last_position: str = "error",
) -> Iterator[dict[int, str]]:
    """The greedy answers to `asked` (name of an image, question) by their place there, a batch at a time.

    Each image is read once, whatever the order of the questions.
    """
    idxs_of: dict[str, list[int]] = {}
    for i, (name, _) in enumerate(asked):
        idxs_of.setdefault(name, []).append(i)
    names, size = list(idxs_of), model.num_slots
    batches = read_ahead(names, lambda name: load_named(name, images[name]), size)
    for start, loaded in zip(range(0, len(names), size), batches, strict=True):
        batch = names[start : start + size]
        texts = [[asked[i][1] for i in idxs_of[name]] for name in batch]
        rows = model.answer(model.encode_image(loaded), texts, max_new_tokens=max_new_tokens, past_last_position=past_last_position)
        yield {i: answer for name, row in zip(batch, rows, strict=True) for i, answer in zip(idxs_of[name], row, strict=True)}


def load_named(name: str, source: ImageSource) -> Image.Image:
    try:
        return load_image(source)
    except ValueError as error:
        raise ValueError(f"image {name!r}: {error}") from None


# ---- shards


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part i of n of the work, i from 1 to n."""

    i: int = 1
    n: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.i <= self.n:
            raise ValueError(f"shard {self.i}/{self.n}: pass I/N with I from 1 to N, for example 1/4")

    @classmethod
    def parse(cls, text: str) -> Shard:
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if not match:
            raise ValueError(f"shard {text!r}: pass I/N with I from 1 to N, for example 1/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.i}/{self.n}"

    @property
    def file_name(self) -> str:
        return "answers.jsonl" if self.n == 1 else f"answers-{self.i}-of-{self.n}.jsonl"

    def of(self, names: Sequence[str]) -> set[str]:
        """Its share of different names."""
        return set(list(dict.fromkeys(names))[self.i - 1 :: self.n])


# ---- files of answers


@dataclasses.dataclass(frozen=True)
class Answer:
    text: str
    past_last_position: bool = False
    """Whether prompt and answer were longer than the model's position table, whose last row then stood for the rest."""


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers by question id. ValueError if it is no file of answers."""
    answers = {}
    for place, record in json_lines(path):
        key, text = fields(record, place, "id", "answer")
        answers[key] = Answer(text, record.get("past_last_position", False))
    return answers


def cut_unfinished_line(path: Path) -> None:
    """Removes a last line that an interrupted run did not finish."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def append_answers(path: Path, answers: Mapping[str, Answer]) -> None:
    lines = [
        {"id": key, "answer": answer.text} | ({"past_last_position": True} if answer.past_last_position else {})
        for key, answer in answers.items()
    ]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def is_past_last_position(model: OmniMamba, question: str, answer: str) -> bool:
    """Whether the tokens read for this answer, all but its last one, outnumber the rows of the position table."""
    tok, config = model.tokenizer, model.config
    markers = len(layout.mmu_before_image(tok)) + len(layout.mmu_after_image(tok))
    text = len(layout.chat_ids(tok, [("user", question)])) + max(0, len(tok.encode(answer)) - 1)
    return markers + config.num_vision_tokens + text > config.mmu_positions
