"""The training loop. One for all kinds of model: an `Objective` says what a batch is and what its loss is.

Step n uses samples, augmentations and dropout that are functions of (seed, n) only, so a resumed run repeats nothing and
skips nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from omnimamba.config import nearest_name
from omnimamba.train import checkpoint
from omnimamba.train.checkpoint import Best, Checkpoints, read_step, step_folders
from omnimamba.train.config import Recipe, Train
from omnimamba.train.graphs import GraphRecorder, RecordedSteps
from omnimamba.train.interrupt import Interrupted, stop_requests
from omnimamba.train.metrics import RunLog
from omnimamba.train.optim import (
    MovingAverage,
    adamw,
    learned_state,
    learning_rate,
    optimizer_tensors,
    prepare_optimizer,
    set_learning_rate,
    trainable,
)
from omnimamba.train.parallel import ALONE, Processes, local, whole

logger = logging.getLogger("omnimamba.train")
PREFETCHED_BATCHES = 4


class Objective(Protocol):
    """What a run trains. `players` are named modules with an optimizer and a loss each; most objectives have one."""

    players: dict[str, nn.Module]

    def batch(self, step: int) -> Any:
        """The samples of a step."""
        ...

    def parts(self, step: int) -> list[Any]:
        """The batch of a step in the parts that are computed one after the other, whose losses add up to that of the batch; called ahead
        of time in another thread."""
        return [self.batch(step)]

    def collecting(self, yes: bool) -> contextlib.AbstractContextManager[None]:
        """Within, gradients are added up on each process and not yet exchanged, if `yes`."""
        return contextlib.nullcontext()

    def loss(self, player: str, batch: Any, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars of a step; the one named `loss` is minimised by `player`. `generator` is on the device, seeded for the step."""
        ...

    def updated(self) -> None:
        """Called whenever an optimizer has changed weights."""

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
        """What trains, in a few lines."""
        ...

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Within, the main process has the whole model at hand, where training spreads it over all; all processes enter it."""
        return contextlib.nullcontext()


REPORTING = ("steps", "log_every", "val_every", "sample_every", "save_every", "keep_checkpoints", "best", "best_is", "tracker")
PLACEMENT = ("accumulate", "recompute", "loss_chunk", "graphs", "parallel")
"""Keys of [train] that say how a step is computed, not what comes out of it (but for rounding and dropout)."""


def recipe_fingerprint(recipe: Recipe) -> str:
    """Short hash of what fixes the course of a run; the number of steps, reports, loading, devices, the run folder and what is made of the
    weights at the end do not count."""
    values = dataclasses.asdict(recipe)
    for key in ("out", "samples"):
        values.pop(key)
    for key in (*REPORTING, *PLACEMENT, "keep_start"):
        values["train"].pop(key)
    for key in ("in_memory", "num_threads", "val_split", "max_broken"):
        values["data"].pop(key)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def prefetched(objective: Objective, first: int, steps: int) -> Iterator[list[Any]]:
    """The parts of batches first..steps-1, made ahead of time in one thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[Future[Any]] = [pool.submit(objective.parts, step) for step in range(first, min(first + PREFETCHED_BATCHES, steps))]
        for step in range(first, steps):
            parts = waiting.pop(0).result()
            if step + PREFETCHED_BATCHES < steps:
                waiting.append(pool.submit(objective.parts, step + PREFETCHED_BATCHES))
            yield parts


