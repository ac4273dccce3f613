"""GenEval: does the image hold what the prompt names, in number, colour and place? (Ghosh et al. 2023, arXiv:2310.11513)

Folder: `evaluation_metadata.jsonl` of github.com/djghosh13/geneval, folder `prompts`. The images go where its
`evaluation/evaluate_images.py` looks for them: `00000/metadata.jsonl`, `00000/samples/00000.png` to `00003.png`, and so on, one
folder a prompt. That script needs an object detector of an old environment of its own; of the `results.jsonl` that it writes, `score`
makes the figures of its `summary_scores.py`: the share of right images of each kind of prompt, and `overall`, the mean over the kinds.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.engine.request import require_int
from omnimamba.eval.ask import Progress, Shard, no_progress
from omnimamba.eval.files import claim_folder, fields, json_lines, require_files, write_json
from omnimamba.eval.paint import MODEL_DEFAULTS, Job, PaintSettings, fitted_caption, own_share, paint_missing
from omnimamba.eval.report import Report, model_protocol
from omnimamba.eval.scores import ratio_of_sums, sum_of_ratios

PROMPTS_FILE = "evaluation_metadata.jsonl"
PROMPTS_FROM = "https://github.com/djghosh13/geneval/tree/main/prompts"
NUM_IMAGES = 4


def read_prompts(data: Path) -> list[dict[str, Any]]:
    (path,) = require_files(data, "GenEval", {PROMPTS_FILE: PROMPTS_FROM})
    records = []
    for place, record in json_lines(path):
        fields(record, place, "tag", "prompt")
        records.append(record)
    return records


def paint(
    model: OmniMamba,
    data: Path,
    out: Path,
    *,
    num_images: int = NUM_IMAGES,
    limit: int | None = None,
    painting: PaintSettings = MODEL_DEFAULTS,
    seed: int = 0,
    shard: Shard | None = None,
    progress: Progress = no_progress,
) -> Path:
    """The folder `out/images`, for GenEval's own script. The same call goes on there if it is interrupted.

    Image i of prompt p is painted with the seed `seed + p * num_images + i`. limit: the first prompts only.
    """
    require_int("num_images", num_images, 1)
    require_int("limit", 1 if limit is None else limit, 1)
    require_int("seed", seed, 0)
    prompts, out = read_prompts(Path(data))[:limit], Path(out)
    settings = painting.of(model)
    claim_folder(
        out,
        {
            "benchmark": "geneval",
            "num_images": num_images,
            "generation": {**dataclasses.asdict(settings), "seed": seed},
            **model_protocol(model),
        },
    )
    jobs = []
    for p, record in enumerate(prompts):
        folder = out / "images" / f"{p:05}"
        write_json(folder / "metadata.jsonl", record, indent=None)
        caption = fitted_caption(model.tokenizer, record["prompt"])
        jobs += [Job(caption, seed + p * num_images + i, folder / "samples" / f"{i:05}.png") for i in range(num_images)]
    paint_missing(model, own_share(jobs, shard), settings, progress)
    return out / "images"


def score(results: Path, *, seed: int = 0) -> Report:
    """The figures of the results.jsonl of GenEval's script. seed: of the intervals, which draw prompts."""
    if not results.is_file():
        raise ValueError(f"{results}: no such file; evaluation/evaluate_images.py of {PROMPTS_FROM.partition('/tree')[0]} writes it")
    parts: dict[str, tuple[list[str], list[bool]]] = {}
    right_prompts: dict[str, bool] = {}
    for place, record in json_lines(results):
        tag, correct, metadata = fields(record, place, "tag", "correct", "metadata")
        prompt = metadata if isinstance(metadata, str) else json.dumps(metadata)
        prompts, rights = parts.setdefault(tag, ([], []))
        prompts.append(prompt)
        rights.append(bool(correct))
        right_prompts[prompt] = right_prompts.get(prompt, False) or bool(correct)
    if not parts:
        raise ValueError(f"{results}: no results; run evaluation/evaluate_images.py again")
    figures = {"overall": sum_of_ratios([(*part, None) for part in parts.values()], scale=1 / len(parts), seed=seed)}
    figures |= {tag: ratio_of_sums(*part, seed=seed) for tag, part in parts.items()}
    prompts = [prompt for part, _ in parts.values() for prompt in part]
    figures["images"] = ratio_of_sums(prompts, [right for _, part in parts.values() for right in part], seed=seed)
    figures["prompts"] = ratio_of_sums(list(right_prompts), list(right_prompts.values()), seed=seed)
    protocol = {"benchmark": "geneval", "results": str(results), "protocol": "summary_scores.py of GenEval", "seed": seed}
    return Report(protocol, figures, labels={"images": "right images", "prompts": "prompts with a right image"})
