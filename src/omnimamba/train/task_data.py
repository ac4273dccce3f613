"""The samples of the two tasks: conversations about images as ids and labels, captions and the VQ ids of their images."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnimamba.config import IGNORE_INDEX, OmniMambaConfig, PromptStyle, nearest_name
from omnimamba.data.augment import augment
from omnimamba.data.huggingface import COLUMN, column_captions, column_conversations, open_dataset, open_dataset_images
from omnimamba.data.images import BrokenImages, Images, InMemoryImages, open_folder_images, open_parquet_images
from omnimamba.data.kept import Kept, weights_digest
from omnimamba.data.prepare import image_ids, read_image_ids
from omnimamba.data.text import Captions, Conversation, read_captions, read_conversations
from omnimamba.model.vq import VQModel
from omnimamba.processor import prompt as layout
from omnimamba.processor.tokenizer import TextTokenizer
from omnimamba.train.answer_tree import AnswerTree
from omnimamba.train.config import Data, Recipe
from omnimamba.train.lookalikes import Lookalikes, Taught, find_lookalikes
from omnimamba.train.parallel import ALONE, Processes

logger = logging.getLogger("omnimamba.train")
NUM_MARKERS = 4  # [mmu][soi] and [eoi][sot]
LENGTH_MULTIPLE = 16
NUM_PARTS = 4
"""The labels and the images of an understanding batch fill so many parts of the most that there could be."""
ROLES = {"human": "user", "gpt": "assistant"}
Turns = tuple[tuple[str, str], ...]
MOST_KNOWN_TURNS = 2
"""Of conversations that are found again; longer ones are rarely repeated."""
MOST_KNOWN_CAPTIONS = 1 << 16
PIXELS_AT_ONCE = 64 * 256**2
"""That the VQ tokenizer encodes."""


class MMUBatch(NamedTuple):
    """Padded so that few shapes occur; the padding of n and i counts nothing and goes nowhere, in any loss."""

    ids: Tensor
    """[b, 4 + t] markers and text, right-padded."""
    places: Tensor
    """[n] where the labels are in the text [b * t], in order."""
    labels: Tensor
    """[n], or with lookalikes.soft probabilities [n, v]"""
    shares: Tensor
    """fp32 [n], what each label counts in the summed loss: 1, or with train.mean_by_sample 1 over those of its row. 0: padding."""
    num_labels: Tensor
    """fp32 [], what the summed loss is divided by: the labels of the whole step, of all processes, or its samples."""
    pixels: Tensor | None
    """Of the rows that have an image: uint8 [i, 3, s, s], or with [lookalikes] the tower's features [i, k, d]; None if none has."""
    image_rows: Tensor
    """[i], in order; b: padding."""

    def split(self, num: int) -> list[MMUBatch]:
        b, t = len(self.ids), self.ids.shape[1] - NUM_MARKERS
        size, parts = b // num, []
        for first in range(0, b, size):
            is_label = (self.places // t >= first) & (self.places // t < first + size) & (self.shares > 0)
            start, stop = torch.searchsorted(self.image_rows, torch.tensor([first, first + size])).tolist()
            parts.append(
                padded_batch(
                    self.ids[first : first + size],
                    self.places[is_label] - first * t,
                    self.labels[is_label],
                    self.shares[is_label],
                    self.num_labels,
                    None if self.pixels is None else self.pixels[start:stop],
                    self.image_rows[start:stop] - first,
                )
            )
        return parts


class T2IBatch(NamedTuple):
    caption_ids: Tensor
    """[b, prompt + 1]"""
    image_ids: Tensor
    """[b, k]"""
    num_labels: Tensor
    """fp32 [], image tokens of the whole step, of all processes."""

    def split(self, num: int) -> list[T2IBatch]:
        size = len(self.image_ids) // num
        parts = zip(self.caption_ids.split(size), self.image_ids.split(size), strict=True)
        return [T2IBatch(*part, self.num_labels) for part in parts]


class UnderstandingSample(NamedTuple):
    """A conversation as ids and labels, both without the markers; its image, None for text only; and its data set's label."""

    ids: list[int]
    labels: list[int]
    image: str | None
    kind: str


class UnderstandingData:
    """Conversations of a split as ids and labels, and the images they are about."""

    def __init__(
        self,
        recipe: Recipe,
        split: str,
        tok: TextTokenizer,
        config: OmniMambaConfig,
        device: torch.device,
        broken: BrokenImages,
        kept: Kept,
    ) -> None:
        data, limit = recipe.data, recipe.train.max_text_tokens
        check_text_limit(limit, config)
        self.samples: list[UnderstandingSample] = []
        num_too_long = 0
        conversations = of_kinds(kept_conversations(data, split, kept), data.kinds)
        known = kept.get(("samples", tokenizer_key(recipe, config), limit, data.alignment), dict[Turns, UnderstandingSample | None])
        repeat = data.repeat if split == data.train_split else {}
        repeated = itertools.chain.from_iterable([row] * repeat.get(row.kind, 1) for row in conversations)
        for conversation in (*repeated, *joined(conversations, data.joined, recipe.train.seed)):
            sample = known_sample(tok, conversation, limit, known, is_alignment=data.alignment)
            if sample is None:
                num_too_long += 1
            else:
                self.samples.append(sample)
        if not self.samples:
            raise ValueError(f"data.conversations: no sample has an answer within train.max_text_tokens={limit}; raise it")
        if num_too_long:
            logger.warning(
                "%d of %d conversations left out: no answer within train.max_text_tokens=%d",
                num_too_long,
                num_too_long + len(self.samples),
                limit,
            )
        self.tok, self.limit, self.by_sample, self.vocab_size = tok, limit, recipe.train.mean_by_sample, config.text_vocab_size
        names = list(dict.fromkeys(sample.image for sample in self.samples if sample.image is not None))
        self.images = open_images(data, split, names, tower_image_size(config), "naive", device, broken, kept)
        self.samples = [sample for sample in self.samples if sample.image is None or sample.image in self.images.position]
        if not self.samples:
            raise ValueError("data.conversations: no sample is left without the images that are missing")
        self.lookalikes: Lookalikes | None = None
        self.trees: dict[str, AnswerTree] = {}
        if recipe.lookalikes.versions and split == data.train_split:
            assert isinstance(self.images, InMemoryImages)
            self.lookalikes = find_lookalikes(recipe, split, self.images, device)
            if (taught := self.lookalikes.taught) is not None:
                in_ids = functools.partial(layout.answer_ids, tok, style=PromptStyle.IN_OUT)
                self.trees = {column: AnswerTree(list(map(in_ids, texts)), device) for column, texts in taught.vocabularies.items()}

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(sample.ids) for sample in self.samples)

    def batch(self, idx: list[int], rng: np.random.Generator, processes: Processes = ALONE) -> MMUBatch:
        """This process's share of the samples of a step."""
        num_labels = len(idx) if self.by_sample else count_labels(self.samples[i] for i in idx)
        labels: Tensor | None = None
        if self.lookalikes is None:
            samples, images = self.with_images(processes.share(idx))
        else:
            samples, images, labels = self.with_lookalikes(self.lookalikes, idx, rng, processes)
        return mmu_batch(self.tok, samples, images, self.limit, num_labels, by_sample=self.by_sample, soft_labels=labels)

    def with_lookalikes(
        self, lookalikes: Lookalikes, idx: list[int], rng: np.random.Generator, processes: Processes
    ) -> tuple[list[UnderstandingSample], list[Tensor], Tensor | None]:
        """This process's samples, features of what the tower takes for the images of those that have one, and their soft labels if any."""
        drawn = [None if (name := self.samples[i].image) is None else lookalikes.draw(name, self.samples[i].kind, rng) for i in idx]
        samples, rows = [self.samples[i] for i in processes.share(idx)], processes.share(drawn)
        labels = None if lookalikes.taught is None else self.soft_labels(lookalikes, lookalikes.taught, samples, rows)
        return samples, list(lookalikes.features[[row for row in rows if row is not None]]), labels

    def soft_labels(self, lookalikes: Lookalikes, taught: Taught, samples: list[UnderstandingSample], rows: list[int | None]) -> Tensor:
        """Probabilities [n, v] in place of the n labels of the samples; those of answers that are a text of a column are the tower's."""
        answers = [[label for label in sample.labels if label != IGNORE_INDEX] for sample in samples]
        lengths = torch.tensor([len(answer) for answer in answers])
        starts = lengths.cumsum(0) - lengths
        labels = torch.zeros(int(lengths.sum()), self.vocab_size, device=taught.images.device)
        labels.scatter_(1, joined_rows(answers)[:, None].to(labels.device), 1)
        for column, tree in self.trees.items():
            members, own, seen = [], [], []
            for i, (sample, row) in enumerate(zip(samples, rows, strict=True)):
                if row is None or lookalikes.columns.get(sample.kind) != column:
                    continue
                text = lookalikes.texts[column][lookalikes.position[str(sample.image)]]
                if answers[i] == tree.answers[text]:
                    members.append(i)
                    own.append(text)
                    seen.append(row)
            if members:
                chances = taught.chances(column, seen)
                for depth, found in enumerate(tree.next_tokens(chances, torch.tensor(own, device=chances.device), self.vocab_size)):
                    places = starts[members][lengths[members] > depth] + depth
                    labels[places.to(labels.device)] = found
        return labels

    def with_images(self, idx: list[int]) -> tuple[list[UnderstandingSample], list[Tensor]]:
        """The samples and the images of those that have one. The next sample takes the place of one whose image is broken."""
        samples = [self.samples[i] for i in idx]
        found = iter(self.images.find([self.images.position[sample.image] for sample in samples if sample.image is not None]))
        images: list[Tensor] = []
        for row, i in enumerate(idx):
            image = next(found) if samples[row].image is not None else None
            others = iter(range(i + 1, i + len(self.samples)))
            while image is None and samples[row].image is not None:
                if (i := next(others, -1)) < 0:
                    raise ValueError("data.conversations: all images are broken")
                samples[row] = self.samples[i % len(self.samples)]
                if (name := samples[row].image) is not None:
                    (image,) = self.images.find([self.images.position[name]])
            if image is not None:
                images.append(image)
        return samples, images


