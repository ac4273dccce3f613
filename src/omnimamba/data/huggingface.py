"""Data sets that Hugging Face's `datasets` reads: Parquet, Arrow, image folders and WebDataset shards, in a folder or on the Hub.

One row is one sample: its image in one column, its captions or its conversation (LLaVA's turns) in others. Images are named by the
column `id`, in WebDataset shards by the sample's key, and else by the row's number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omnimamba.data.images import BrokenImages, LazyImages
from omnimamba.data.text import Captions, Conversation, caption_record, conversation_record
from omnimamba.model.files import one_line

NAME_COLUMNS = ("id", "__key__")
COLUMN = "column:"
"""Prefix of data.captions and data.conversations that name a column in place of a file."""


def open_dataset(source: str, split: str, image_column: str, *, streaming: bool = False) -> Any:
    """The split of a data set with its images undecoded. ValueError if `datasets` cannot read it or the column is missing.

    source: a folder, or a Hub id with what follows it after a colon as its configuration (`owner/name:config`).
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError("data.images='datasets' needs the package datasets; `pip install 'omnimamba[train]'` installs it") from None
    path, _, name = (source, "", "") if Path(source).exists() else source.partition(":")
    try:
        dataset = datasets.load_dataset(path, name or None, split=split, streaming=streaming)
    except Exception as error:  # its loaders raise what the format's reader raises
        raise ValueError(f"data.folder={source}, split {split}: `datasets` cannot read it ({one_line(error)})") from error
    if dataset.column_names is not None and image_column not in dataset.column_names:
        raise ValueError(f"{source}: no column {image_column}; name one of {', '.join(dataset.column_names)} as data.image_column")
    return dataset.cast_column(image_column, datasets.Image(decode=False))


class RowStream:
    """Rows of a streamed data set without end: epoch after epoch, each in an order of its own. Row n is the same in every run.

    The order is that of the files but for a buffer, from which the next row is drawn: data that is sorted should be stored shuffled.
    """

    def __init__(self, dataset: Any, seed: int, buffer_size: int) -> None:
        self.dataset, self.seed, self.buffer_size = dataset, seed, buffer_size
        self.next, self.rows = 0, self._endless()

    def read(self, first: int, num: int) -> list[dict[str, Any]]:
        """Rows first..first+num-1. Where the last call did not end just before them, all rows before them are read once more."""
        if first != self.next:
            self.rows = itertools.islice(self._endless(), first, None)
        self.next = first + num
        return list(itertools.islice(self.rows, num))

    def _endless(self) -> Iterator[dict[str, Any]]:
        for epoch in itertools.count():
            rng, buffer = np.random.default_rng((self.seed, epoch)), []
            for row in self.dataset:
                buffer.append(row)
                if len(buffer) > self.buffer_size:
                    yield buffer.pop(rng.integers(len(buffer)))
            if not buffer and not epoch:
                raise ValueError("the data set has no rows")
            yield from (buffer[i] for i in rng.permutation(len(buffer)))


def row_name(row: Mapping[str, Any], i: int) -> str:
    """The name of a row's image."""
    return next((str(row[column]) for column in NAME_COLUMNS if column in row), str(i))


def row_image(row: Mapping[str, Any], image_column: str) -> bytes | Path:
    """The encoded image of a row. ValueError if it has none."""
    image = row[image_column]
    if not image or (image["bytes"] is None and image["path"] is None):
        raise ValueError("there is no image in its row")
    return Path(image["path"]) if image["bytes"] is None else image["bytes"]


def dataset_names(dataset: Any) -> list[str]:
    column = next((column for column in NAME_COLUMNS if column in dataset.column_names), None)
    names = [str(name) for name in dataset[column]] if column else [str(i) for i in range(len(dataset))]
    if len(set(names)) < len(names):
        raise ValueError(f"{len(names) - len(set(names))} rows repeat a value of the column {column}; make them unique")
    return names


def open_dataset_images(
    dataset: Any, image_column: str, size: int, *, resize: str = "crop", num_threads: int = 8, broken: BrokenImages | None = None
) -> LazyImages:
    names = dataset_names(dataset)
    position = {name: i for i, name in enumerate(names)}
    images = dataset.select_columns([image_column])
    return LazyImages(
        names,
        lambda name: row_image(images[position[name]], image_column),
        size,
        resize=resize,
        num_threads=num_threads,
        broken=broken,
    )


def column_captions(dataset: Any, column: str) -> list[Captions]:
    """The captions of each row: a text, or a list of texts."""
    values = _column(dataset, column)
    return [row_captions(name, value, column) for name, value in zip(dataset_names(dataset), values, strict=True)]


def row_captions(name: str, value: Any, column: str) -> Captions:
    record = {"image": name, "captions": [value] if isinstance(value, str) else value}
    return caption_record(f"row {name}, column {column}", record)


def column_conversations(dataset: Any, column: str) -> list[Conversation]:
    """The conversation of each row: a list of turns, or an object with `conversations`, as JSON text or as it is."""
    values = _column(dataset, column)
    return [row_conversation(name, value, column) for name, value in zip(dataset_names(dataset), values, strict=True)]


def row_conversation(name: str, value: Any, column: str) -> Conversation:
    place = f"row {name}, column {column}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error})") from None
    turns = value.get("conversations") if isinstance(value, dict) else value
    return conversation_record(place, {"image": name, "conversations": turns})


def _column(dataset: Any, column: str) -> Sequence[Any]:
    if column not in dataset.column_names:
        raise ValueError(f"no column {column} in the data set; it has {', '.join(dataset.column_names)}")
    return list(dataset[column])
