"""Questions asked about images that the frozen tower takes for the one they were written about.

A tower that was trained on the same images knows them far better than new ones, and a language model that reads it learns to trust every
detail of what it says: nano answered 97 % of its training questions and 26 % of those about new drawings. Here the tower sees changed and
blended training images, of which it is about as unsure as of new ones, and draws for each a text of every label column by its own
probabilities. A question about a red apple then comes with the features of an image that was taken for a red apple, right or wrong. The
language model so learns what the tower's heads know, uncertainty included: distillation (Hinton et al. 2015, arXiv:1503.02531) by samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from omnimamba.config import TowerConfig
from omnimamba.data.augment import augment, normalise, unit_range
from omnimamba.data.images import InMemoryImages, read_parquet_rows
from omnimamba.eval.judge import Judge
from omnimamba.train.config import LookalikeTraining, Recipe

IMAGES_AT_ONCE = 512


class Taught(NamedTuple):
    """The tower's probabilities of all texts, as what they follow from."""

    images: Tensor
    """[versions * n, d] embeddings of the features."""
    texts: Mapping[str, Tensor]
    """By column [t, d], embeddings of its texts times the scale of the scores."""
    vocabularies: Mapping[str, Sequence[str]]
    """By column the texts."""

    def chances(self, column: str, rows: list[int]) -> Tensor:
        """Probabilities [b, t] of a column's texts for rows of the features."""
        return (self.images[rows] @ self.texts[column].T).softmax(-1)


class Lookalikes:
    """Tower features of changed images, found by the text that the tower drew for them."""

    def __init__(
        self,
        features: Tensor,
        position: Mapping[str, int],
        columns: Mapping[str, str],
        texts: Mapping[str, Sequence[int]],
        drawn: Mapping[str, np.ndarray],
        taught: Taught | None = None,
    ) -> None:
        """features: [versions * n, k, d], version after version; position: of each of the n images by name; columns: the label column of
        each kind of question; texts: by column, the index of each image's own text; drawn: by column, that of the text drawn for each row;
        taught: what the tower's probabilities follow from, for soft labels.
        """
        self.features, self.position, self.columns, self.texts, self.taught = features, position, columns, texts, taught
        self.rows = {}
        for column, of_row in drawn.items():
            order = np.argsort(of_row, kind="stable")
            starts = np.searchsorted(of_row[order], np.arange(max(texts[column]) + 2))
            self.rows[column] = [order[start:stop] for start, stop in zip(starts, starts[1:], strict=False)]

    def draw(self, image: str, kind: str, rng: np.random.Generator) -> int:
        """A row of `features` for a question of this kind about the image: one that the tower took for it, or, for a kind without a
        column and a text that was never drawn, a version of the image itself."""
        i = self.position[image]
        if (column := self.columns.get(kind)) is not None:
            rows = self.rows[column][self.texts[column][i]]
            if len(rows):
                return int(rows[rng.integers(len(rows))])
        num = len(self.position)
        return i + num * int(rng.integers(len(self.features) // num))


@torch.no_grad()
def find_lookalikes(recipe: Recipe, split: str, images: InMemoryImages, device: torch.device) -> Lookalikes:
    """What the tower of init.vision, with the heads beside it, takes the split's images for, the same for the same recipe."""
    settings = recipe.lookalikes
    judge = Judge.load(Path(recipe.init.vision).parent, device)
    columns = sorted(set(settings.labels.values()))
    labels = {row["id"]: row for row in read_parquet_rows(recipe.data.folder, split, ["id", *columns])}
    vocabularies = {column: sorted({labels[name][column] for name in images.names}) for column in columns}
    index = {column: {text: i for i, text in enumerate(texts)} for column, texts in vocabularies.items()}
    own = {column: [index[column][labels[name][column]] for name in images.names] for column in columns}
    scale = judge.heads.logit_scale.exp() / settings.temperature
    embedded = {column: scale * judge.embed_texts(texts) for column, texts in vocabularies.items()}
    generator = torch.Generator(device).manual_seed(recipe.train.seed)
    ((name, tower),) = judge.config.towers.items()
    features: list[Tensor] = []
    embeddings: list[Tensor] = []
    drawn: dict[str, list[Tensor]] = {column: [] for column in columns}
    for _ in range(settings.versions):
        for start in range(0, len(images), IMAGES_AT_ONCE):
            pixels = images.get(range(start, min(start + IMAGES_AT_ONCE, len(images)))).to(device)
            whole = unit_range(pixels)
            changed = _blend(augment(whole, recipe.augment, generator), settings, generator)
            is_plain = torch.rand(len(pixels), generator=generator, device=generator.device) < settings.plain
            changed = torch.where(is_plain.to(device).view(-1, 1, 1, 1), whole, changed)
            seen = _see(judge, name, tower, changed)
            features.append(seen.to(torch.bfloat16))
            image = judge.heads.embed_features(seen.float())
            embeddings.append(image)
            for column, text in embedded.items():
                chances = (image @ text.T).softmax(-1)
                drawn[column].append(torch.multinomial(chances, 1, generator=generator)[:, 0].cpu())
    texts_of_rows = {column: torch.cat(parts).numpy() for column, parts in drawn.items()}
    taught = Taught(torch.cat(embeddings), embedded, vocabularies) if settings.soft else None
    return Lookalikes(torch.cat(features), images.position, settings.labels, own, texts_of_rows, taught)


def _see(judge: Judge, name: str, tower: TowerConfig, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        return judge.vision({name: normalise(images, tower.mean, tower.std)})


def _blend(images: Tensor, settings: LookalikeTraining, generator: torch.Generator) -> Tensor:
    """Images of which about the share `blend` is blended with another one, which weighs up to a half."""
    b = len(images)
    other = torch.randperm(b, generator=generator, device=generator.device).to(images.device)
    is_blended = torch.rand(b, generator=generator, device=generator.device) < settings.blend
    weight = torch.rand(b, generator=generator, device=generator.device)
    weight = torch.lerp(torch.full_like(weight, settings.least_weight), torch.full_like(weight, 0.5), weight) * is_blended
    return torch.lerp(images, images[other], weight.to(images.device).view(b, 1, 1, 1))
