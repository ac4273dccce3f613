"""Painting many captions: in batches, each with a seed of its own, into files of which a later call paints only what is missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from omnimamba.engine.omnimamba import GenerationDefaults, OmniMamba
from omnimamba.eval.ask import Progress, Shard
from omnimamba.model.files import whole_file
from omnimamba.processor.tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class PaintSettings:
    """How images are drawn; None is the model's default."""

    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def of(self, model: OmniMamba) -> GenerationDefaults:
        """The model's defaults with what is given in their place."""
        return dataclasses.replace(model.defaults, **{name: value for name, value in vars(self).items() if value is not None})


MODEL_DEFAULTS = PaintSettings()


@dataclasses.dataclass(frozen=True)
class Job:
    caption: str
    seed: int
    file: Path


def paint_in_batches(
    model: OmniMamba, captions: Sequence[str], seeds: Sequence[int], settings: GenerationDefaults
) -> Iterator[list[Image.Image]]:
    """Images of the captions in order, as many at once as the model has slots for."""
    at_once = max(1, model.num_slots // (1 if settings.guidance_scale == 1 else 2))
    for start in range(0, len(captions), at_once):
        some = slice(start, start + at_once)
        yield model.generate_image(captions[some], seed=seeds[some], **dataclasses.asdict(settings))


def paint_missing(model: OmniMamba, jobs: Sequence[Job], settings: GenerationDefaults, progress: Progress) -> None:
    """Paints the jobs whose files are not there. A file appears whole or not at all."""
    left = [job for job in jobs if not job.file.is_file()]
    done = len(jobs) - len(left)
    progress("painting", done, len(jobs))
    waiting = iter(left)
    for images in paint_in_batches(model, [job.caption for job in left], [job.seed for job in left], settings):
        for image, job in zip(images, waiting):  # noqa: B905  (the iterator goes on with the next batch)
            save(image, job.file)
        done += len(images)
        progress("painting", done, len(jobs))


def save(image: Image.Image, file: Path) -> None:
    with whole_file(file) as partial:
        image.save(partial)


def own_share(jobs: Sequence[Job], shard: Shard | None) -> Sequence[Job]:
    return jobs if shard is None else jobs[shard.i - 1 :: shard.n]


def fitted_caption(tok: TextTokenizer, caption: str) -> str:
    """The caption, without as many of its last words as it takes to fit the prompt."""
    words = caption.split()
    while len(words) > 1 and len(tok.encode(" ".join(words))) > tok.config.max_caption_tokens:
        words.pop()
    return " ".join(words)