def run(objective: Objective, recipe: Recipe, device: torch.device, *, processes: Processes = ALONE, show_progress: bool = False) -> Path:
    """Trains to the last step, resuming from the newest checkpoint, and returns the folder of the finished model.

    SIGINT and SIGTERM end the run after the step at hand, with a checkpoint, by raising `Interrupted`.
    """
    train, out = recipe.train, Path(recipe.out)
    best = Best(train.best, train.best_is == "highest") if train.best else None
    optimizers = {name: adamw(trainable(player).values(), train) for name, player in objective.players.items()}
    averages = {name: MovingAverage(player, train.ema) for name, player in objective.players.items()} if train.ema else {}
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                out / "checkpoints", keep=train.keep_checkpoints, fingerprint=recipe_fingerprint(recipe), best=best, processes=processes
            )
        )
        first = resume(checkpoints, objective, optimizers, averages)
        log = stack.enter_context(RunLog(out, first, train.tracker)) if processes.is_main else None
        if log is not None:
            (out / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1))
            for line in (*objective.summary().splitlines(), memory_line(objective, averages, processes)):
                logger.info("%s", line)
            logger.info("steps %d to %d, run folder %s", first + 1, train.steps, out)
        progress = stack.enter_context(progress_bar(recipe, first, is_shown=show_progress and processes.is_main))
        stop_signal = stack.enter_context(stop_requests())
        generator = torch.Generator(device)
        update = functools.partial(train_step, objective, optimizers, recipe, generator=generator, device=device)
        if train.graphs:
            update = RecordedSteps(update, device, GraphRecorder(generator))
        since, num_tokens = time.perf_counter(), 0
        for step, parts in enumerate(prefetched(objective, first, train.steps), first):
            seed = step_seed(train.seed, step, processes.rank)
            torch.manual_seed(seed)  # dropout
            generator.manual_seed(seed)  # augmentation
            for optimizer in optimizers.values():
                set_learning_rate(optimizer, learning_rate(step, train))
            figures = update(parts, step)
            for average in averages.values():
                average.update(step)
            num_tokens += sum(map(objective.num_tokens, parts))
            done = step + 1
            stop = processes.largest(stop_signal())
            logs, saves = is_due(train.log_every, done, train), is_due(train.save_every, done, train) or stop > 0
            if logs or saves:
                means = processes.mean([*figures.values(), num_tokens])
                report = dict(zip(figures, means, strict=False))
                if not all(map(math.isfinite, report.values())):
                    raise ValueError(f"step {step}: not a finite number in {report}; lower train.lr or use train.precision=fp32")
            if logs:
                now = time.perf_counter()
                report |= {"lr": learning_rate(step, train), "tokens_per_s": means[-1] * processes.size / (now - since)}
                since, num_tokens = now, 0
                if log is not None:
                    log.report(done, report)
                progress(done, f"loss {report['loss']:.3f}  {report['tokens_per_s']:,.0f} tokens/s")
            progress(done)
            validates, samples = is_due(train.val_every, done, train), is_due(train.sample_every, done, train)
            measured: dict[str, float] = {}
            if validates or samples:
                with averaged(averages), objective.whole():
                    if log is not None and validates:
                        log.report(done, measured := objective.validate(), kind="val")
                    if log is not None and samples:
                        objective.sample(out / "samples" / f"step-{done:08d}")
                processes.wait()
            if best is not None and validates:
                checkpoints.wait()  # the one before may be the best
                saves |= processes.largest(int(is_best(best, measured, checkpoints.best_value()))) > 0
            if saves:
                checkpoints.save(done, state_tensors(objective, optimizers, averages), measured)
            if stop:
                checkpoints.wait()
                raise Interrupted(f"stopped by {signal.Signals(stop).name} after step {done}; the same command goes on from there", stop)
        checkpoints.wait()
        processes.wait()
        export(objective, averages, out / "model", processes)
        if (folder := checkpoints.best_folder()) is not None:
            load(folder, objective, optimizers, averages, processes)
            export(objective, averages, out / "best", processes)
    return out / "model"


def memory_line(objective: Objective, averages: dict[str, MovingAverage], processes: Processes) -> str:
    """What a device holds all the time: what comes on top depends on batch, lengths, train.accumulate and train.recompute."""
    parameters = [local(p) for player in objective.players.values() for p in player.parameters()]
    learning = sum(p.nbytes for p in parameters if p.requires_grad)
    parts = {"weights": sum(p.nbytes for p in parameters), "gradients": learning, "optimizer": 2 * learning}
    if averages:
        parts["averages"] = sum(local(tensor).nbytes for average in averages.values() for tensor in average.averages.values())
    shown = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    devices = f" of each of {processes.size} devices" if processes.size > 1 else ""
    return f"memory{devices}: {sum(parts.values()) / 1e9:.3g} GB ({shown}), frozen encoders and activations on top"


def step_seed(seed: int, step: int, rank: int) -> int:
    """What the dropout and the augmentation of a step are drawn from, on each process of its own."""
    return seed * 1_000_003 + step + rank * 1_000_000_007