def check_text_limit(limit: int, config: OmniMambaConfig) -> None:
    room = config.mmu_positions - config.num_vision_tokens - NUM_MARKERS
    if limit > room:
        raise ValueError(f"train.max_text_tokens={limit} exceeds the {room} positions left after the image; lower it")


def tower_image_size(config: OmniMambaConfig) -> int:
    sizes = {tower.image_size for tower in config.towers.values()}
    if len(sizes) != 1:
        raise ValueError(f"towers of unequal image sizes {sorted(sizes)} cannot be trained together")
    return sizes.pop()


def understanding_sample(tok: TextTokenizer, conversation: Conversation, limit: int, *, is_alignment: bool) -> UnderstandingSample | None:
    """The sample of a conversation; None if no answer ends within `limit` tokens."""
    turns = [(ROLES[speaker], text) for speaker, text in conversation.turns]
    try:
        if is_alignment:
            ids, labels = layout.caption_sample(tok, turns[1][1], limit)
        else:
            ids, labels = layout.conversation_sample(tok, turns, limit)
    except ValueError:
        return None
    return UnderstandingSample(ids, labels, conversation.image, conversation.kind)


def known_sample(
    tok: TextTokenizer,
    conversation: Conversation,
    limit: int,
    known: dict[Turns, UnderstandingSample | None],
    *,
    is_alignment: bool,
) -> UnderstandingSample | None:
    """As `understanding_sample`, from what is known, which it is added to: the same is asked about many images, and repeated."""
    turns = conversation.turns
    if turns not in known:
        sample = understanding_sample(tok, conversation, limit, is_alignment=is_alignment)
        if len(turns) > MOST_KNOWN_TURNS:
            return sample
        known[turns] = sample
    sample = known[turns]
    return None if sample is None else sample._replace(image=conversation.image, kind=conversation.kind)


