"""Where the images of a data set come from: Parquet files, or a folder of image files.

Both give images by name as uint8 tensors of one size. `InMemoryImages` holds a small set decoded (128 px: 49 kB an image), so
that a GPU never waits for a decoder; `LazyImages` decodes on demand in threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from omnimamba.model.files import one_line
from omnimamba.processor.image import center_square, load_image, resize_naive

IMAGE_COLUMN = "image"
RESIZE: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "crop": center_square,  # for the VQ tokenizer
    "naive": resize_naive,  # for the vision towers: the whole image, aspect ratio given up
}


def parquet_files(folder: str | Path, split: str) -> list[Path]:
    """The files `{split}-*.parquet` of a folder. ValueError if there are none."""
    files = sorted(Path(folder).glob(f"{split}-*.parquet"))
    if not files:
        raise ValueError(f"{folder}: no {split}-*.parquet files; give a folder with that split")
    return files


def read_parquet_rows(folder: str | Path, split: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All rows of a split as dicts, images still encoded."""
    return [row for file in parquet_files(folder, split) for row in read_rows(file, columns)]


def read_rows(file: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one Parquet file. ValueError if it is damaged or lacks a column."""
    pq = import_pyarrow().parquet
    try:
        names = set(pq.read_schema(file).names)
        if not (missing := set(columns or ()) - names):
            return pq.read_table(file, columns=list(columns) if columns else None).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise ValueError(f"{file}: not a whole Parquet file ({one_line(error)})") from None
    raise ValueError(f"{file}: no column {', '.join(sorted(missing))}; it has {', '.join(sorted(names))}")


def import_pyarrow() -> Any:
    """The module pyarrow, its `parquet` included. ValueError if it is not installed: a model is used without it."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError("Parquet files need pyarrow; `pip install 'omnimamba[train]'` installs it") from None
    return pyarrow


class LazyImages:
    """Images decoded when asked for. `read` gives the encoded bytes or path of a name; `resize` is a key of RESIZE."""

    def __init__(
        self, names: Sequence[str], read: Callable[[str], bytes | Path], size: int, *, resize: str = "crop", num_threads: int = 8
    ) -> None:
        self.names, self.read, self.size, self.resize = list(names), read, size, RESIZE[resize]
        self.position = {name: i for i, name in enumerate(self.names)}
        self.pool = ThreadPoolExecutor(num_threads)

    def __len__(self) -> int:
        return len(self.names)

    def get(self, idx: Sequence[int]) -> Tensor:
        """uint8 [b, 3, size, size] of the images at these positions."""
        if not len(idx):
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return torch.stack(list(self.pool.map(self.decode, idx)))

    def decode(self, i: int) -> Tensor:
        name = self.names[i]
        try:
            image = load_image(self.read(name))
        except (OSError, ValueError) as error:
            raise ValueError(f"image {name!r}: {error}") from None
        return torch.from_numpy(np.array(self.resize(image, self.size))).permute(2, 0, 1)


class InMemoryImages:
    """All images of a set as one uint8 tensor [n, 3, size, size] on `device`."""

    def __init__(self, lazy: LazyImages, device: torch.device | str = "cpu") -> None:
        self.names, self.position, self.size = lazy.names, lazy.position, lazy.size
        self.pixels = lazy.get(range(len(lazy))).to(device)

    def __len__(self) -> int:
        return len(self.names)

    def get(self, idx: Sequence[int]) -> Tensor:
        return self.pixels[torch.as_tensor(idx, dtype=torch.int64, device=self.pixels.device)]


Images = LazyImages | InMemoryImages


def open_parquet_images(folder: str | Path, split: str, size: int, *, resize: str = "crop", num_threads: int = 8) -> LazyImages:
    """The images of `{split}-*.parquet`, named by the column `id`."""
    rows = read_parquet_rows(folder, split, ["id", IMAGE_COLUMN])
    try:
        encoded: dict[str, bytes] = {row["id"]: row[IMAGE_COLUMN]["bytes"] for row in rows}
    except (KeyError, TypeError):
        raise ValueError(f"{folder}: column {IMAGE_COLUMN} of {split} is not a struct with the `bytes` of each image") from None
    if len(encoded) < len(rows):
        raise ValueError(f"{folder}: {len(rows) - len(encoded)} rows of {split} repeat an id; make the ids unique")
    return LazyImages(list(encoded), encoded.__getitem__, size, resize=resize, num_threads=num_threads)


def open_folder_images(folder: str | Path, names: Sequence[str], size: int, *, resize: str = "crop", num_threads: int = 8) -> LazyImages:
    """Image files below a folder, named by their relative path. ValueError names the first files that are missing."""
    root = Path(folder)
    names = list(dict.fromkeys(names))
    if missing := [name for name in names if not (root / name).is_file()]:
        raise ValueError(f"{root}: {len(missing)} of {len(names)} images are missing, e.g. {', '.join(missing[:3])}")
    return LazyImages(names, lambda name: root / name, size, resize=resize, num_threads=num_threads)
