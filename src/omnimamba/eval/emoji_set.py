"""The emoji data set on disk: drawings, questions about them, captions to paint. Its README.md defines the format."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

from PIL import Image

from omnimamba.config import nearest_name
from omnimamba.data.images import IMAGE_COLUMN, read_parquet_rows
from omnimamba.eval.files import json_lines
from omnimamba.eval.scores import yes_or_no
from omnimamba.processor.image import load_image
from omnimamba.processor.prompt import IMAGE_MARKER

KINDS = ("name", "style", "group", "subgroup", "presence", "description")
SAMPLINGS = ("random", "adversarial")
"""Where the name in a presence question comes from: any drawing, or the same subgroup."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    id: str
    file: bytes
    caption: str
    base_caption: str
    keywords: tuple[str, ...]

    def image(self) -> Image.Image:
        try:
            return load_image(self.file)
        except ValueError as error:
            raise ValueError(f"drawing {self.id!r}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Question:
    image: str
    kind: str
    sampling: str
    text: str
    reference: str


def _json_file(data: Path, name: str) -> Path:
    """The file `name`, or else `name.gz`."""
    return data / name if (data / name).is_file() else data / f"{name}.gz"


def check_files(data: Path, split: str) -> None:
    """ValueError that names every missing file of the split."""
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder; pass the folder of the emoji data set")
    missing = [name for name in (f"understanding-{split}.jsonl", f"t2i-{split}.jsonl") if not _json_file(data, name).is_file()]
    if not any(data.glob(f"{split}-*.parquet")):
        missing.insert(0, f"{split}-*.parquet")
    if missing:
        splits = sorted({re.sub(r"-\d+(-of-\d+)?\.parquet$", "", path.name) for path in data.glob("*.parquet")})
        raise ValueError(
            f"{data}: no {', no '.join(missing)}; the three kinds of files come together in the emoji data set (its README.md lists them). "
            f"Splits with drawings here: {', '.join(splits) or 'none'}"
        )


def read_drawings(data: Path, split: str) -> dict[str, Drawing]:
    """The drawings of a split by id, in the files' order."""
    rows = read_parquet_rows(data, split, ["id", "caption", "base_caption", "keywords", IMAGE_COLUMN])
    drawings = {
        row["id"]: Drawing(row["id"], row[IMAGE_COLUMN]["bytes"], row["caption"], row["base_caption"], tuple(row["keywords"]))
        for row in rows
    }
    if not drawings or len(drawings) < len(rows):
        raise ValueError(f"{data}: {split}-*.parquet hold {len(rows)} rows with {len(drawings)} different ids; ids must differ")
    return drawings


def read_questions(data: Path, split: str, drawings: dict[str, Drawing]) -> list[Question]:
    """The questions of a split. ValueError names the line that does not fit the format or the drawings."""
    questions = []
    for place, record in json_lines(_json_file(data, f"understanding-{split}.jsonl")):
        try:
            asked, told = (str(turn["value"]) for turn in record["conversations"])
            question = Question(
                record["image"], record["type"], record.get("sampling") or "", asked.replace(IMAGE_MARKER, "").strip(), told
            )
        except (KeyError, TypeError, ValueError):
            expected = '{"image": id, "type": kind, "conversations": [{"value": question}, {"value": answer}]}'
            raise ValueError(f"{place}: expected {expected}") from None
        if question.image not in drawings:
            raise ValueError(f"{place}: image {question.image!r} is not in the {split} Parquet files")
        if question.kind not in KINDS:
            raise ValueError(f"{place}: unknown type {question.kind!r}; {nearest_name(question.kind, KINDS)}")
        if question.kind == "presence" and (question.sampling not in SAMPLINGS or yes_or_no(told) is None):
            raise ValueError(f"{place}: a presence question has the answer Yes or No, and a sampling of {' or '.join(SAMPLINGS)}")
        questions.append(question)
    return questions


def read_captions(data: Path, split: str, drawings: dict[str, Drawing]) -> dict[str, str]:
    """The bare caption of each drawing: the first of its captions."""
    captions = {}
    for place, record in json_lines(_json_file(data, f"t2i-{split}.jsonl")):
        if record.get("image") not in drawings or not isinstance(record.get("captions"), list) or not record["captions"]:
            raise ValueError(f'{place}: expected {{"image": id, "captions": [...]}} with an id of the {split} Parquet files')
        captions[record["image"]] = str(record["captions"][0])
    return captions


def choose_prompts(drawings: dict[str, Drawing], captions: dict[str, str], num_prompts: int) -> list[tuple[Drawing, str]]:
    """Up to num_prompts drawings with different captions, in an order of their own that no file order changes.

    Drawings are sorted by the SHA-256 of their id. The first of each base caption is taken; if they are too few, then of the others
    the first of each caption.
    """
    order = sorted(captions, key=lambda drawing_id: hashlib.sha256(drawing_id.encode()).digest())
    by_base = {drawings[drawing_id].base_caption: drawing_id for drawing_id in reversed(order)}
    firsts = [drawing_id for drawing_id in order if by_base[drawings[drawing_id].base_caption] == drawing_id]
    chosen: dict[str, str] = {}
    for drawing_id in (*firsts, *order):
        chosen.setdefault(captions[drawing_id], drawing_id)
    return [(drawings[drawing_id], caption) for caption, drawing_id in list(chosen.items())[:num_prompts]]
