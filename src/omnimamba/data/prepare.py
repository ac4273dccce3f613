"""What is made once before training: a text tokenizer, and the VQ ids of the images that are to be painted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from omnimamba.config import EOS_TOKEN, nearest_name
from omnimamba.data.augment import unit_range
from omnimamba.data.huggingface import open_dataset, open_dataset_images
from omnimamba.data.images import (
    IMAGE_COLUMN,
    BrokenImages,
    Images,
    LazyImages,
    import_pyarrow,
    open_folder_images,
    open_parquet_images,
    read_rows,
)
from omnimamba.data.shards import OnProgress, Work, digest, run_here
from omnimamba.model.vq import VQModel
from omnimamba.model.weights import checksum

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer like that of gpt-neox-20b: eos is id 0, every byte is a token, no text is unknown.

    Raises ValueError if the texts are too few to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(EOS_TOKEN, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts give {tokenizer.get_vocab_size()} tokens, {vocab_size} are wanted; add texts or lower the vocabulary")
    return tokenizer


@torch.no_grad()
def image_ids(
    vq: VQModel, images: Images, items: range | None = None, *, batch: int = 64, change: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """VQ ids [k] int32 by name of the images at `items` (None: all), row-major, on the CPU, without those of broken images.

    The images are squares of the tokenizer's size. change: from a batch of images in [0, 1] to the one that is encoded.
    """
    device, ids = next(vq.parameters()).device, {}
    items = range(len(images)) if items is None else items
    for start in range(0, len(items), batch):
        idx = items[start : start + batch]
        found = {images.names[i]: image for i, image in zip(idx, images.find(idx), strict=True) if image is not None}
        if found:
            pixels = unit_range(torch.stack(list(found.values())).to(device))
            pixels = pixels if change is None else change(pixels)
            ids |= zip(found, vq.encode(pixels * 2 - 1).ids.flatten(1).int().cpu(), strict=True)
    return ids


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Where images lie: `parquet` files of a split, a `folder` of image files, or a data set that Hugging Face's `datasets` reads."""

    folder: str
    kind: str = "parquet"
    split: str = "train"
    column: str = IMAGE_COLUMN

    def open(self, size: int, broken: BrokenImages) -> LazyImages:
        """The images as squares of this size."""
        if self.kind == "parquet":
            return open_parquet_images(self.folder, self.split, size, broken=broken)
        if self.kind == "datasets":
            return open_dataset_images(open_dataset(self.folder, self.split, self.column), self.column, size, broken=broken)
        if self.kind != "folder":
            raise ValueError(f"unknown kind of images {self.kind!r}; {nearest_name(self.kind, ('parquet', 'folder', 'datasets'))}")
        root = Path(self.folder)
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not names:
            raise ValueError(f"{root}: no image files ({', '.join(IMAGE_SUFFIXES)}) in it")
        return open_folder_images(root, names, size, broken=broken)


class TokenizeWorker:
    """Writes the VQ ids of a range of images to a Parquet file with the columns `id` and `tokens`."""

    def __init__(self, images: ImageSet, make_vq: Callable[[], VQModel], batch: int, max_broken: int) -> None:
        self.vq, self.batch = make_vq(), batch
        self.images = images.open(self.vq.config.image_size, BrokenImages(max_broken))

    def __call__(self, items: range, file: Path) -> None:
        write_image_ids(file, image_ids(self.vq, self.images, items, batch=self.batch))


def tokenize_images(
    images: ImageSet,
    out: str | Path,
    *,
    make_vq: Callable[[], VQModel],
    batch: int = 64,
    max_broken: int = 0,
    shard_size: int = 4096,
    run: Callable[..., None] = run_here,
    on_progress: OnProgress | None = None,
) -> int:
    """Writes the VQ ids of images to the Parquet file `out`, columns `id` and `tokens`; returns the number of images.

    A second call goes on where the first was interrupted. run: `shards.run_here`, or `run_on_ray` with its settings.
    """
    vq = make_vq()
    names = images.open(vq.config.image_size, BrokenImages(max_broken)).names
    fingerprint = [checksum(tensor).item() for tensor in vq.state_dict().values()]
    plan = {"images": dataclasses.asdict(images), "names": digest(names), "vq": digest(fingerprint)}
    work = Work(Path(out), len(names), shard_size, plan)
    work.start()
    run(work, functools.partial(TokenizeWorker, images, make_vq, batch, max_broken), on_progress)
    num_ids = sum(import_pyarrow().parquet.read_metadata(file).num_rows for file in work.files)
    if len(names) - num_ids > max_broken:
        raise ValueError(f"{len(names) - num_ids} images are broken, more than the limit of {max_broken}; repair them or raise it")
    work.finish(join_image_ids)
    return num_ids


def _ids_schema() -> Any:
    pa = import_pyarrow()
    return pa.schema([("id", pa.string()), ("tokens", pa.list_(pa.int32()))])


def write_image_ids(file: Path, ids: Mapping[str, Tensor]) -> None:
    pa = import_pyarrow()
    rows = {"id": list(ids), "tokens": [row.tolist() for row in ids.values()]}
    pa.parquet.write_table(pa.table(rows, schema=_ids_schema()), file)


def join_image_ids(parts: Sequence[Path], out: Path) -> None:
    pa = import_pyarrow()
    with pa.parquet.ParquetWriter(out, _ids_schema()) as writer:
        for part in parts:
            writer.write_table(pa.parquet.read_table(part))


def read_image_ids(file: str | Path, num_image_tokens: int, codebook_size: int) -> dict[str, Tensor]:
    """VQ ids [k] by image, of a file that `tokenize_images` wrote. ValueError if they are not a model's of these sizes."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; make it with `omnimamba tokenize`")
    rows = read_rows(file, ["id", "tokens"])
    for row in rows:
        tokens = row["tokens"]
        if not tokens or len(tokens) != num_image_tokens or not 0 <= min(tokens) <= max(tokens) < codebook_size:
            found = f"{len(tokens)} ids from {min(tokens)} to {max(tokens)}" if tokens else "no ids"
            raise ValueError(
                f"{file}: {row['id']} has {found}, but the model paints {num_image_tokens} ids below {codebook_size}; "
                "tokenize the images with the VQ tokenizer of this model"
            )
    return {row["id"]: torch.tensor(row["tokens"], dtype=torch.int32) for row in rows}
