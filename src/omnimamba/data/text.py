"""Captions and conversations from files.

Captions: JSON lines `{"image": name, "captions": [...]}`, or COCO's caption JSON. Conversations: LLaVA's format, as a JSON list or
as JSON lines, `{"image": name, "conversations": [{"from": "human"|"gpt", "value": ...}, ...]}`; without "image" a row is text only.
Every reader takes `.gz` files, and finds `NAME.gz` where there is no `NAME`.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
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


def _read(path: Path) -> str:
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise ValueError(f"{path}: no such file")
    path = path if path.is_file() else packed
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of a JSON list or of JSON lines."""
    text = _read(path)
    try:
        if text.lstrip().startswith("["):
            for i, record in enumerate(json.loads(text)):
                yield f"{path} record {i}", record
        else:
            for i, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield f"{path} line {i}", json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def read_captions(path: str | Path) -> list[Captions]:
    """ValueError names the file and record that does not fit."""
    path = Path(path)
    if path.suffix == ".json" and isinstance(coco := json.loads(_read(path)), dict):
        return _read_coco(path, coco)
    captions = []
    for place, record in _records(path):
        try:
            captions.append(Captions(record["image"], tuple(str(caption) for caption in record["captions"])))
        except (KeyError, TypeError):
            raise ValueError(f'{place}: expected {{"image": name, "captions": [...]}}') from None
    return captions


def _read_coco(path: Path, coco: dict[str, Any]) -> list[Captions]:
    try:
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        grouped: dict[int, list[str]] = {}
        for annotation in coco["annotations"]:
            grouped.setdefault(annotation["image_id"], []).append(annotation["caption"])
        return [Captions(names[image_id], tuple(texts)) for image_id, texts in grouped.items()]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a COCO caption file (no {error})") from None


def read_conversations(path: str | Path) -> list[Conversation]:
    """ValueError names the file and record that does not fit."""
    conversations = []
    for place, record in _records(Path(path)):
        try:
            turns = tuple((turn["from"], str(turn["value"])) for turn in record["conversations"])
        except (KeyError, TypeError):
            raise ValueError(f'{place}: expected {{"conversations": [{{"from": ..., "value": ...}}]}}') from None
        if [speaker for speaker, _ in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
            raise ValueError(f"{place}: turns must alternate human, gpt")
        conversations.append(Conversation(record.get("image"), turns, record.get("type", "")))
    return conversations
