"""The paper's ablations (arXiv 2503.08686, table 4) at the size of nano, and two of our own: one command for all, over several seeds.

    python -m omnimamba.train.ablations recipes/ablations data.folder=EMOJI

Each variant and seed is a chain of recipes, each starting from the model of the one before; the last model is scored on the emoji
benchmark. Stages that variants have in common are trained once for a seed. What is finished is not run again, so the command can be
interrupted, given more seeds, or split over machines. With `--jobs` several run at once, spread over the GPUs; what one writes is in its
`log.txt`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import gc
import json
import logging
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from omnimamba.config import nearest_name
from omnimamba.data.kept import Kept
from omnimamba.engine.omnimamba import OmniMamba, resolve_device
from omnimamba.eval.emoji import evaluate
from omnimamba.model.files import whole_file
from omnimamba.train.config import read_recipe
from omnimamba.train.interrupt import Interrupted
from omnimamba.train.metrics import LOG_FILE, read_log
from omnimamba.train.run import train
from omnimamba.train.workers import LOG_FORMAT, Run, run_all, visible_gpus

logger = logging.getLogger("omnimamba.train")
CHAIN = ("1-stage1-t2i", "2-stage1-mmu", "3-stage2")


@dataclasses.dataclass(frozen=True)
class Variant:
    what: str
    recipes: tuple[str, ...] = CHAIN
    overrides: tuple[str, ...] = ()
    """Of every recipe."""
    last_overrides: tuple[str, ...] = ()
    """Of the last recipe only."""


VARIANTS = {
    "full": Variant("decoupled vocabularies, task LoRA, decoupled stages"),
    "no-task-lora": Variant("without task LoRA", overrides=("model.lora.rank=0",)),
    "unified-vocabulary": Variant("one vocabulary for text and images", overrides=("model.unified_vocabulary=true",)),
    "joint": Variant("both tasks from the first step, as many samples", recipes=("joint",)),
    "mostly-painting": Variant(
        "stage 2 with 15 samples of painting for one of understanding", last_overrides=("train.mmu_batch=16", "train.t2i_batch=240")
    ),
    "mostly-understanding": Variant(
        "stage 2 with 15 samples of understanding for one of painting", last_overrides=("train.mmu_batch=240", "train.t2i_batch=16")
    ),
}


@dataclasses.dataclass(frozen=True)
class Figure:
    title: str
    unit: str = "%"
    scale: float = 100.0
    """What a value is multiplied with."""
    digits: int = 1


LOSSES = {"mmu": "mmu_loss", "t2i": "t2i_loss"}
"""What the log and what a report calls the last validation losses."""
FIGURES = {
    "caption_exact_match": Figure("name right"),
    "subgroup_accuracy": Figure("subgroup right"),
    "style_accuracy": Figure("style right"),
    "presence_accuracy": Figure("yes/no right"),
    "painted_top1": Figure("painting recognised"),
    "painted_top5": Figure("among first five"),
    LOSSES["mmu"]: Figure("loss of answers", "nats a token", 1.0, 2),
    LOSSES["t2i"]: Figure("loss of images", "nats a token", 1.0, 2),
}
"""Figures of the emoji benchmark and losses on its split, and their columns in the table."""
REPORT, LOG, CHANGES = "report.json", "log.txt", "changes.json"
CUDA_SLOTS, SLOTS = 256, 16
"""Sequences that the scored model runs at once, on a GPU and elsewhere."""


def run_variant(
    recipes: Path,
    name: str,
    seed: int,
    out: Path,
    overrides: Sequence[str],
    *,
    steps: float,
    num_prompts: int,
    limit: int | None,
    device: str,
    kept: Kept | None = None,
) -> None:
    """Trains and scores one variant with one seed, unless that is done; `steps` is a factor on the recipes' steps and warm-ups.

    kept: what it shares with other runs of this process.
    """
    kept = Kept() if kept is None else kept
    variant, folder = VARIANTS[name], out / name / f"seed-{seed}"
    if (folder / REPORT).is_file():
        return
    model: Path | None = None
    for i, recipe in enumerate(variant.recipes):
        file = recipes / f"{recipe}.toml"
        stage = out / first_with_stage(name, i) / f"seed-{seed}" / recipe
        changes = [
            *stage_overrides(variant, i),
            f"train.seed={seed}",
            f"out={stage}",
            *([f"init.model={model}"] if model else []),
            *overrides,
        ]
        planned = read_recipe(file, changes)
        if not planned.train.val_every:
            raise ValueError("train.val_every=0, but the last validation's losses are among the figures; leave it out")
        changes += [f"train.{key}={max(1, round(getattr(planned.train, key) * steps))}" for key in ("steps", "warmup")]
        with locked(stage.with_name(f"{recipe}.lock")):
            model = stage / "model"
            if not is_trained(stage, changes):
                train(file, changes, device=device, kept=kept)
                (stage / CHANGES).write_text(json.dumps(changes), encoding="utf-8")
        free_memory()
    assert model is not None
    split, data = planned.data.val_split, Path(planned.data.folder)
    slots = CUDA_SLOTS if resolve_device(device).type == "cuda" else SLOTS
    scored = OmniMamba.from_pretrained(model, device=device, num_slots=slots)
    logger.info("scoring %s on %s", model, split)
    report = evaluate(scored, data, split=split, limit=limit, num_prompts=num_prompts, seed=0).to_dict()
    report["figures"] |= last_losses(model.parent)
    with whole_file(folder / REPORT) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    del scored
    free_memory()


def last_losses(stage: Path) -> dict[str, dict[str, float]]:
    """The last validation's, as a report has its figures."""
    last = [line for line in read_log(stage / LOG_FILE) if line["kind"] == "val"][-1]
    return {figure: {"value": last[task]} for task, figure in LOSSES.items()}


