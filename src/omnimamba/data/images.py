"""Where the images of a data set come from: Parquet files, or a folder of image files.

Both give images by name as uint8 tensors of one size. `InMemoryImages` holds a small set decoded (128 px: 49 kB an image), so
that a GPU never waits for a decoder; `LazyImages` decodes on demand in threads.
"""

from __future__ import annotations

import logging
import threading
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

logger = logging.getLogger("omnimamba.data")
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


class BrokenImages:
    """The images of a data set that are missing or cannot be read: left out and reported up to `limit`, an error beyond it."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.names: set[str] = set()
        self.lock = threading.Lock()

    def note(self, name: str, problem: object) -> None:
        """ValueError if this one is one too many."""
        with self.lock:
            self.names.add(name)
            num = len(self.names)
        if num > self.limit:
            raise ValueError(f"image {name!r}: {problem}" + (f"; more than data.max_broken={self.limit} are broken" if self.limit else ""))
        logger.warning("image %r is left out, %d of at most %d: %s", name, num, self.limit, problem)

    def note_missing(self, missing: Sequence[str], where: str) -> None:
        """ValueError, which names the first of them, if these are too many."""
        self.names.update(missing)
        examples = ", ".join(missing[:3])
        if len(self.names) > self.limit:
            raise ValueError(f"{where}, e.g. {examples}" + (f"; more than data.max_broken={self.limit} are broken" if self.limit else ""))
        if missing:
            logger.warning("%s, e.g. %s; they are left out", where, examples)


def decode_image(
    name: str, read: Callable[[], bytes | Path], size: int, resize: Callable[[Image.Image, int], Image.Image], broken: BrokenImages
) -> Tensor | None:
    """uint8 [3, size, size] of an encoded image; None, and a note, if it cannot be read."""
    try:
        image = load_image(read())
    except (OSError, ValueError) as error:
        broken.note(name, error)
        return None
    return torch.from_numpy(np.array(resize(image, size))).permute(2, 0, 1)


class LazyImages:
    """Images decoded when asked for. `read` gives the encoded bytes or path of a name; `resize` is a key of RESIZE."""

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[str], bytes | Path],
        size: int,
        *,
        resize: str = "crop",
        num_threads: int = 8,
        broken: BrokenImages | None = None,
    ) -> None:
        self.names, self.read, self.size, self.resize = list(names), read, size, RESIZE[resize]
        self.broken = broken or BrokenImages()
        self.position = {name: i for i, name in enumerate(self.names)}
        self.pool = ThreadPoolExecutor(num_threads)
        self.is_resized = False
        """Whether one of those decoded so far had another size. As long as none had, `resize` is of no account."""

    def __len__(self) -> int:
        return len(self.names)

    def get(self, idx: Sequence[int]) -> Tensor:
        """uint8 [b, 3, size, size] of the images at these positions. ValueError if one is broken."""
        return stacked(self, idx)

    def find(self, idx: Sequence[int]) -> list[Tensor | None]:
        """The images at these positions, None for those that are broken. ValueError if they are too many by now."""
        return list(self.pool.map(self.decode, idx))

    def decode(self, i: int) -> Tensor | None:
        name = self.names[i]
        return decode_image(name, lambda: self.read(name), self.size, self.resized, self.broken)

    def resized(self, image: Image.Image, size: int) -> Image.Image:
        if image.size == (size, size):
            return image
        self.is_resized = True
        return self.resize(image, size)


class InMemoryImages:
    """All images of a set as one uint8 tensor [n, 3, size, size] on `device`."""

    def __init__(self, lazy: LazyImages, device: torch.device | str = "cpu") -> None:
        found = lazy.find(range(len(lazy)))
        self.names = [name for name, image in zip(lazy.names, found, strict=True) if image is not None]
        self.position, self.size = {name: i for i, name in enumerate(self.names)}, lazy.size
        whole = [image for image in found if image is not None]
        self.pixels = (torch.stack(whole) if whole else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)).to(device)

    def __len__(self) -> int:
        return len(self.names)

    def get(self, idx: Sequence[int]) -> Tensor:
        return self.pixels[torch.as_tensor(idx, dtype=torch.int64, device=self.pixels.device)]

    def find(self, idx: Sequence[int]) -> list[Tensor | None]:
        return list(self.get(idx))


Images = LazyImages | InMemoryImages


def stacked(images: Images, idx: Sequence[int]) -> Tensor:
    """uint8 [b, 3, size, size] of the images at these positions. ValueError if one is broken."""
    if not len(idx):
        return torch.empty(0, 3, images.size, images.size, dtype=torch.uint8)
    found = images.find(idx)
    if lost := [images.names[i] for i, image in zip(idx, found, strict=True) if image is None]:
        raise ValueError(f"image {lost[0]!r} is broken, and here none may be left out; repair it")
    return torch.stack([image for image in found if image is not None])


def open_parquet_images(
    folder: str | Path, split: str, size: int, *, resize: str = "crop", num_threads: int = 8, broken: BrokenImages | None = None
) -> LazyImages:
    """The images of `{split}-*.parquet`, named by the column `id`."""
    rows = read_parquet_rows(folder, split, ["id", IMAGE_COLUMN])
    try:
        encoded: dict[str, bytes] = {row["id"]: row[IMAGE_COLUMN]["bytes"] for row in rows}
    except (KeyError, TypeError):
        raise ValueError(f"{folder}: column {IMAGE_COLUMN} of {split} is not a struct with the `bytes` of each image") from None
    if len(encoded) < len(rows):
        raise ValueError(f"{folder}: {len(rows) - len(encoded)} rows of {split} repeat an id; make the ids unique")
    return LazyImages(list(encoded), encoded.__getitem__, size, resize=resize, num_threads=num_threads, broken=broken)


def open_folder_images(
    folder: str | Path,
    names: Sequence[str],
    size: int,
    *,
    resize: str = "crop",
    num_threads: int = 8,
    broken: BrokenImages | None = None,
) -> LazyImages:
    """Image files below a folder, named by their relative path, without those that are missing; these are noted as broken."""
    root, broken = Path(folder), broken or BrokenImages()
    names = list(dict.fromkeys(names))
    there = [name for name in names if (root / name).is_file()]
    missing = sorted(set(names) - set(there), key=names.index)
    broken.note_missing(missing, f"{root}: {len(missing)} of {len(names)} images are missing")
    return LazyImages(there, lambda name: root / name, size, resize=resize, num_threads=num_threads, broken=broken)