def count_labels(samples: Iterable[UnderstandingSample]) -> int:
    return sum(len(sample.labels) - sample.labels.count(IGNORE_INDEX) for sample in samples)


def mmu_batch(
    tok: TextTokenizer,
    samples: list[UnderstandingSample],
    images: list[Tensor],
    limit: int,
    num_labels: int,
    *,
    by_sample: bool,
    soft_labels: Tensor | None = None,
) -> MMUBatch:
    """images: those of the samples that have one, in order; limit: tokens of the longest text that there can be; soft_labels:
    probabilities [n, v] in place of the n labels of the samples."""
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    markers = torch.tensor([*layout.mmu_before_image(tok), *layout.mmu_after_image(tok)])
    length = padded_length(NUM_MARKERS + int(lengths.max()), NUM_MARKERS + limit)
    is_text = torch.arange(length - NUM_MARKERS) < lengths[:, None]
    text = torch.full(is_text.shape, tok.pad_id)
    text[is_text] = joined_rows(sample.ids for sample in samples)
    labels = joined_rows(sample.labels for sample in samples)
    is_label = labels != IGNORE_INDEX
    (places,) = is_text.flatten().nonzero(as_tuple=True)
    places = places[is_label]
    rows = places // text.shape[1]
    return padded_batch(
        torch.cat([markers.expand(len(samples), -1), text], dim=1),
        places,
        labels[is_label] if soft_labels is None else soft_labels,
        1 / rows.bincount()[rows] if by_sample else torch.ones(len(places)),
        torch.tensor(float(num_labels)),
        torch.stack(images) if images else None,
        torch.tensor([row for row, sample in enumerate(samples) if sample.image is not None], dtype=torch.int64),
    )


