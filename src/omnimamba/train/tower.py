"""Understanding tower of a small model, trained contrastively on image-text pairs, then frozen as the paper's towers are.

Each image is contrasted with every text of a label column, not only with those of its batch: the sets are small (a few thousand
names), so their embeddings are made anew in each step and the loss is a softmax over all of them. Columns such as style or
subgroup are texts like captions ("noto", "face-concerned"), each column a contrast of its own.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from omnimamba.config import TowerConfig
from omnimamba.data.augment import augment, collage, normalise, turn, unit_range
from omnimamba.data.collate import pad_right
from omnimamba.data.images import Images, InMemoryImages, open_parquet_images, read_parquet_rows
from omnimamba.data.mixture import EpochSampler, step_rng
from omnimamba.eval.judge import Judge
from omnimamba.model.contrastive import MAX_TEXT_TOKENS, ContrastiveHeads
from omnimamba.model.files import save_tensors
from omnimamba.model.vision import VisionTowers
from omnimamba.processor.tokenizer import TextTokenizer
from omnimamba.train.config import Recipe
from omnimamba.train.loop import Objective

VALIDATION_BATCH = 256
NUM_STATISTICS_BATCHES = 24
"""Training batches that the statistics of BatchNorm are estimated from after weights were averaged."""


class LabelledImages:
    """A split: images, and per label column the index of each image's text in the column's list of texts."""

    def __init__(self, recipe: Recipe, split: str, size: int, texts: dict[str, list[str]] | None, device: torch.device) -> None:
        data, columns = recipe.data, list(recipe.tower.labels)
        rows = read_parquet_rows(data.folder, split, ["id", *columns])
        self.texts = texts or {column: sorted({row[column] for row in rows}) for column in columns}
        self.images: Images = open_parquet_images(data.folder, split, size, resize="naive", num_threads=data.num_threads)
        if data.in_memory:
            self.images = InMemoryImages(self.images, device)
        by_id = {row["id"]: row for row in rows}
        self.targets = {}
        for column in columns:
            place = {text: i for i, text in enumerate(self.texts[column])}
            self.targets[column] = torch.tensor([place.get(by_id[name][column], -1) for name in self.images.names])


class ContrastiveTower(nn.Module):
    """A single tower with its heads: what is trained."""

    def __init__(self, towers: dict[str, TowerConfig], heads: ContrastiveHeads) -> None:
        super().__init__()
        ((self.name, self.config),) = towers.items()
        self.vision = VisionTowers(towers)
        self.heads = heads

    def train(self, mode: bool = True) -> ContrastiveTower:
        """This module; its tower too, which `VisionTowers` keeps in eval mode for everybody else."""
        super().train(mode)
        self.vision.towers.train(mode)
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors [b, dim] of images [b, 3, s, s] in [0, 1]."""
        pixels = normalise(images, self.config.mean, self.config.std).contiguous(memory_format=torch.channels_last)
        return self.heads.embed_features(self.vision({self.name: pixels}))


