"""From a recipe file to a finished model: the one entry of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from omnimamba.config import preset
from omnimamba.data.prepare import train_text_tokenizer
from omnimamba.data.text import read_captions, read_conversations
from omnimamba.engine.omnimamba import resolve_device
from omnimamba.train import loop
from omnimamba.train.config import Recipe, read_recipe

logger = logging.getLogger("omnimamba.train")


def train(recipe_file: str | Path, overrides: Sequence[str] = (), *, device: str = "auto", show_progress: bool = False) -> Path:
    """The folder of the finished model. ValueError, before anything is built, for a recipe that cannot run."""
    recipe = read_recipe(recipe_file, overrides)
    if recipe.kind == "tokenizer":
        return train_tokenizer(recipe)
    where = resolve_device(device)
    return loop.run(make_objective(recipe, where), recipe, where, show_progress=show_progress)


def make_objective(recipe: Recipe, device: torch.device) -> loop.Objective:
    if recipe.kind == "vq":
        from omnimamba.train.vq import VQObjective

        return VQObjective(recipe, device)
    if recipe.kind == "tower":
        from omnimamba.train.tower import TowerObjective

        return TowerObjective(recipe, device)
    from omnimamba.train.omnimamba import OmniMambaObjective

    return OmniMambaObjective(recipe, device)


def train_tokenizer(recipe: Recipe) -> Path:
    """The folder with the `tokenizer.json` made of all captions and conversation turns of the training split."""
    data, texts = recipe.data, []
    folder, split = Path(data.folder), data.train_split
    if data.captions:
        texts += [text for row in read_captions(folder / data.captions.replace("{split}", split)) for text in row.captions]
    if data.conversations:
        rows = read_conversations(folder / data.conversations.replace("{split}", split))
        texts += [text for row in rows for _, text in row.turns]
    out = Path(recipe.out) / "model"
    out.mkdir(parents=True, exist_ok=True)
    train_text_tokenizer(texts, preset(recipe.preset).base_vocab_size).save(str(out / "tokenizer.json"))
    logger.info("text tokenizer of %d texts in %s", len(texts), out)
    return out
