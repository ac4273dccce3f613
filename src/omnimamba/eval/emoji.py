"""The emoji benchmark: questions about drawings, their reconstruction, and paintings of their names, judged by retrieval.

It reads a folder in the format of the emoji data set: `{split}-*.parquet` (drawings), `understanding-{split}.jsonl[.gz]` (one
question and answer a line) and `t2i-{split}.jsonl[.gz]` (captions; the first one of a drawing is its bare name).

Answers are greedy. Texts are compared normalised (`scores.normalise`: case, quotes, dashes and outer punctuation do not count).

    caption_exact_match    the answer to the `name` question is the drawing's caption
    base_caption_match     the same with the skin tone taken out of both
    caption_word_f1        keyword overlap: F1 of the answer's words and the caption's words, mean over drawings
    keyword_recall         of the data's keywords that the reference description names, the share that the model's description names
    style_, group_, subgroup_accuracy
    presence_*             yes/no questions in the manner of POPE (arXiv:2305.10355), yes is positive: accuracy, precision, recall, f1,
                           yes_ratio (share of answers that are yes), unclear (share that are neither; always wrong, never a yes); also
                           over the questions of one `sampling`: presence_random_*, presence_adversarial_*
    vq_psnr                drawings through the VQ tokenizer and back, dB per image at the model's image size in 8 bit, mean
    painted_top1, _top5    one painting of each caption: its caption is the judge's first, or among its first five, of all captions
    real_top1, _top5       the same of the drawings that bear these captions
    top1_ratio, top5_ratio painted / real
    painted_similarity, real_similarity   the judge's cosine of picture and caption, mean

The captions to paint are those of `choose_prompts`; caption i is painted with the seed `seed + i`. The interval of each figure is a
95 % bootstrap over images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from omnimamba.engine.omnimamba import GenerationDefaults, OmniMamba
from omnimamba.engine.request import require_int
from omnimamba.eval import scores
from omnimamba.eval.ask import Progress, answer_in_batches, no_progress
from omnimamba.eval.emoji_set import SAMPLINGS, Drawing, Question, check_files, choose_prompts, read_captions, read_drawings, read_questions
from omnimamba.eval.grid import draw_grid
from omnimamba.eval.judge import Judge
from omnimamba.eval.paint import MODEL_DEFAULTS, PaintSettings, paint_in_batches
from omnimamba.eval.report import Report, model_protocol
from omnimamba.eval.scores import Figure, ratio_of_sums, yes_or_no_parts
from omnimamba.processor.image import center_square, vq_pixels

MAX_ANSWER_TOKENS = 128
RECONSTRUCTION_BATCH = 16
GRID_PICTURES = 24

SCORED = {
    "name": "caption_exact_match",
    "style": "style_accuracy",
    "group": "group_accuracy",
    "subgroup": "subgroup_accuracy",
    "description": "keyword_recall",
}
"""The figure that is the mean of `score` over the questions of a kind."""

PRESENCE = {"presence": SAMPLINGS, **{f"presence_{sampling}": (sampling,) for sampling in SAMPLINGS}}
"""Which yes/no questions the figures of a name are over."""

LABELS = {
    "caption_exact_match": "caption, exact match",
    "base_caption_match": "caption without skin tone",
    "caption_word_f1": "caption, keyword overlap (word F1)",
    "keyword_recall": "keywords in the description",
    "style_accuracy": "style",
    "group_accuracy": "group",
    "subgroup_accuracy": "subgroup",
    **{
        f"{key}_{name}": f"{key.replace('presence', 'yes/no').replace('_', ' ')}, {label}"
        for key in PRESENCE
        for name, label in {
            "accuracy": "accuracy",
            "precision": "precision",
            "recall": "recall",
            "f1": "F1",
            "yes_ratio": "yes ratio",
            "unclear": "neither yes nor no",
        }.items()
    },
    "vq_psnr": "VQ reconstruction PSNR (dB)",
    "painted_top1": "painted, caption retrieved first",
    "painted_top5": "painted, caption in the first 5",
    "real_top1": "real, caption retrieved first",
    "real_top5": "real, caption in the first 5",
    "top1_ratio": "painted / real, first",
    "top5_ratio": "painted / real, first 5",
    "painted_similarity": "painted, similarity to the caption",
    "real_similarity": "real, similarity to the caption",
}
"""What each figure is called in the table; their order there."""

NOT_A_SHARE = {"vq_psnr": "{:.2f}", "painted_similarity": "{:.3f}", "real_similarity": "{:.3f}"}
"""How the figures are written that are no percentages."""


@dataclasses.dataclass(frozen=True)
class Painting:
    """One painted caption, beside the drawing that bears it."""

    drawing: Drawing
    caption: str
    seed: int
    image: Image.Image


def evaluate(
    model: OmniMamba,
    data: Path,
    *,
    split: str = "val",
    limit: int | None = None,
    num_prompts: int = 200,
    painting: PaintSettings = MODEL_DEFAULTS,
    seed: int = 0,
    out: Path | None = None,
    judge: Path | None = None,
    progress: Progress = no_progress,
) -> Report:
    """The figures of `model` on a split of the emoji data set in `data`; the same call gives the same figures.

    limit: questions and reconstruction of the split's first drawings only. num_prompts: captions to paint, of the whole split; 0
    skips generation. out: a folder for `report.html` with `grid.png` and
    `confusion.png`, `answers.jsonl`, `paintings.jsonl` and `painted/`. judge: a folder of `judge.FILES`, the model's own unless given.
    """
    require_int("limit", 1 if limit is None else limit, 1)
    require_int("num_prompts", num_prompts, 0)
    require_int("seed", seed, 0)
    data = Path(data)
    settings = painting.of(model)

    check_files(data, split)
    drawings = read_drawings(data, split)
    shown = dict(list(drawings.items())[:limit])
    questions = [question for question in read_questions(data, split, drawings) if question.image in shown]
    protocol: dict[str, Any] = {
        "benchmark": "emoji",
        "data": str(data),
        "split": split,
        "limit": limit,
        "num_drawings": len(shown),
        "num_questions": len(questions),
        "num_prompts": 0,
        **model_protocol(model),
        "device": model.device.type,
        "answers": {"temperature": 0.0, "max_new_tokens": MAX_ANSWER_TOKENS},
        "interval": {"confidence": scores.CONFIDENCE / 100, "num_resamples": scores.NUM_RESAMPLES, "seed": seed},
    }
    if out is not None:
        import matplotlib  # noqa: F401  (the report needs it; if it is not installed, that is better known now than at the end)
    figures: dict[str, Figure] = {}
    if num_prompts:
        referee = Judge.load(_judge_folder(model, judge), model.device)
        prompts = choose_prompts(drawings, read_captions(data, split, drawings), num_prompts)
        protocol |= {
            "num_prompts": len(prompts),
            "generation": {**dataclasses.asdict(settings), "seed": seed},
            "judge": referee.fingerprint,
        }
        paintings = paint(model, prompts, settings, seed, progress)
        figures, places = judge_paintings(referee, paintings, seed, progress)
        if out is not None:
            write_paintings(Path(out), paintings, places)
    figures["vq_psnr"] = reconstruct(model, list(shown.values()), seed, progress)
    answers = ask(model, shown, questions, progress)
    figures |= answer_figures(drawings, questions, answers, seed)
    report = Report(protocol, {key: figures[key] for key in LABELS if key in figures}, LABELS, NOT_A_SHARE)
    if out is not None:
        from omnimamba.eval.emoji_report import write_report

        write_answers(Path(out), drawings, questions, answers)
        write_report(Path(out), report, questions, answers, has_grid=num_prompts > 0)
    return report


def _judge_folder(model: OmniMamba, judge: Path | None) -> Path:
    if judge is not None:
        return Path(judge)
    if model.bundle.tokenizer_file is None:
        raise ValueError("this model is in no folder, so it has no judge of its own; name a judge folder, or pass num_prompts=0")
    return Path(model.bundle.tokenizer_file).parent


# ---- running the model


def paint(
    model: OmniMamba, prompts: Sequence[tuple[Drawing, str]], settings: GenerationDefaults, seed: int, progress: Progress
) -> list[Painting]:
    """A painting of each prompt, each with a seed of its own: one seed for all would draw them with the same noise."""
    captions, seeds = [caption for _, caption in prompts], [seed + i for i in range(len(prompts))]
    images: list[Image.Image] = []
    progress("painting", 0, len(prompts))
    for batch in paint_in_batches(model, captions, seeds, settings):
        images += batch
        progress("painting", len(images), len(prompts))
    return [Painting(*prompt, own_seed, image) for prompt, own_seed, image in zip(prompts, seeds, images, strict=True)]


@torch.no_grad()
def reconstruct(model: OmniMamba, drawings: Sequence[Drawing], seed: int, progress: Progress) -> Figure:
    """Mean PSNR of the drawings through the VQ tokenizer and back."""
    size, values = model.config.vq.image_size, []
    for start in range(0, len(drawings), RECONSTRUCTION_BATCH):
        progress("reconstruction", start, len(drawings))
        originals = [center_square(drawing.image(), size) for drawing in drawings[start : start + RECONSTRUCTION_BATCH]]
        codes = model.vq.encode(torch.stack([vq_pixels(image, size) for image in originals]).to(model.device)).ids
        painted = model.paint(codes.flatten(1).tolist())
        values += [scores.psnr(np.asarray(image), np.asarray(original)) for image, original in zip(painted, originals, strict=True)]
    progress("reconstruction", len(drawings), len(drawings))
    return ratio_of_sums([drawing.id for drawing in drawings], values, seed=seed)


def ask(model: OmniMamba, drawings: dict[str, Drawing], questions: Sequence[Question], progress: Progress) -> list[str]:
    """The model's answer to each question."""
    answers = [""] * len(questions)
    done = 0
    progress("questions", done, len(questions))
    files = {name: drawing.file for name, drawing in drawings.items()}
    asked = [(question.image, question.text) for question in questions]
    for batch in answer_in_batches(model, files, asked, max_new_tokens=MAX_ANSWER_TOKENS):
        for i, answer in batch.items():
            answers[i] = answer
        done += len(batch)
        progress("questions", done, len(questions))
    return answers


