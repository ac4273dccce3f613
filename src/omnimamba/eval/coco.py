"""Text to image on MS-COCO: FID of images painted from captions of val2014 (FID-30K), and their CLIP score.

Folder: `annotations/captions_val2014.json` of annotations_trainval2014.zip, and the images in `val2014/`.

The usual protocol since DALL-E (Ramesh et al. 2021, arXiv:2102.12092, section 3): 30,000 captions drawn at random, here one of each
of 30,000 images drawn without replacement; against all 40,504 images of val2014, of each the central square; both at 256 x 256.
Papers differ in the reference images, their resize and the number: compare FIDs of one protocol only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.engine.request import require_int
from omnimamba.eval.ask import Progress, Shard, no_progress
from omnimamba.eval.clip_score import ClipScorer
from omnimamba.eval.fid import FeatureCounter, FeatureStatistics, frechet_distance
from omnimamba.eval.files import claim_folder, fields, read_ahead, read_json_file, require_files, require_images, write_json
from omnimamba.eval.inception import Inception
from omnimamba.eval.paint import MODEL_DEFAULTS, Job, PaintSettings, fitted_caption, own_share, paint_missing
from omnimamba.eval.report import Report, model_protocol
from omnimamba.eval.scores import Figure, ratio_of_sums
from omnimamba.processor.image import center_square, load_image

NUM_CAPTIONS = 30_000
SIDE = 256
BATCH = 50
"""Images that pass Inception or CLIP at once."""
CAPTIONS_FILE = "annotations/captions_val2014.json"
CAPTIONS_FROM = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
IMAGES_FROM = "http://images.cocodataset.org/zips/val2014.zip"


@dataclasses.dataclass(frozen=True)
class Caption:
    image: str
    """File name."""
    text: str


def read_captions(data: Path) -> tuple[list[str], list[Caption]]:
    """(file names of all images, all captions), in the file's order."""
    (path,) = require_files(data, "MS-COCO", {CAPTIONS_FILE: CAPTIONS_FROM})
    images, annotations = fields(read_json_file(path), str(path), "images", "annotations")
    names = dict(fields(image, f"{path} image {i}", "id", "file_name") for i, image in enumerate(images))  # type: ignore[misc]
    captions = []
    for i, annotation in enumerate(annotations):
        image, text = fields(annotation, f"{path} annotation {i}", "image_id", "caption")
        if image not in names:
            raise ValueError(f"{path} annotation {i}: image {image} is not in the file; fetch it again")
        captions.append(Caption(names[image], text.strip()))
    return list(names.values()), captions


def draw_captions(captions: Sequence[Caption], num: int, seed: int) -> list[Caption]:
    """One caption of each of `num` images, both drawn at random."""
    of_image: dict[str, list[Caption]] = {}
    for caption in captions:
        of_image.setdefault(caption.image, []).append(caption)
    if num > len(of_image):
        raise ValueError(f"num_captions={num} exceeds the {len(of_image)} images with captions; pass at most that")
    rng, names = np.random.default_rng(seed), sorted(of_image)
    images = [names[i] for i in rng.permutation(len(names))[:num]]
    return [of_image[image][rng.integers(len(of_image[image]))] for image in images]


def evaluate(
    model: OmniMamba,
    data: Path,
    out: Path,
    *,
    num_captions: int = NUM_CAPTIONS,
    painting: PaintSettings = MODEL_DEFAULTS,
    seed: int = 0,
    shard: Shard | None = None,
    inception: Path | None = None,
    resize: str = "tensorflow",
    reference: Path | None = None,
    clip: str | None = None,
    progress: Progress = no_progress,
) -> Report | None:
    """FID, and with `clip` the CLIP score; None for a shard, which only paints: a call without one then finds its images.

    out: a folder for `painted/` and `captions.jsonl`; the same call goes on there if it is interrupted. Caption i is painted with the
    seed `seed + i`. inception: torch-fidelity's weights. reference: an .npz file of
    the statistics of the reference images, made of val2014 if it is not there; `out/reference-RESIZE.npz` unless given.
    """
    require_int("num_captions", num_captions, 2)
    require_int("seed", seed, 0)
    data, out = Path(data), Path(out)
    reference = reference or out / f"reference-{resize}.npz"
    names, captions = read_captions(data)
    if not reference.is_file():
        require_images(data, "MS-COCO", [data / "val2014" / name for name in names], IMAGES_FROM)
    network = None if shard else Inception(inception, resize=resize, device=model.device)
    scorer = ClipScorer(clip, device=model.device) if clip and not shard else None
    settings = painting.of(model)
    run: dict[str, Any] = {
        "benchmark": "coco",
        "num_captions": num_captions,
        "generation": {**dataclasses.asdict(settings), "seed": seed},
        **model_protocol(model),
    }
    claim_folder(out, run)
    drawn = draw_captions(captions, num_captions, seed)
    fitted = [fitted_caption(model.tokenizer, caption.text) for caption in drawn]
    jobs = [Job(text, seed + i, out / "painted" / f"{i:05}.png") for i, text in enumerate(fitted)]
    lines = [
        {"file": f"painted/{job.file.name}", "image": caption.image, "caption": caption.text, "seed": job.seed}
        for job, caption in zip(jobs, drawn, strict=True)
    ]
    (out / "captions.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    paint_missing(model, own_share(jobs, shard), settings, progress)
    if network is None:
        return None

    if not reference.is_file():
        statistics(network, [data / "val2014" / name for name in names], "reference", progress).save(reference)
    real = FeatureStatistics.load(reference)
    files = [job.file for job in jobs]
    figures = {"fid": Figure(frechet_distance(statistics(network, files, "inception", progress), real), None, None, num_captions)}
    if scorer is not None:
        figures["clip_score"] = clip_figure(scorer, files, [caption.text for caption in drawn], seed, progress)
    protocol = run | {
        "data": str(data),
        "num_captions_cut": sum(text != " ".join(caption.text.split()) for text, caption in zip(fitted, drawn, strict=True)),
        "image_pixels": f"painted {model.config.vq.image_size}, compared {SIDE}",
        "reference": str(reference),
        "num_reference_images": real.num or "not said in the file",
        "inception": f"torch-fidelity, resize {resize}",
        "clip": clip,
    }
    report = Report(protocol, figures, forms={"fid": "{:.2f}", "clip_score": "{:.2f}"}, paper={"fid": "5.50"})
    write_json(out / "report.json", report.to_dict())
    return report


def square_image(file: Path) -> Image.Image:
    """The central square of an image file at SIDE pixels; an image that is SIDE x SIDE stays as it is."""
    image = load_image(file)
    return image if image.size == (SIDE, SIDE) else center_square(image, SIDE)


def statistics(network: Inception, files: Sequence[Path], stage: str, progress: Progress) -> FeatureStatistics:
    counter = FeatureCounter()
    progress(stage, 0, len(files))
    for images in read_ahead(files, square_image, BATCH):
        counter.add(network.features(images))
        progress(stage, counter.num, len(files))
    return counter.statistics()


def clip_figure(scorer: ClipScorer, files: Sequence[Path], captions: Sequence[str], seed: int, progress: Progress) -> Figure:
    values: list[float] = []
    for images in read_ahead(files, load_image, BATCH):
        values += scorer.scores(images, captions[len(values) : len(values) + len(images)]).tolist()
        progress("clip", len(values), len(files))
    return ratio_of_sums([str(file) for file in files], values, seed=seed)
