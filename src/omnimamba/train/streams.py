"""The samples of the two tasks from a streamed data set, which is neither stored nor known as a whole.

Step n uses the rows n * batch to (n + 1) * batch of an endless stream, so it is the same in every run, as with stored data. To go on at
step n, the rows before it are read again. A row that cannot be used (no answer within the limit, broken image) gives its place to the next
one of its step. Every process reads all rows and decodes its own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from omnimamba.config import OmniMambaConfig
from omnimamba.data.huggingface import COLUMN, RowStream, open_dataset, row_captions, row_conversation, row_image, row_name
from omnimamba.data.images import RESIZE, BrokenImages, decode_image
from omnimamba.model.vq import VQModel
from omnimamba.processor import prompt as layout
from omnimamba.processor.tokenizer import TextTokenizer
from omnimamba.train.config import Recipe
from omnimamba.train.parallel import ALONE, Processes
from omnimamba.train.task_data import (
    MMUBatch,
    T2IBatch,
    UnderstandingSample,
    check_text_limit,
    count_labels,
    mmu_batch,
    tower_image_size,
    understanding_sample,
)


class SequentialSampler:
    """Step n takes the rows n * batch_size to (n + 1) * batch_size."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def indices(self, step: int) -> list[int]:
        return list(range(step * self.batch_size, (step + 1) * self.batch_size))


class _Stream:
    def __init__(self, recipe: Recipe, size: int, resize: str, broken: BrokenImages) -> None:
        data = recipe.data
        dataset = open_dataset(data.folder, data.train_split, data.image_column, streaming=True)
        self.rows = RowStream(dataset, recipe.train.seed, data.stream_buffer)
        self.image_column, self.size, self.resize, self.broken = data.image_column, size, RESIZE[resize], broken
        self.pool = ThreadPoolExecutor(data.num_threads)

    def image(self, row: dict[str, Any], i: int) -> Tensor | None:
        return decode_image(row_name(row, i), lambda: row_image(row, self.image_column), self.size, self.resize, self.broken)

    def usable(self, places: list[int], num: int, find: Callable[[int], Any]) -> list[Any]:
        """What `find` gives for each place of a step of `num` rows, or for the next place for which it gives something."""
        found = list(self.pool.map(find, places))
        for k, place in enumerate(places):
            others = iter(range(place + 1, place + num))
            while found[k] is None:
                if (other := next(others, None)) is None:
                    raise ValueError(f"none of {num} rows of the stream can be used: no answer within the limit, or broken images")
                found[k] = find(other % num)
        return found


class UnderstandingStream(_Stream):
    def __init__(self, recipe: Recipe, tok: TextTokenizer, config: OmniMambaConfig, broken: BrokenImages) -> None:
        super().__init__(recipe, tower_image_size(config), "naive", broken)
        self.tok, self.limit, self.is_alignment = tok, recipe.train.max_text_tokens, recipe.data.alignment
        self.by_sample = recipe.train.mean_by_sample
        self.column = recipe.data.conversations.removeprefix(COLUMN)
        check_text_limit(self.limit, config)

    def batch(self, idx: list[int], rng: Any, processes: Processes = ALONE) -> MMUBatch:
        """This process's share of the rows of a step; nothing about them is random."""
        rows = self.rows.read(idx[0], len(idx))
        samples = [self.sample(row, i) for row, i in zip(rows, idx, strict=True)]

        def find(place: int) -> tuple[UnderstandingSample, Tensor] | None:
            sample = samples[place]
            image = self.image(rows[place], idx[place]) if sample is not None else None
            return (sample, image) if sample is not None and image is not None else None

        pairs = self.usable(processes.share(range(len(idx))), len(idx), find)
        num_labels = len(samples) if self.by_sample else count_labels(sample for sample in samples if sample is not None)
        used, images = [sample for sample, _ in pairs], [image for _, image in pairs]
        return mmu_batch(self.tok, used, images, self.limit, num_labels, by_sample=self.by_sample)

    def sample(self, row: dict[str, Any], i: int) -> UnderstandingSample | None:
        conversation = row_conversation(row_name(row, i), row.get(self.column), self.column)
        return understanding_sample(self.tok, conversation, self.limit, is_alignment=self.is_alignment)


class PaintingStream(_Stream):
    def __init__(self, recipe: Recipe, tok: TextTokenizer, vq: VQModel, broken: BrokenImages) -> None:
        super().__init__(recipe, vq.config.image_size, "crop", broken)
        self.tok, self.vq, self.column = tok, vq, recipe.data.captions.removeprefix(COLUMN)
        self.null_ids = layout.t2i_training_ids(tok, None)

    @torch.no_grad()
    def batch(self, idx: list[int], rng: Any, dropout: float, processes: Processes = ALONE) -> T2IBatch:
        """This process's share of the rows of a step, tokenised where the VQ tokenizer is."""
        rows = self.rows.read(idx[0], len(idx))
        drawn = [(rng.random() < dropout, rng.random()) for _ in idx]

        def find(place: int) -> tuple[list[int], Tensor] | None:
            image = self.image(rows[place], idx[place])
            return None if image is None else (self.prompt(rows[place], idx[place], *drawn[place]), image)

        pairs = self.usable(processes.share(range(len(idx))), len(idx), find)
        pixels = torch.stack([image for _, image in pairs]).to(next(self.vq.parameters()).device)
        image_ids = self.vq.encode(pixels.float() / 127.5 - 1).ids.flatten(1).cpu()
        return T2IBatch(torch.tensor([ids for ids, _ in pairs]), image_ids, torch.tensor(float(len(idx) * image_ids.shape[1])))

    def prompt(self, row: dict[str, Any], i: int, is_dropped: bool, choice: float) -> list[int]:
        if is_dropped:
            return self.null_ids
        captions = row_captions(row_name(row, i), row.get(self.column), self.column).captions
        return layout.t2i_training_ids(self.tok, captions[int(choice * len(captions))])
