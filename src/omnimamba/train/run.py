"""From a recipe file to a finished model: the one entry of training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from omnimamba.config import nearest_name
from omnimamba.data.images import parquet_files
from omnimamba.data.kept import Kept
from omnimamba.data.prepare import train_text_tokenizer
from omnimamba.data.text import read_captions, read_conversations
from omnimamba.engine.omnimamba import resolve_device
from omnimamba.model.weights import locate
from omnimamba.ops.plain_path import missing_for_kernels
from omnimamba.train import loop
from omnimamba.train.config import Recipe, read_recipe
from omnimamba.train.parallel import ALONE, Processes, joined_processes
from omnimamba.train.stages import STAGES

logger = logging.getLogger("omnimamba.train")


def train(
    recipe_file: str | Path, overrides: Sequence[str] = (), *, device: str = "auto", show_progress: bool = False, kept: Kept | None = None
) -> Path:
    """The folder of the finished model. ValueError, before anything is built, for a recipe that cannot run.

    kept: for several runs in one process, what a stage of the language model makes of its data; passed to each, they make it once.
    """
    recipe = read_recipe(recipe_file, overrides)
    if recipe.kind == "tokenizer":
        return train_tokenizer(recipe)
    chosen = resolve_device(device)
    check_files(recipe)
    with joined_processes(chosen) as (processes, where):
        if not processes.is_main:
            logger.setLevel(logging.ERROR)
        check_share(recipe, processes.size)
        check_graphs(recipe, where, processes.size)
        objective = make_objective(recipe, where, processes, kept)
        return loop.run(objective, recipe, where, processes=processes, show_progress=show_progress)


TASK_FILES = {"mmu": ("conversations",), "t2i": ("captions", "tokens")}
"""Keys of [data] that a task reads."""


def check_files(recipe: Recipe) -> None:
    """ValueError if what the recipe reads is not there, with the nearest name that is."""
    data, init, folder = recipe.data, recipe.init, Path(recipe.data.folder)
    for name in ("tokenizer", "vision", "vq"):
        if (file := getattr(init, name)) and not Path(file).is_file():
            raise ValueError(f"init.{name}={file}: no such file; {nearest_file(Path(file))}. The recipe that makes it comes first")
    for name in ("model", "mmu", "t2i", "encoders"):
        if source := getattr(init, name):
            locate(source)
    if data.images == "datasets":
        return  # known when it is opened, by its own library
    if not folder.is_dir():
        raise ValueError(f"data.folder={folder}: no such folder; {nearest_file(folder)}")
    keys = [key for task in STAGES[recipe.train.stage].tasks for key in TASK_FILES[task]] if recipe.kind == "omnimamba" else []
    for split in filter(None, (data.train_split, data.val_split)):
        for key in keys:
            name = getattr(data, key)
            file = folder / name.replace("{split}", split)
            if name and not file.is_file() and not file.with_name(file.name + ".gz").is_file():
                raise ValueError(f"data.{key}: {file}: no such file; {nearest_file(file)}")
            if name and data.images == "folder" and split != data.train_split and "{split}" not in name:
                raise ValueError(f"data.{key}={name} is the validation's, too; name files as in {file.stem}-{{split}}{file.suffix}")
        if data.images == "parquet":
            parquet_files(folder, split)


def nearest_file(path: Path) -> str:
    """A hint at what lies where the path should."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = [other.name for other in path.parent.iterdir() if not other.name.startswith(".")]
    return nearest_name(path.name, names) if names else f"the folder {path.parent} is empty"


def check_share(recipe: Recipe, num_processes: int) -> None:
    """ValueError if a step cannot be split evenly over the processes and the parts that each computes it in."""
    train = recipe.train
    if num_processes * train.accumulate > 1 and recipe.kind != "omnimamba":
        raise ValueError(f"a {recipe.kind} recipe runs on one process, in one part; start it without torchrun and train.accumulate")
    for name, parts in train.parts_of_tasks(num_processes).items():
        if (batch := getattr(train, name)) % (num_processes * parts):
            raise ValueError(
                f"train.{name}={batch} is that of a whole step; pass a multiple of {num_processes * parts}, "
                f"for {num_processes} processes with train.accumulate={train.accumulate}"
            )


def check_graphs(recipe: Recipe, device: torch.device, num_processes: int) -> None:
    """ValueError if the recipe asks for CUDA graphs where there are none."""
    if recipe.train.graphs and (device.type != "cuda" or num_processes > 1):
        raise ValueError(
            "train.graphs=true is for one process with a CUDA device; "
            f"leave it out, for this run has {num_processes} on device {device.type}"
        )
    if recipe.train.graphs and recipe.train.recompute and (reason := missing_for_kernels()):
        raise ValueError(f"train.graphs=true goes with train.recompute=true where blocks have kernels: {reason}")


def make_objective(recipe: Recipe, device: torch.device, processes: Processes = ALONE, kept: Kept | None = None) -> loop.Objective:
    if recipe.kind == "vq":
        from omnimamba.train.vq import VQObjective

        return VQObjective(recipe, device)
    if recipe.kind == "tower":
        from omnimamba.train.tower import TowerObjective

        return TowerObjective(recipe, device)
    from omnimamba.train.omnimamba import OmniMambaObjective

    return OmniMambaObjective(recipe, device, processes, kept)


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
    train_text_tokenizer(texts, recipe.config.base_vocab_size).save(str(out / "tokenizer.json"))
    logger.info("text tokenizer of %d texts in %s", len(texts), out)
    return out
