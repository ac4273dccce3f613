"""The training loop. One for all kinds of model: an `Objective` says what a batch is and what its loss is.

Step n uses samples, augmentations and dropout that are functions of (seed, n) only, so a resumed run repeats nothing and
skips nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from omnimamba.train import checkpoint
from omnimamba.train.config import Recipe, Train
from omnimamba.train.metrics import RunLog
from omnimamba.train.optim import MovingAverage, adamw, learned_state, learning_rate, trainable

logger = logging.getLogger("omnimamba.train")
PREFETCHED_BATCHES = 4


class Objective(Protocol):
    """What a run trains. `players` are named modules with an optimizer and a loss each; most objectives have one."""

    players: dict[str, nn.Module]

    def batch(self, step: int) -> Any:
        """The samples of a step, on the CPU; called ahead of time in another thread."""
        ...

    def loss(self, player: str, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars of a step; the one named `loss` is minimised by `player`. `generator` is on the device, seeded for the step."""
        ...

    def num_tokens(self, batch: Any) -> int:
        """Tokens (images for a VQ or tower) that a batch holds, for the speed display."""
        ...

    def validate(self) -> dict[str, float]: ...

    def sample(self, folder: Path) -> None:
        """Writes pictures and texts of the model as it is."""
        ...

    def export(self, folder: Path) -> None:
        """Writes the finished model."""
        ...

    def summary(self) -> str:
        """What trains, in one line."""
        ...


def recipe_fingerprint(recipe: Recipe) -> str:
    """Short hash of what fixes the course of a run; the number of steps, reports, loading and the run folder do not count."""
    values = dataclasses.asdict(recipe)
    for key in ("out", "samples"):
        values.pop(key)
    for key in ("steps", "log_every", "val_every", "sample_every", "save_every", "keep_checkpoints"):
        values["train"].pop(key)
    for key in ("in_memory", "num_threads", "val_split"):
        values["data"].pop(key)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def prefetched(objective: Objective, first: int, steps: int) -> Iterator[Any]:
    """Batches first..steps-1, made ahead of time in one thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[Future[Any]] = [pool.submit(objective.batch, step) for step in range(first, min(first + PREFETCHED_BATCHES, steps))]
        for step in range(first, steps):
            batch = waiting.pop(0).result()
            if step + PREFETCHED_BATCHES < steps:
                waiting.append(pool.submit(objective.batch, step + PREFETCHED_BATCHES))
            yield batch


def run(objective: Objective, recipe: Recipe, device: torch.device, *, show_progress: bool = False) -> Path:
    """Trains to the last step, resuming from the newest checkpoint, and returns the folder of the finished model."""
    train, out = recipe.train, Path(recipe.out)
    fingerprint = recipe_fingerprint(recipe)
    optimizers = {name: adamw(trainable(player).values(), train) for name, player in objective.players.items()}
    averages = {name: MovingAverage(player, train.ema) for name, player in objective.players.items()} if train.ema else {}
    first = resume(out, objective, optimizers, averages, fingerprint)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1))
    logger.info("%s; %d steps, run folder %s", objective.summary(), train.steps, out)
    generator = torch.Generator(device)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with RunLog(out) as log, Progress(*columns, disable=not show_progress) as progress:
        bar = progress.add_task(recipe.train.stage or recipe.kind, total=train.steps, completed=first, figures="")
        since, num_tokens = time.perf_counter(), 0
        for step, batch in enumerate(prefetched(objective, first, train.steps), first):
            torch.manual_seed(train.seed * 1_000_003 + step)  # dropout
            generator.manual_seed(train.seed * 1_000_003 + step)  # augmentation
            figures = train_step(objective, optimizers, recipe, batch, step, generator, device)
            for average in averages.values():
                average.update(step)
            num_tokens += objective.num_tokens(batch)
            done = step + 1
            logs, saves = is_due(train.log_every, done, train), is_due(train.save_every, done, train)
            if logs or saves:
                report = {name: value.item() for name, value in figures.items()}
                if not all(map(math.isfinite, report.values())):
                    raise ValueError(f"step {step}: not a finite number in {report}; lower train.lr or use train.precision=fp32")
            if logs:
                now = time.perf_counter()
                report |= {"lr": learning_rate(step, train), "tokens_per_s": num_tokens / (now - since)}
                since, num_tokens = now, 0
                log.report(done, report)
                progress.update(bar, figures=f"loss {report['loss']:.3f}  {report['tokens_per_s']:,.0f} tokens/s")
            progress.update(bar, completed=done)
            for average in averages.values():
                average.swap()
            if is_due(train.val_every, done, train):
                log.report(done, objective.validate(), kind="val")
            if is_due(train.sample_every, done, train):
                objective.sample(out / "samples" / f"step-{done:08d}")
            for average in averages.values():
                average.swap()
            if saves:
                save(out, done, objective, optimizers, averages, recipe, fingerprint)
    for average in averages.values():
        average.swap()
    objective.export(out / "model")
    return out / "model"


def is_due(every: int, done: int, train: Train) -> bool:
    """Whether what happens each `every` steps (0: never), and after the last, happens after `done` steps."""
    return every > 0 and (done % every == 0 or done == train.steps)


def train_step(
    objective: Objective,
    optimizers: dict[str, torch.optim.AdamW],
    recipe: Recipe,
    batch: Any,
    step: int,
    generator: torch.Generator,
    device: torch.device,
) -> dict[str, Tensor]:
    """One update of every player; returns detached scalars."""
    figures: dict[str, Tensor] = {}
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.train)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            losses = objective.loss(name, batch, step, generator)
        if not losses:
            continue  # this player does not take part yet
        losses["loss"].backward()
        parameters = [p for p in objective.players[name].parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, recipe.train.grad_clip or float("inf"))
        optimizer.step()
        for other in optimizers.values():  # a loss may reach other players, as the adversarial one does
            other.zero_grad(set_to_none=True)
        prefix = "" if len(optimizers) == 1 or not figures else f"{name}_"
        figures |= {prefix + key: value.detach() for key, value in losses.items()} | {f"{prefix}grad_norm": norm.detach()}
    return figures


def save(
    out: Path,
    step: int,
    objective: Objective,
    optimizers: dict[str, torch.optim.AdamW],
    averages: dict[str, MovingAverage],
    recipe: Recipe,
    fingerprint: str,
) -> None:
    tensors = {name: learned_state(player) for name, player in objective.players.items()}
    tensors |= {f"{name}-ema": average.averages for name, average in averages.items()}
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    checkpoint.save(out / "checkpoints", step, tensors, states, keep=recipe.train.keep_checkpoints, fingerprint=fingerprint)


@torch.no_grad()
def resume(
    out: Path,
    objective: Objective,
    optimizers: dict[str, torch.optim.AdamW],
    averages: dict[str, MovingAverage],
    fingerprint: str,
) -> int:
    """The first step to run; loads the newest checkpoint in place if there is one."""
    folders = checkpoint.step_folders(out / "checkpoints")
    if not folders:
        return 0
    step, tensors, states = checkpoint.load(folders[-1], fingerprint=fingerprint)
    for name, player in objective.players.items():
        for key, tensor in learned_state(player).items():
            tensor.copy_(tensors[name][key])
        optimizers[name].load_state_dict(states[name])
        if name in averages:
            averages[name].load(tensors[f"{name}-ema"])
    logger.info("resuming from %s", folders[-1])
    return step
