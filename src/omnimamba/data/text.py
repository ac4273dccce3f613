"""Captions and conversations from files.

Captions: JSON lines `{"image": name, "captions": [...]}`, or COCO's caption JSON. Conversations: LLaVA's format, as a JSON list or
as JSON lines, `{"image": name, "conversations": [{"from": "human"|"gpt", "value": ...}, ...]}`; without "image" a row is text only.
Every reader takes `.gz` files, and finds `NAME.gz` where there is no `NAME`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Captions:
    """The captions of one image."""

    image: str
    captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns (speaker, text), human first; `image` None for a text-only one; `kind` is the data set's own label."""

    image: str | None
    turns: tuple[tuple[str, str], ...]
    kind: str = ""


def read_captions(path: str | Path) -> list[Captions]:
    """ValueError names the file and record that does not fit."""
    path = Path(path)
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".json") and not _is_list(text):
        return _read_coco(path, _parse(str(path), text))
    return [caption_record(place, record) for place, record in _records(path, text)]


def caption_record(place: str, record: Any) -> Captions:
    """ValueError names the place of a record that does not fit."""
    try:
        image, texts = record["image"], record["captions"]
    except (KeyError, TypeError):
        image, texts = None, None
    if not isinstance(image, str) or not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
        raise ValueError(f'{place}: expected {{"image": name, "captions": [...]}} with at least one caption, none of them empty')
    return Captions(image, tuple(texts))


def _read_coco(path: Path, coco: Any) -> list[Captions]:
    try:
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        grouped: dict[int, list[str]] = {}
        for annotation in coco["annotations"]:
            grouped.setdefault(annotation["image_id"], []).append(annotation["caption"])
        captions = [Captions(names[image_id], tuple(texts)) for image_id, texts in grouped.items()]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a COCO caption file (no {error})") from None
    if empty := [row.image for row in captions if not all(map(_is_text, row.captions))]:
        raise ValueError(f"{path}: {len(empty)} images have an empty caption, e.g. {empty[0]}; remove it")
    return captions


def read_conversations(path: str | Path) -> list[Conversation]:
    """ValueError names the file and record that does not fit."""
    path = Path(path)
    return [conversation_record(place, record) for place, record in _records(path, read_text(path))]


def conversation_record(place: str, record: Any) -> Conversation:
    """ValueError names the place of a record that does not fit."""
    try:
        turns = tuple((turn["from"], turn["value"]) for turn in record["conversations"])
        image = record.get("image")
    except (KeyError, TypeError):
        turns, image = (), None
    if not turns or not all(isinstance(text, str) for text in (*(text for _, text in turns), image or "")):
        raise ValueError(f'{place}: expected {{"conversations": [{{"from": ..., "value": ...}}]}}, and "image" as a name')
    if [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise ValueError(f"{place}: turns must alternate human, gpt")
    return Conversation(image, turns, record.get("type", ""))


def read_text(path: Path) -> str:
    """The text of a file or of its `.gz`. ValueError if it is not there, or not a whole one."""
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise ValueError(f"{path}: no such file")
    path = path if path.is_file() else packed
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a whole file of UTF-8 text ({error})") from None


def _is_list(text: str) -> bool:
    return text.lstrip().startswith("[")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of a JSON list or of JSON lines."""
    if _is_list(text):
        for i, record in enumerate(_parse(str(path), text)):
            yield f"{path} record {i}", record
    else:
        for i, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028, which JSON has inside strings
            if line.strip():
                yield f"{path} line {i}", _parse(f"{path} line {i}", line)