def stage_overrides(variant: Variant, i: int) -> list[str]:
    """What variant changes in its recipe i."""
    return [*variant.overrides, *(variant.last_overrides if i + 1 == len(variant.recipes) else ())]


def first_with_stage(name: str, i: int) -> str:
    """The first variant whose chain is the same up to recipe i: with one seed they share what they have trained there."""

    def chain(variant: Variant) -> list[tuple[str, list[str]]]:
        return [(recipe, stage_overrides(variant, k)) for k, recipe in enumerate(variant.recipes[: i + 1])]

    return next(other for other, variant in VARIANTS.items() if chain(variant) == chain(VARIANTS[name]))


def is_trained(stage: Path, changes: Sequence[str]) -> bool:
    """Whether the stage is finished, with the same changes to its recipe."""
    file = stage / CHANGES
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == list(changes)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Within, no other process is in the same place; one that ends leaves it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another run, which trains %s", file.with_suffix(""))
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def free_memory() -> None:
    """Gives back what a finished stage held on a GPU: recorded steps lie in cycles of references."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def collect(out: Path) -> dict[str, dict[str, list[float]]]:
    """The figures of all finished runs: variant, figure, one value for each seed."""
    results: dict[str, dict[str, list[float]]] = {}
    for name in VARIANTS:
        reports = [json.loads(path.read_text(encoding="utf-8"))["figures"] for path in sorted((out / name).glob(f"seed-*/{REPORT}"))]
        if reports:
            results[name] = {figure: [report[figure]["value"] for report in reports] for figure in figures_of_all(reports)}
    return results


def figures_of_all(several: Collection[Mapping[str, Any]]) -> list[str]:
    return [figure for figure in FIGURES if several and all(figure in figures for figures in several)]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: a row for each variant, mean and standard deviation over seeds."""
    columns = figures_of_all(results.values())
    titles = [f"{FIGURES[column].title}, {FIGURES[column].unit}" for column in columns]
    lines = [["variant", "what", "seeds", *titles], ["---"] * (3 + len(columns))]
    for name, figures in results.items():
        cells = []
        for figure, values in ((FIGURES[column], figures[column]) for column in columns):
            cells.append(" ± ".join(f"{figure.scale * x:.{figure.digits}f}" for x in mean_and_spread(values)))
        lines.append([name, VARIANTS[name].what, str(len(figures[columns[0]])), *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def plot(results: Mapping[str, Mapping[str, Sequence[float]]], file: Path) -> None:
    """A panel for each figure: the mean of each variant as a bar, its seeds as points."""
    from matplotlib.figure import Figure as MatplotlibFigure

    columns = figures_of_all(results.values())
    width = min(4, len(columns))
    height = math.ceil(len(columns) / width)
    picture = MatplotlibFigure(figsize=(3.2 * width, (0.5 * len(results) + 1.2) * height), layout="constrained")
    panels = picture.subplots(height, width, squeeze=False, sharey=True).flatten()
    places = range(len(results))
    for panel in panels[len(columns) :]:
        panel.set_axis_off()
    for column, panel in zip(columns, panels, strict=False):
        figure = FIGURES[column]
        rows = [[figure.scale * value for value in figures[column]] for figures in results.values()]
        means, spreads = zip(*map(mean_and_spread, rows), strict=True)
        panel.barh(places, means, xerr=spreads, color="lightsteelblue", ecolor="grey", capsize=3)
        for place, row in zip(places, rows, strict=True):
            panel.plot(row, [place] * len(row), "k.", markersize=4)
        panel.set(title=figure.title, xlabel=figure.unit, xlim=(0, None))
        panel.set_yticks(list(places), list(results))
    panels[0].invert_yaxis()
    picture.savefig(file, dpi=120)


def main(
    recipes: Annotated[Path, typer.Argument(help="Folder of the recipes.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to all of them, e.g. data.folder=EMOJI", show_default=False)
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(VARIANTS)}.", show_default=False)] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of each.")] = 3,
    steps: Annotated[float, typer.Option(help="Factor on the recipes' steps: less than 1 for a quick look.")] = 1.0,
    num_prompts: Annotated[int, typer.Option(min=0, help="Captions to paint for the score.")] = 200,
    limit: Annotated[int | None, typer.Option(help="Score on so many drawings only.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs, table.md, results.json and ablations.png.")] = Path("runs/ablations"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each in a process; spread over the GPUs.")] = 1,
) -> None:
    """Run the ablations, and write their table and plot."""
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    logging.getLogger("omnimamba").setLevel(logging.INFO)
    names = list(variant or VARIANTS)
    if unknown := [name for name in names if name not in VARIANTS]:
        raise typer.BadParameter(f"unknown variant {unknown[0]!r}; {nearest_name(unknown[0], VARIANTS)}")
    if not steps > 0:
        raise typer.BadParameter(f"--steps {steps} is not above 0")
    work = functools.partial(
        run_variant, recipes, out=out, overrides=overrides or [], steps=steps, num_prompts=num_prompts, limit=limit, device=device
    )
    runs = [  # seed by seed, so that an interrupted study compares like with like
        Run(f"{name}, seed {seed}", out / name / f"seed-{seed}" / LOG, (name, seed)) for seed in range(seeds) for name in names
    ]
    runs = [run for run in runs if not run.log.with_name(REPORT).is_file()]
    try:
        failed = run_all(runs, work, jobs=jobs, gpus=[] if ":" in device else visible_gpus())
    except Interrupted as stopped:
        logger.error("%s", stopped)
        raise typer.Exit(stopped.exit_code) from None
    finally:
        write_results(out)
    print((out / "table.md").read_text(encoding="utf-8"), end="")
    if failed:
        logger.error("%d of %d runs failed: %s", len(failed), len(runs), "; ".join(run.name for run in failed))
        raise typer.Exit(1)


def write_results(out: Path) -> None:
    results: dict[str, Any] = collect(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(results), encoding="utf-8")
    if results:
        plot(results, out / "ablations.png")


if __name__ == "__main__":
    typer.run(main)
