"""Checkpoints of a run: folders `step-00001000` that appear whole or not at all, in PyTorch's Distributed Checkpoint format.

The randomness of a step is a function of (seed, step) and so are its samples, so a checkpoint holds tensors and the step number, and
an interrupted run continues on the same losses. The format is that of the tensors as a whole: a run may go on on another number of
processes than it was saved by, sharded or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from omnimamba.model.files import one_line
from omnimamba.train.parallel import ALONE, Processes, process_group

META_FILE = "meta.json"


@dataclasses.dataclass(frozen=True)
class Best:
    """Which validation figure says what the best checkpoint is."""

    figure: str
    is_highest: bool = False

    def of(self, values: Mapping[Any, float]) -> Any:
        """The key with the best value; the first of equals. None if there is none."""
        return (max if self.is_highest else min)(values, key=values.__getitem__, default=None)


class Checkpoints:
    """The checkpoints of a run. Saving goes on in the background; leave the context, or call `wait`, to have it done."""

    def __init__(self, folder: Path, *, keep: int, fingerprint: str, best: Best | None = None, processes: Processes = ALONE) -> None:
        self.folder, self.keep, self.fingerprint, self.best, self.processes = folder, keep, fingerprint, best, processes
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.saving: Future[None] | None = None
        self.open = contextlib.ExitStack()
        if processes.is_main:
            for leftover in (*folder.glob("step-*.tmp"), *folder.glob("step-*.old")):
                shutil.rmtree(leftover)
        processes.wait()

    def __enter__(self) -> Checkpoints:
        self.open.enter_context(process_group())
        self.open.enter_context(self.thread)
        self.open.callback(self.wait)
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def save(self, step: int, tensors: Mapping[str, Tensor], figures: Mapping[str, float] | None = None) -> None:
        """Copies the tensors and writes `step-{step}` in the background, then removes what is not to be kept.

        step: the next one to run; figures: those of a validation of these weights. All processes call it with their shards.
        """
        self.wait()
        meta = {"step": step, "recipe": self.fingerprint, "figures": dict(figures or {})}
        partial = self.folder / f"step-{step:08d}.tmp"
        written = state_dict_saver.async_save(dict(tensors), checkpoint_id=partial, process_group=self.processes.saving)
        assert isinstance(written, Future)
        self.saving = self.thread.submit(self._finish, written, partial, meta)

    def wait(self) -> None:
        """Returns when the last save is complete, and raises its error."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            saving.result()

    def _finish(self, written: Future[Any], partial: Path, meta: dict[str, Any]) -> None:
        written.result()  # on the main process: when all have written
        if not self.processes.is_main:
            return
        with (partial / META_FILE).open("w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        target = partial.with_suffix("")
        _remove(target)
        partial.rename(target)
        _sync_folder(self.folder)
        kept = {*step_folders(self.folder)[-self.keep :], self.best_folder()}
        for path in step_folders(self.folder):
            if path not in kept:
                _remove(path)

    def best_value(self) -> float | None:
        """The best figure of the checkpoints that are there; None without one."""
        return self._values().get(self.best_folder())

    def best_folder(self) -> Path | None:
        return self.best.of(self._values()) if self.best else None

    def _values(self) -> dict[Path | None, float]:
        if self.best is None:
            return {}
        metas = {path: json.loads((path / META_FILE).read_text()) for path in step_folders(self.folder)}
        return {path: meta["figures"][self.best.figure] for path, meta in metas.items() if self.best.figure in meta["figures"]}


def step_folders(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix == ""), key=lambda path: int(path.name.removeprefix("step-")))


def read_step(path: Path, *, fingerprint: str) -> int:
    """The next step to run. ValueError if the checkpoint is damaged or belongs to another recipe."""
    try:
        meta = json.loads((path / META_FILE).read_text())
        step, recipe = int(meta["step"]), str(meta["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if recipe != fingerprint:
        raise ValueError(f"{path}: saved by another recipe; give another `out` folder or delete this one to start again")
    return step


def stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Size and type of each tensor of a checkpoint, by name. ValueError if it is damaged."""
    try:
        found = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # unpickling what is damaged raises anything
        raise _damaged(path, error) from error
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def load(path: Path, tensors: Mapping[str, Tensor], *, processes: Processes = ALONE) -> None:
    """Fills the tensors (or this process's shards of them) in place. ValueError if the checkpoint is damaged or lacks one."""
    try:
        with process_group():
            state_dict_loader.load(dict(tensors), checkpoint_id=path, process_group=processes.saving)
    except CheckpointException as error:
        raise _damaged(path, next(iter(error.failures.values()))[0]) from None
    except Exception as error:
        raise _damaged(path, error) from error


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, on the CPU."""
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored(path).items()}
    load(path, tensors)
    return tensors


def _damaged(path: Path, error: BaseException) -> ValueError:
    return ValueError(f"{path}: damaged checkpoint ({one_line(error)}); delete the folder to resume from the one before")


def _remove(path: Path) -> None:
    """A folder that is being deleted no longer looks like a checkpoint."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_suffix(".old")))


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
