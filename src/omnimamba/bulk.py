"""Describing and painting many, from JSON lines to JSON lines, resumable, here or on a Ray cluster (see `data.shards`)."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omnimamba.config import preset
from omnimamba.data.shards import OnProgress, Work, digest, join_lines, run_here, run_on_ray
from omnimamba.engine.omnimamba import DEFAULT_QUESTION, OmniMamba, resolve_device
from omnimamba.model import weights
from omnimamba.model.files import whole_file
from omnimamba.model.vq import VQModel
from omnimamba.processor.image import load_image
from omnimamba.train.frozen import load_frozen

logger = logging.getLogger("omnimamba.bulk")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model that each worker loads for itself."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None

    def load(self) -> OmniMamba:
        return OmniMamba.from_pretrained(self.model, device=self.device, dtype=self.dtype, quantize=self.quantize)

    def plan(self) -> dict[str, Any]:
        """What its results depend on: the fingerprint of the weights, not where they lie."""
        return {"model": weights.load(self.model).fingerprint, "quantize": self.quantize}


def load_vq(model: str, file: Path | None, preset_name: str, device: str) -> VQModel:
    """The VQ tokenizer of a model, or that of a preset with the weights of a file. ValueError if the model has none."""
    if file is not None:
        return load_frozen(VQModel(preset(preset_name).vq), str(file), resolve_device(device))
    vq = weights.load(model, device=resolve_device(device)).vq
    if vq is None:
        raise ValueError(f"{model} was saved without its VQ tokenizer; name a file of one with --vq")
    return vq


def runner(on_ray: bool, num_workers: int, gpus_per_worker: float) -> Callable[..., None]:
    """How shards are computed."""
    return functools.partial(run_on_ray, num_workers=num_workers, gpus_per_worker=gpus_per_worker) if on_ray else run_here


def read_jobs(path: Path, key: str, **optional: type) -> list[dict[str, Any]]:
    """JSON lines that have a text at `key`, and where they have one of `optional`, a value of its type. ValueError names the line."""
    jobs = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            job = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {i}: not JSON ({error})") from None
        if not isinstance(job, dict) or not isinstance(job.get(key), str) or not job[key].strip():
            raise ValueError(f'{path} line {i}: expected an object with a text "{key}"')
        for name, kind in optional.items():
            if name in job and (type(job[name]) is not kind or job[name] == ""):
                raise ValueError(f"{path} line {i}: {name}={job[name]!r} is no {name}; correct it, or leave it out")
        jobs.append(job)
    if not jobs:
        raise ValueError(f"{path}: no line in it")
    return jobs


def chunks(items: range, size: int) -> Iterator[range]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def write_lines(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---- describing


class DescribeWorker:
    """Writes jobs with an `answer`, or with an `error` where the image cannot be read."""

    def __init__(
        self, jobs: list[dict[str, Any]], source: ModelSource, images: Path, question: str | None, batch: int, settings: dict[str, Any]
    ) -> None:
        self.jobs, self.images, self.batch, self.settings = jobs, images, batch, settings
        self.question = DEFAULT_QUESTION if question is None else question
        self.model = source.load()

    def __call__(self, items: range, file: Path) -> None:
        rows = []
        for idx in chunks(items, self.batch):
            some, images, questions = [dict(self.jobs[i]) for i in idx], [], []
            for row in some:
                for key in ("answer", "error"):  # the jobs may be the result of an earlier run
                    row.pop(key, None)
                try:
                    images.append(load_image(self.images / row["image"]))
                except (OSError, ValueError) as error:
                    row["error"] = str(error)
                else:
                    questions.append(row.get("question", self.question))
            answers = iter(self.model.describe(images, questions, **self.settings) if images else ())
            for row in some:
                if "error" not in row:
                    row["answer"] = next(answers)
            rows += some
        write_lines(file, rows)


def describe(
    jobs_file: Path,
    out: Path,
    source: ModelSource,
    *,
    images: Path,
    question: str | None = None,
    max_new_tokens: int = 64,
    past_last_position: str = "error",
    batch: int = 32,
    shard_size: int = 256,
    max_broken: int = 0,
    run: Callable[..., None] = run_here,
    on_progress: OnProgress | None = None,
) -> tuple[int, int]:
    """Greedy answers about the image of each line, in `out`; returns the number of lines and of those whose image is broken."""
    jobs = read_jobs(jobs_file, "image", question=str)
    settings = {"max_new_tokens": max_new_tokens, "past_last_position": past_last_position}
    work = Work(
        out, len(jobs), shard_size, {"jobs": digest(jobs), "images": str(images), "question": question, **settings, **source.plan()}
    )
    work.start()
    run(work, functools.partial(DescribeWorker, jobs, source, images, question, batch, settings), on_progress)
    rows = [json.loads(line) for file in work.files for line in file.read_text(encoding="utf-8").splitlines()]
    broken = [row for row in rows if "error" in row]
    if len(broken) > max_broken:
        raise ValueError(
            f"{len(broken)} images cannot be read, more than the limit of {max_broken}, e.g. {broken[0]['image']}: {broken[0]['error']}; "
            f"raise the limit to accept that, or delete {work.folder} when they are repaired"
        )
    for row in broken:
        logger.warning("image %s has no answer: %s", row["image"], row["error"])
    work.finish(join_lines)
    return len(rows), len(broken)


# ---- painting


class GenerateWorker:
    """Paints the prompts of jobs to PNG files, and writes the jobs with their `seed` and `files`."""

    def __init__(
        self,
        jobs: list[dict[str, Any]],
        source: ModelSource,
        images: Path,
        num_images: int,
        seed: int,
        batch: int,
        sampling: dict[str, Any],
    ) -> None:
        self.jobs, self.images, self.num_images, self.seed, self.batch, self.sampling = jobs, images, num_images, seed, batch, sampling
        self.model = source.load()

    def __call__(self, items: range, file: Path) -> None:
        rows = []
        for idx in chunks(items, self.batch):
            some = [{"seed": self.seed + i, **self.jobs[i]} for i in idx]
            prompts, seeds = [row["prompt"] for row in some], [row["seed"] for row in some]
            painted = iter(self.model.generate_image(prompts, num_images=self.num_images, seed=seeds, **self.sampling))
            for i, row in zip(idx, some, strict=True):
                row["files"] = [str(self.images / f"{i:08d}-{k}.png") for k in range(self.num_images)]
                for name in row["files"]:
                    with whole_file(Path(name)) as partial:
                        next(painted).save(partial)
            rows += some
        write_lines(file, rows)


def generate(
    jobs_file: Path,
    out: Path,
    source: ModelSource,
    *,
    images: Path,
    num_images: int = 1,
    sampling: dict[str, Any],
    seed: int = 0,
    batch: int = 32,
    shard_size: int = 256,
    run: Callable[..., None] = run_here,
    on_progress: OnProgress | None = None,
) -> int:
    """Images of the prompt of each line, in the folder `images`, and the lines with their files in `out`; returns their number."""
    jobs = read_jobs(jobs_file, "prompt", seed=int)
    settings = {"num_images": num_images, "seed": seed, "sampling": sampling}
    work = Work(out, len(jobs), shard_size, {"jobs": digest(jobs), "images": str(images), **settings, **source.plan()})
    work.start()
    run(work, functools.partial(GenerateWorker, jobs, source, images, num_images, seed, batch, sampling), on_progress)
    work.finish(join_lines)
    return len(jobs)