def joined_rows(rows: Iterable[list[int]]) -> Tensor:
    return torch.from_numpy(np.fromiter(itertools.chain.from_iterable(rows), np.int64))


def padded_length(length: int, limit: int) -> int:
    """The length that ids are padded to: multiples of 16, above 128 four between a power of 2 and the next, and the limit."""
    multiple = max(LENGTH_MULTIPLE, 2 ** ((length - 1).bit_length() - 1) // 4)
    return min(-(-length // multiple) * multiple, limit)


def padded_batch(
    ids: Tensor, places: Tensor, labels: Tensor, shares: Tensor, num_labels: Tensor, pixels: Tensor | None, image_rows: Tensor
) -> MMUBatch:
    """The batch with its labels and images padded; without images if there are none."""
    b, most = len(ids), len(ids) * (ids.shape[1] - NUM_MARKERS)
    return MMUBatch(
        ids,
        padded(places, most, 0),
        padded(labels, most, 0),
        padded(shares, most, 0),
        num_labels,
        padded(pixels, b, 0) if pixels is not None and len(pixels) else None,
        padded(image_rows, b, b),
    )


def padded(values: Tensor, most: int, value: int) -> Tensor:
    """The values [n, ...], at most `most`, followed by `value` until they fill a number of its NUM_PARTS parts."""
    part = -(-most // NUM_PARTS)
    num = min(-(-len(values) // part) * part, most) - len(values)
    return torch.cat([values, values.new_full((num, *values.shape[1:]), value)]) if num else values


def of_kinds(conversations: list[Conversation], kinds: tuple[str, ...]) -> list[Conversation]:
    """Those whose `kind` is named; all if none is. ValueError for a kind that none of them has."""
    if stray := set(kinds) - (there := {conversation.kind for conversation in conversations}):
        raise ValueError(f"data.kinds names {sorted(stray)[0]!r}; {nearest_name(sorted(stray)[0], there)}")
    return [conversation for conversation in conversations if not kinds or conversation.kind in kinds]


def joined(conversations: list[Conversation], share: float, seed: int) -> list[Conversation]:
    """For a share of the images, one conversation more: all that is asked about the image, in random order."""
    by_image: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        if conversation.image is not None:
            by_image.setdefault(conversation.image, []).append(conversation)
    rng, more = np.random.default_rng((seed, *b"joined")), []
    for image, rows in by_image.items():
        if rng.random() < share:
            turns = [turn for i in rng.permutation(len(rows)) for turn in rows[i].turns]
            more.append(Conversation(image, tuple(turns), "joined"))
    return more


class PaintingData:
    """Captions of a split, and their images as VQ ids [n, versions, k]."""

    def __init__(
        self,
        recipe: Recipe,
        split: str,
        tok: TextTokenizer,
        config: OmniMambaConfig,
        vq: VQModel | None,
        device: torch.device,
        broken: BrokenImages,
        kept: Kept,
    ) -> None:
        data = recipe.data
        captions = kept_captions(data, split, kept)
        if data.tokens:
            file = Path(data.folder) / data.tokens.replace("{split}", split)
            by_image = {name: ids[None] for name, ids in read_image_ids(file, config.num_image_tokens, config.image_vocab_size).items()}
            missing = [row.image for row in captions if row.image not in by_image]
            broken.note_missing(missing, f"{len(missing)} captioned images have no VQ ids; tokenize them")
        else:
            assert vq is not None
            names = [row.image for row in captions]
            images = open_images(data, split, names, config.vq.image_size, "crop", device, broken, kept)
            num_versions = data.versions if split == data.train_split else 1
            encoder = (*images_key(data, split, names, device), repr(config.vq), weights_digest(vq))
            versions = [version_ids(recipe, version, vq, images, encoder, kept) for version in range(num_versions)]
            by_image = {name: torch.stack([ids[name] for ids in versions]) for name in versions[0]}
        captions = [row for row in captions if row.image in by_image]
        if not captions:
            raise ValueError("data.captions: no caption is left without the images that are missing")
        self.tok, self.captions = tok, [row.captions for row in captions]
        self.image_ids = torch.stack([by_image[row.image] for row in captions])
        self.training_ids = functools.lru_cache(MOST_KNOWN_CAPTIONS)(functools.partial(layout.t2i_training_ids, tok))

    def batch(self, idx: list[int], rng: Any, dropout: float, processes: Processes = ALONE) -> T2IBatch:
        """This process's share of the images of a step, each with one of its captions and versions at random, some captions dropped."""
        num_versions, k = self.image_ids.shape[1:]
        drawn = [(i, rng.random() < dropout, rng.integers(len(self.captions[i])), rng.integers(num_versions)) for i in idx]
        rows, mine = [], []
        for i, is_dropped, choice, version in processes.share(drawn):
            rows.append(self.training_ids(None if is_dropped else self.captions[i][choice]))
            mine.append((i, int(version)))
        image_ids = self.image_ids[tuple(zip(*mine, strict=True))].long()
        return T2IBatch(torch.tensor(rows), image_ids, torch.tensor(float(len(idx) * k)))


def version_ids(recipe: Recipe, version: int, vq: VQModel, images: Images, encoder: tuple[Hashable, ...], kept: Kept) -> dict[str, Tensor]:
    """VQ ids [k] by name of a version of the images. encoder: which images these are, and what encodes them."""
    key = ("VQ ids", *encoder, *((version, recipe.augment_painting, recipe.train.seed) if version else ()))
    if (ids := kept.find(key)) is None:
        device = next(vq.parameters()).device
        batch = max(1, PIXELS_AT_ONCE // images.size**2)
        ids = image_ids(vq, images, batch=batch, change=changed_version(recipe, version, device))
        if len(ids) == len(images):  # what is broken is noted by each run
            kept.keep(key, ids)
    return ids


def changed_version(recipe: Recipe, version: int, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """The changes [augment_painting] that make version `version` of a data set's images, the same each time; None for the first."""
    if version == 0:
        return None
    generator = torch.Generator(device).manual_seed(recipe.train.seed * 1_000_003 + version)
    return lambda images: augment(images, recipe.augment_painting, generator)


def text_key(data: Data, name: str, split: str) -> tuple[Hashable, ...]:
    """What the texts of a split depend on. name: of their file or column."""
    return data.folder, data.images, data.image_column, name, split


def images_key(data: Data, split: str, names: list[str], device: torch.device) -> tuple[Hashable, ...]:
    """What the images of a split depend on, but for their size."""
    return data.folder, data.images, data.image_column, split, tuple(names) if data.images == "folder" else (), str(device)


def tokenizer_key(recipe: Recipe, config: OmniMambaConfig) -> tuple[Hashable, ...]:
    """What ids of texts depend on."""
    return hashlib.sha256(Path(recipe.init.tokenizer).read_bytes()).hexdigest(), config.base_vocab_size, config.eos_id


def kept_captions(data: Data, split: str, kept: Kept) -> list[Captions]:
    return kept.get(("captions", *text_key(data, data.captions, split)), lambda: read_task_captions(data, split))


def kept_conversations(data: Data, split: str, kept: Kept) -> list[Conversation]:
    return kept.get(("conversations", *text_key(data, data.conversations, split)), lambda: read_task_conversations(data, split))


def read_task_captions(data: Data, split: str) -> list[Captions]:
    """From the file or the column that data.captions names."""
    if data.captions.startswith(COLUMN):
        return column_captions(open_dataset(data.folder, split, data.image_column), data.captions.removeprefix(COLUMN))
    return read_captions(Path(data.folder) / data.captions.replace("{split}", split))


def read_task_conversations(data: Data, split: str) -> list[Conversation]:
    """From the file or the column that data.conversations names."""
    if data.conversations.startswith(COLUMN):
        return column_conversations(open_dataset(data.folder, split, data.image_column), data.conversations.removeprefix(COLUMN))
    return read_conversations(Path(data.folder) / data.conversations.replace("{split}", split))


def open_images(
    data: Data, split: str, names: list[str], size: int, resize: str, device: torch.device, broken: BrokenImages, kept: Kept
) -> Images:
    """The named images of a split, decoded beforehand if the recipe says so; those that are missing are noted as broken.

    Decoded ones are kept where none is broken or missing; under no `resize` where all were of this size.
    """
    key = ("images", *images_key(data, split, names, device), size)
    images: Images | None = None
    if data.in_memory and (images := kept.find(key) or kept.find((*key, resize))) is not None:
        note_missing(data, split, names, images, broken)
        return images
    if data.images == "folder":
        lazy = open_folder_images(data.folder, names, size, resize=resize, num_threads=data.num_threads, broken=broken)
    elif data.images == "parquet":
        lazy = open_parquet_images(data.folder, split, size, resize=resize, num_threads=data.num_threads, broken=broken)
    else:
        dataset = open_dataset(data.folder, split, data.image_column)
        lazy = open_dataset_images(dataset, data.image_column, size, resize=resize, num_threads=data.num_threads, broken=broken)
    if data.images != "folder":
        note_missing(data, split, names, lazy, broken)
    if not data.in_memory:
        return lazy
    images = InMemoryImages(lazy, device)
    if len(images) == len(lazy) and all(name in images.position for name in names):
        kept.keep((*key, resize) if lazy.is_resized else key, images)
    return images


def note_missing(data: Data, split: str, names: list[str], images: Images, broken: BrokenImages) -> None:
    missing = [name for name in names if name not in images.position]
    broken.note_missing(missing, f"{data.folder}: {len(missing)} images are not in the {split} split")
