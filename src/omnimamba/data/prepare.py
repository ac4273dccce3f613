"""What is made once before training: a text tokenizer, and the VQ ids of the images that are to be painted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from omnimamba.config import EOS_TOKEN
from omnimamba.data.images import Images, import_pyarrow, open_parquet_images, read_rows
from omnimamba.model.files import whole_file
from omnimamba.model.vq import VQModel

OnProgress = Callable[[int, int], None]
"""(images done, images in all)"""


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
def image_ids(vq: VQModel, images: Images, *, batch: int = 64, on_progress: OnProgress | None = None) -> Tensor:
    """VQ ids [n, k] int32 of all images, row-major, on the CPU. The images are squares of the tokenizer's size."""
    device, rows = next(vq.parameters()).device, []
    for start in range(0, len(images), batch):
        pixels = images.get(range(start, min(start + batch, len(images)))).to(device)
        rows.append(vq.encode(pixels.float() / 127.5 - 1).ids.flatten(1).int().cpu())
        if on_progress is not None:
            on_progress(min(start + batch, len(images)), len(images))
    return torch.cat(rows) if rows else torch.empty(0, vq.config.num_image_tokens, dtype=torch.int32)


def tokenize_images(
    folder: str | Path, split: str, out: str | Path, *, vq: VQModel, batch: int = 64, on_progress: OnProgress | None = None
) -> int:
    """Writes the VQ ids of a Parquet split to `out`, columns `id` and `tokens`, whole or not at all; returns the number of images."""
    pa = import_pyarrow()
    images = open_parquet_images(folder, split, vq.config.image_size)
    ids = image_ids(vq, images, batch=batch, on_progress=on_progress)
    table = pa.table({"id": images.names, "tokens": pa.array(ids.numpy().tolist(), pa.list_(pa.int32()))})
    with whole_file(Path(out)) as partial:
        pa.parquet.write_table(table, partial)
    return len(images)


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