# ---- figures


def base_caption(caption: str) -> str:
    """The normalised caption without skin tones, as CLDR writes them: `woman: dark skin tone, red hair` is a `woman: red hair`."""
    name, _, details = scores.normalise(caption).partition(": ")
    kept = [detail for detail in details.split(", ") if detail and not detail.endswith("skin tone")]
    return f"{name}: {', '.join(kept)}" if kept else name


def score(drawing: Drawing, question: Question, answer: str) -> float | None:
    """1 for a right answer and 0 for a wrong one; of a description the share of keywords, None if there is none to name."""
    if question.kind == "name":
        return float(scores.is_match(answer, drawing.caption))
    if question.kind == "presence":
        return float(scores.yes_or_no(answer) == scores.yes_or_no(question.reference))
    if question.kind == "description":
        keywords = [keyword for keyword in drawing.keywords if scores.mentions(question.reference, keyword)]
        return sum(scores.mentions(answer, keyword) for keyword in keywords) / len(keywords) if keywords else None
    return float(scores.is_match(answer, question.reference))


def answer_figures(drawings: dict[str, Drawing], questions: Sequence[Question], answers: Sequence[str], seed: int) -> dict[str, Figure]:
    asked = list(zip(questions, answers, strict=True))
    figures = {}
    for kind, key in SCORED.items():
        some = [(question.image, score(drawings[question.image], question, answer)) for question, answer in asked if question.kind == kind]
        if some:
            images, values = zip(*some, strict=True)
            figures[key] = ratio_of_sums(images, [value or 0.0 for value in values], [value is not None for value in values], seed=seed)
    if named := [(drawings[question.image], answer) for question, answer in asked if question.kind == "name"]:
        images = [drawing.id for drawing, _ in named]
        base_matches = [base_caption(answer) == scores.normalise(drawing.base_caption) for drawing, answer in named]
        figures["base_caption_match"] = ratio_of_sums(images, base_matches, seed=seed)
        figures["caption_word_f1"] = ratio_of_sums(
            images, [scores.word_f1(answer, drawing.caption) for drawing, answer in named], seed=seed
        )
    presence = [(question, answer) for question, answer in asked if question.kind == "presence"]
    for key, samplings in PRESENCE.items():
        if some := [(question, answer) for question, answer in presence if question.sampling in samplings]:
            figures |= {f"{key}_{name}": figure for name, figure in presence_figures(some, seed).items()}
    return figures