@contextlib.contextmanager
def progress_bar(recipe: Recipe, first: int, *, is_shown: bool) -> Iterator[Callable[..., None]]:
    """Gives a function that is told how many steps are done, and figures to show; without a bar they are lines of the program's log."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not is_shown) as progress:
        bar = progress.add_task(recipe.train.stage or recipe.kind, total=recipe.train.steps, completed=first, figures="")

        def show(done: int, figures: str = "") -> None:
            progress.update(bar, completed=done)
            if figures and is_shown:
                progress.update(bar, figures=figures)
            elif figures:
                logger.info("step %d of %d: %s", done, recipe.train.steps, figures)

        yield show


@contextlib.contextmanager
def averaged(averages: dict[str, MovingAverage]) -> Iterator[None]:
    """Within, the players have their averaged weights."""
    for average in averages.values():
        average.swap()
    try:
        yield
    finally:
        for average in averages.values():
            average.swap()


def export(objective: Objective, averages: dict[str, MovingAverage], folder: Path, processes: Processes) -> None:
    with averaged(averages), objective.whole():
        if processes.is_main:
            objective.export(folder)
    processes.wait()


def is_best(best: Best, figures: dict[str, float], so_far: float | None) -> bool:
    """Whether a validation is better than that of any checkpoint; False where there was none. ValueError if it lacks the figure."""
    if not figures:
        return False
    if best.figure not in figures:
        raise ValueError(f"train.best={best.figure!r}: a validation has no such figure; {nearest_name(best.figure, figures)}")
    return so_far is None or best.of({"so far": so_far, "now": figures[best.figure]}) == "now"


def is_due(every: int, done: int, train: Train) -> bool:
    """Whether what happens each `every` steps (0: never), and after the last, happens after `done` steps."""
    return every > 0 and (done % every == 0 or done == train.steps)


def train_step(
    objective: Objective,
    optimizers: dict[str, torch.optim.AdamW],
    recipe: Recipe,
    parts: Sequence[Any],
    step: int,
    *,
    generator: torch.Generator,
    device: torch.device,
) -> dict[str, Tensor]:
    """One update of every player, at the optimizers' learning rates; returns detached scalars."""
    figures: dict[str, Tensor] = {}
    for name, optimizer in optimizers.items():
        losses: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            with objective.collecting(i + 1 < len(parts)):
                found = add_gradients(objective, name, part, step, recipe.train.precision, generator, device)
            for key, value in found.items():
                losses[key] = losses[key] + value if key in losses else value
        if not losses:
            continue  # this player does not take part yet
        parameters = [p for p in objective.players[name].parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, recipe.train.grad_clip or float("inf"))
        optimizer.step()
        objective.updated()
        for other in optimizers.values():  # a loss may reach other players, as the adversarial one does
            other.zero_grad(set_to_none=True)
        prefix = "" if len(optimizers) == 1 or not figures else f"{name}_"
        figures |= {prefix + key: value for key, value in losses.items()} | {f"{prefix}grad_norm": whole(norm.detach())}
    return figures


def add_gradients(
    objective: Objective, player: str, part: Any, step: int, precision: str, generator: torch.Generator, device: torch.device
) -> dict[str, Tensor]:
    """The detached losses of a part. What led to them is free when this returns, before the next part begins."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses = objective.loss(player, part, step, generator)
    if losses:
        losses["loss"].backward()
    return {key: value.detach() for key, value in losses.items()}


def state_tensors(objective: Objective, optimizers: dict[str, torch.optim.AdamW], averages: dict[str, MovingAverage]) -> dict[str, Tensor]:
    """Everything a checkpoint holds: weights and statistics, their averages, and the optimizers' state."""
    tensors = {}
    for name, player in objective.players.items():
        parts = {"weights": learned_state(player), "optimizer": optimizer_tensors(player, optimizers[name])}
        if name in averages:
            parts["average"] = averages[name].averages
        tensors |= {f"{name}/{part}/{key}": tensor for part, group in parts.items() for key, tensor in group.items()}
    return tensors


def resume(
    checkpoints: Checkpoints, objective: Objective, optimizers: dict[str, torch.optim.AdamW], averages: dict[str, MovingAverage]
) -> int:
    """The first step to run; loads the newest checkpoint in place if there is one."""
    folders = step_folders(checkpoints.folder)
    if not folders:
        return 0
    step = read_step(folders[-1], fingerprint=checkpoints.fingerprint)
    load(folders[-1], objective, optimizers, averages, checkpoints.processes)
    if checkpoints.processes.is_main:
        logger.info("resuming from %s", folders[-1])
    return step


@torch.no_grad()
def load(
    folder: Path,
    objective: Objective,
    optimizers: dict[str, torch.optim.AdamW],
    averages: dict[str, MovingAverage],
    processes: Processes,
) -> None:
    """Puts a checkpoint's values into players, optimizers and averages, in place."""
    names = checkpoint.stored(folder)
    for name, player in objective.players.items():
        prefix = f"{name}/optimizer/"
        prepare_optimizer(player, optimizers[name], {key.removeprefix(prefix) for key in names if key.startswith(prefix)})
    checkpoint.load(folder, state_tensors(objective, optimizers, averages), processes=processes)
