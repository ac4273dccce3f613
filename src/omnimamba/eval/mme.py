"""MME: two yes/no questions about each image, in ten kinds of perception and four of cognition (Fu et al. 2023, arXiv:2306.13394)

Folder: the release `MME_Benchmark_release_version`: a folder for each kind, in it `NAME.txt` with lines of question, tab, Yes or No,
beside its image, or in `questions_answers_YN/` with the images in `images/`.

Scored as the authors' `eval_tool/calculation.py` does: an answer that is yes or no, or has one of them in its first four letters
(yes first), is that; any other is wrong. Of each kind `acc` is the share of right answers, `acc_plus` that of images with both
answers right, and its score 100 (acc + acc_plus), at most 200; `perception` and `cognition` are the sums over their kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omnimamba.eval.benchmark import SHORT_ANSWER, Benchmark, Question
from omnimamba.eval.scores import Figure, ratio_of_sums, sum_of_ratios

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TOTALS = {"perception": PERCEPTION, "cognition": COGNITION}
FILES_FROM = "https://huggingface.co/datasets/darkyarding/MME, MME_Benchmark_release_version.zip"
THEIR_INSTRUCTION = "Please answer yes or no."
"""Ends every question of the release; LLaVA puts its own in its place."""
IMAGE_SUFFIXES = (".jpg", ".png")


def read(data: Path, split: str) -> list[Question]:
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder; MME is read from MME_Benchmark_release_version (from {FILES_FROM})")
    if lost := [kind for kind in (*PERCEPTION, *COGNITION) if not (data / kind).is_dir()]:
        raise ValueError(f"{data}: MME lacks the folders {', '.join(lost)} (from {FILES_FROM})")
    questions = []
    for kind in (*PERCEPTION, *COGNITION):
        folder = data / kind
        has_subfolders = (folder / "images").is_dir()
        texts = sorted((folder / "questions_answers_YN" if has_subfolders else folder).glob("*.txt"))
        if not texts:
            raise ValueError(f"{folder}: MME lacks the questions, NAME.txt (from {FILES_FROM})")
        for text in texts:
            image = find_image(folder / "images" if has_subfolders else folder, text.stem)
            lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
            for i, line in enumerate(lines):
                question, _, answer = line.strip().partition("\t")
                if len(lines) != 2 or answer not in ("Yes", "No"):
                    raise ValueError(f"{text}: expected two lines of a question, a tab, and Yes or No")
                prompt = question.replace(THEIR_INSTRUCTION, "").strip() + SHORT_ANSWER
                questions.append(Question(f"{kind}/{text.stem}/{i}", image, f"{kind}/{text.stem}", prompt, answer.lower(), kind))
    return questions


def find_image(folder: Path, stem: str) -> Path:
    found = [path for suffix in IMAGE_SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    return found[0] if found else folder / f"{stem}{IMAGE_SUFFIXES[0]}"


def said(answer: str) -> str:
    """`yes`, `no` or `other`."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(question: Question, answer: str) -> float:
    return float(said(answer) == question.reference)


def figures(questions: Sequence[Question], answers: Sequence[str], seed: int) -> dict[str, Figure]:
    values: dict[str, Figure] = {}
    parts = {}
    for kind in dict.fromkeys(question.group for question in questions):
        asked = [(question, answer) for question, answer in zip(questions, answers, strict=True) if question.group == kind]
        images = [question.image_name for question, _ in asked]
        is_right = np.array([score(question, answer) for question, answer in asked])
        _, firsts, image_idx = np.unique(images, return_index=True, return_inverse=True)
        both = np.bincount(image_idx, is_right)[image_idx] == 2
        is_first = np.isin(np.arange(len(images)), firsts)  # an image counts once for acc_plus
        parts[kind] = [(images, is_right, None), (images, both & is_first, is_first)]
        values[kind] = sum_of_ratios(parts[kind], scale=100, seed=seed)
        values[f"{kind}_acc"] = ratio_of_sums(*parts[kind][0], seed=seed)
        values[f"{kind}_acc_plus"] = ratio_of_sums(*parts[kind][1], seed=seed)
    totals = {
        name: sum_of_ratios([part for kind in kinds if kind in parts for part in parts[kind]], scale=100, seed=seed)
        for name, kinds in TOTALS.items()
        if any(kind in parts for kind in kinds)
    }
    return totals | values


BENCHMARK = Benchmark(
    name="mme",
    title="MME",
    splits=("test",),
    read=read,
    images_from=FILES_FROM,
    score=score,
    figures=figures,
    protocol=f"question without {THEIR_INSTRUCTION!r} + {SHORT_ANSWER!r}; greedy; answers read as MME's calculation.py does",
    forms=dict.fromkeys((*TOTALS, *PERCEPTION, *COGNITION), "{:.1f}"),
    paper={"perception": "1290.6"},
)