def presence_figures(asked: Sequence[tuple[Question, str]], seed: int) -> dict[str, Figure]:
    """POPE's figures, yes is positive. An unclear answer is no yes: it misses a true yes, and to a true no it is wrong all the same."""
    truth = np.array([scores.yes_or_no(question.reference) is True for question, _ in asked])
    said = [scores.yes_or_no(answer) for _, answer in asked]
    yes, unclear = (np.array([value is which for value in said]) for which in (True, None))
    ratios = yes_or_no_parts(truth, yes) | {"accuracy": ((yes == truth) & ~unclear, None), "unclear": (unclear, None)}
    images = [question.image for question, _ in asked]
    return {name: ratio_of_sums(images, above, below, seed=seed) for name, (above, below) in ratios.items()}


def judge_paintings(
    judge: Judge, paintings: Sequence[Painting], seed: int, progress: Progress
) -> tuple[dict[str, Figure], dict[str, np.ndarray]]:
    """The judge's figures, and the places of the captions of the `painted` and the `real` pictures, 1 is best."""
    progress("judging", 0, 2 * len(paintings))
    captions, images = [painting.caption for painting in paintings], [painting.drawing.id for painting in paintings]
    pictures = {"painted": [painting.image for painting in paintings], "real": [painting.drawing.image() for painting in paintings]}
    cosines = {name: judge.similarities(some, captions).numpy() for name, some in pictures.items()}
    places = {name: scores.ranks(cosine, np.arange(len(captions))) for name, cosine in cosines.items()}
    figures = {}
    for top in (1, 5):
        hits = {name: place <= top for name, place in places.items()}
        figures |= {f"{name}_top{top}": ratio_of_sums(images, hit, seed=seed) for name, hit in hits.items()}
        figures[f"top{top}_ratio"] = ratio_of_sums(images, hits["painted"], hits["real"], seed=seed)
    figures |= {f"{name}_similarity": ratio_of_sums(images, cosine.diagonal(), seed=seed) for name, cosine in cosines.items()}
    progress("judging", 2 * len(paintings), 2 * len(paintings))
    return figures, places


# ---- writing


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_answers(out: Path, drawings: dict[str, Drawing], questions: Sequence[Question], answers: Sequence[str]) -> None:
    """`answers.jsonl`: every question with its answer and score."""
    rows = [
        {**dataclasses.asdict(question), "answer": answer, "score": score(drawings[question.image], question, answer)}
        for question, answer in zip(questions, answers, strict=True)
    ]
    write_lines(out / "answers.jsonl", rows)


def write_paintings(out: Path, paintings: Sequence[Painting], places: dict[str, np.ndarray]) -> None:
    """`painted/N.png`, `paintings.jsonl` with the judge's places, and `grid.png` of the first ones."""
    (out / "painted").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, painting in enumerate(paintings):
        file = f"painted/{i:03}.png"
        painting.image.save(out / file)
        place, real_place = int(places["painted"][i]), int(places["real"][i])
        row = {"file": file, "image": painting.drawing.id, "caption": painting.caption, "seed": painting.seed}
        rows.append({**row, "place": place, "real_place": real_place})
    write_lines(out / "paintings.jsonl", rows)
    cells = [(painting.drawing.image(), painting.image, painting.caption) for painting in paintings[:GRID_PICTURES]]
    draw_grid(cells).save(out / "grid.png")
