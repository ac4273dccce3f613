"""Figures of a run: one JSON line per report in `log.jsonl`, TensorBoard events if it is installed, a tracker if the recipe names one,
and at the end a plot."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

from omnimamba.model.files import whole_file

logger = logging.getLogger("omnimamba.train")
LOG_FILE, PLOT_FILE = "log.jsonl", "losses.png"
NOT_LOSSES = re.compile(r"step|kind|time|lr|tokens_per_s|(.+_)?grad_norm|usage|codes_used|psnr|.+_accuracy|mmu_exact.*")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class RunLog:
    """A context that closes what it writes to. first: the first step to run; what the log says of later ones is forgotten.

    tracker: `wandb` or `trackio`, to which the figures go too; empty for neither.
    """

    def __init__(self, folder: Path, first: int = 0, tracker: str = "") -> None:
        self.tracker = start_tracker(tracker, folder) if tracker else None
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_FILE
        if self.path.is_file():
            with whole_file(self.path) as kept:
                kept.write_text("".join(json.dumps(line) + "\n" for line in read_log(self.path) if line["step"] <= first), encoding="utf-8")
        self.file = self.path.open("a", encoding="utf-8")
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("no TensorBoard events: `pip install omnimamba[train]` adds them; log.jsonl has the same figures")
        else:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def report(self, step: int, figures: dict[str, float], *, kind: str = "train") -> None:
        self.file.write(json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **figures}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)
        if self.tracker is not None:
            self.tracker.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.tracker is not None:
            self.tracker.finish()
        plot_losses(self.path, self.path.with_name(PLOT_FILE))


def start_tracker(name: str, folder: Path) -> Any:
    """The module of a tracker, with a run of the folder's name begun or resumed. ValueError if it is not installed."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(f"train.tracker={name!r} needs the package {name}; `pip install {name}` installs it") from None
    run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    known = {"id": run_id, "dir": str(folder)} if name == "wandb" else {}
    module.init(project="omnimamba", name=str(folder), resume="allow", **known)
    return module


def plot_losses(log: Path, out: Path) -> None:
    """Draws the losses of a log to a PNG file: one panel for each, training and validation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plot of the losses: `pip install omnimamba[train]` adds it")
        return
    lines = read_log(log)
    names = [name for name in dict.fromkeys(name for line in lines for name in line) if not NOT_LOSSES.fullmatch(name)]
    if not names:
        return
    figure = Figure(figsize=(4.5 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for name, panel in zip(names, panels, strict=True):
        for kind in ("train", "val"):
            points = [(line["step"], line[name]) for line in lines if line["kind"] == kind and name in line]
            if points:
                panel.plot(*zip(*points, strict=True), label=kind, marker="o" if kind == "val" else None, markersize=3, linewidth=1)
        panel.set(title=name, xlabel="step")
        panel.legend()
        panel.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