class TowerObjective(Objective):
    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.config = recipe.config
        if len(self.config.towers) != 1:
            raise ValueError(f"preset {recipe.preset} has {len(self.config.towers)} towers; only a single one can be trained")
        tokenizer = TextTokenizer.from_file(recipe.init.tokenizer, self.config)
        (network,) = self.config.towers.values()
        size, data = network.image_size, recipe.data
        self.train_set = LabelledImages(recipe, data.train_split, size, None, device)
        self.val_set = LabelledImages(recipe, data.val_split, size, self.train_set.texts, device) if data.val_split else None
        rows = [tokenizer.encode(text) for texts in self.train_set.texts.values() for text in texts]
        if (longest := max(map(len, rows))) > MAX_TEXT_TOKENS:
            raise ValueError(f"a text of tower.labels has {longest} tokens, the text encoder reads {MAX_TEXT_TOKENS}; shorten it")
        self.text_ids = pad_right(rows, tokenizer.pad_id).to(device), torch.tensor([len(row) for row in rows], device=device)
        torch.manual_seed(recipe.train.seed)
        sizes = recipe.tower
        heads = ContrastiveHeads(network.dim, self.config.text_vocab_size, dim=sizes.embedding_dim, text_width=sizes.text_width)
        self.tower = ContrastiveTower(self.config.towers, heads)
        if recipe.init.model:
            start = Judge.load(Path(recipe.init.model))
            self.tower.vision.load_state_dict(start.vision.state_dict())
            heads.load_state_dict(start.heads.state_dict())
        self.start = copy.deepcopy(self.tower).state_dict() if recipe.train.keep_start else {}
        self.tower.to(device).to(memory_format=torch.channels_last)
        self.players: dict[str, nn.Module] = {"tower": self.tower}
        self.sampler = EpochSampler(len(self.train_set.images), recipe.train.batch, recipe.train.seed)

    def summary(self) -> str:
        num = sum(parameter.numel() for parameter in self.tower.parameters())
        return f"{num:,} parameters of {self.tower.config.timm_name} and its contrastive heads"

    def batch(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        idx = self.sampler.indices(step)
        return self.train_set.images.get(idx), {column: targets[idx] for column, targets in self.train_set.targets.items()}

    def num_tokens(self, batch: Any) -> int:
        return len(batch[0])

    def loss(self, player: str, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A batch is three kinds of images: plain, collages of turned ones, and strongly changed ones; only the last are blended."""
        pixels, targets = batch
        settings, b = self.recipe.tower, len(pixels)
        self.tower.train()
        plain = round(settings.plain_share * b)
        first = plain + round(settings.collage_share * b)  # of the strongly changed ones
        images = unit_range(pixels.to(self.device))
        parts = [augment(images[:plain], self.recipe.augment_plain, generator)]
        if plain < first:
            labels = torch.stack([targets[column][plain:first] for column in settings.collage_labels], 1)
            groups = labels.unique(dim=0, return_inverse=True)[1].to(self.device)
            parts.append(collage(turn(images[plain:first], generator), groups, generator))
        changed = augment(images[first:], self.recipe.augment, generator)
        share, other = self._mix(first, b, step)
        embedded = self.tower.embed(torch.cat([*parts, torch.lerp(changed[other[first:] - first], changed, share)]))
        texts = self._embed_texts(self.tower.heads)
        drawn, shown = torch.arange(first, device=self.device), torch.cat([torch.arange(plain), torch.arange(first, b)]).to(self.device)
        losses, figures = [], {}
        for column, weight in settings.labels.items():
            rows = drawn if column in settings.collage_labels else shown
            scores = self.tower.heads.scores(embedded[rows], texts[column])
            target = targets[column].to(self.device)
            loss = share * F.cross_entropy(scores, target[rows], label_smoothing=settings.label_smoothing)
            loss = loss + (1 - share) * F.cross_entropy(scores, target[other][rows], label_smoothing=settings.label_smoothing)
            figures[column] = loss
            losses.append(weight * loss)
        return {"loss": torch.stack(losses).sum(), **figures}

    def _mix(self, first: int, b: int, step: int) -> tuple[float, Tensor]:
        """The share of an image in a blend, and the index [b] of its partner; those before `first` are their own partners."""
        rng = step_rng(self.recipe.train.seed, step, "mixup")
        alpha = self.recipe.tower.mixup
        share = float(rng.beta(alpha, alpha)) if alpha else 1.0
        order = [*range(first), *(first + rng.permutation(b - first))]
        return max(share, 1 - share), torch.tensor(order, device=self.device)

    def _embed_texts(self, heads: ContrastiveHeads) -> dict[str, Tensor]:
        """Unit vectors [n, dim] of all texts by column, made in one pass."""
        texts = self.train_set.texts
        return dict(zip(texts, heads.text(*self.text_ids).split([len(column) for column in texts.values()]), strict=True))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Share of validation images whose best text of a column is theirs."""
        if self.val_set is None:
            return {}
        self.tower.eval()
        texts = self._embed_texts(self.tower.heads)
        correct, num = dict.fromkeys(texts, 0), len(self.val_set.images)
        for start in range(0, num, VALIDATION_BATCH):
            idx = list(range(start, min(start + VALIDATION_BATCH, num)))
            embedded = self.tower.embed(unit_range(self.val_set.images.get(idx).to(self.device)))
            for column, text in texts.items():
                correct[column] += int((self.tower.heads.scores(embedded, text).argmax(1).cpu() == self.val_set.targets[column][idx]).sum())
        return {f"{column}_accuracy": number / num for column, number in correct.items()}

    @torch.no_grad()
    def averaged(self) -> ContrastiveTower:
        """A tower with `keep_start` of the weights that training started from."""
        tower, share = copy.deepcopy(self.tower), self.recipe.train.keep_start
        for name, tensor in tower.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(self.start[name].to(tensor.device), share)
        norms = [module for module in tower.modules() if isinstance(module, _BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over all batches
        learned, self.tower = self.tower, tower
        generator = torch.Generator(self.device).manual_seed(self.recipe.train.seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            for step in range(NUM_STATISTICS_BATCHES if norms else 0):
                self.loss("tower", self.batch(step), step, generator)
        self.tower = learned
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return tower.eval()

    def sample(self, folder: Path) -> None:
        """A tower has nothing to paint."""

    def export(self, folder: Path) -> None:
        """`config.json`, `tokenizer.json`, `vision.safetensors` (the tower) and `judge.safetensors` (the heads)."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        shutil.copy(self.recipe.init.tokenizer, folder / "tokenizer.json")
        tower = self.averaged() if self.start else self.tower
        for name, module in (("vision", tower.vision), ("judge", tower.heads)):
            save_tensors(module.state_dict(), folder / f"{name}.safetensors")
