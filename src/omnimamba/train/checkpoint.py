"""Checkpoints of a run: folders `step-00001000` that appear whole or not at all.

The randomness of a step is a function of (seed, step) and so are its samples, so a checkpoint holds weights, optimizer and the
step number, and an interrupted run continues on the same losses.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from omnimamba.model.files import one_line, save_tensors


def step_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix == "")


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], optimizers: dict[str, Any], *, keep: int, fingerprint: str
) -> Path:
    """Writes `step-{step}` and removes all but the newest `keep` checkpoints. `step` is the next step to run."""
    target = folder / f"step-{step:08d}"
    partial = folder / f"{target.name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, state in tensors.items():
        save_tensors(state, partial / f"{name}.safetensors")
    torch.save(optimizers, partial / "optimizers.pt")
    (partial / "meta.json").write_text(json.dumps({"step": step, "recipe": fingerprint}))
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in step_folders(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load(path: Path, *, fingerprint: str) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(next step, tensors, optimizer states). ValueError if the checkpoint is damaged or belongs to another recipe."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        optimizers = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
        step, recipe = int(meta["step"]), str(meta["recipe"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({one_line(error)}); delete the folder to resume from the one before") from None
    if recipe != fingerprint:
        raise ValueError(f"{path}: saved by another recipe; give another `out` folder or delete this one to start again")
    return step, tensors, optimizers
