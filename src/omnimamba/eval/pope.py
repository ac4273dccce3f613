"""POPE: does the model see objects that are not there? (Li et al. 2023, arXiv:2305.10355)

Folder: `coco_pope_random.json`, `coco_pope_popular.json`, `coco_pope_adversarial.json` (JSON lines `{"question_id", "image", "text",
"label"}`) as the authors publish them, and the images in `val2014/`.

An answer is read as LLaVA's `llava/eval/eval_pope.py` reads it: of its first sentence without commas, a word `No`, `no` or `not`
makes it a no, and everything else is a yes. That is generous to answers that are neither, so `unclear` counts these. Figures of each
of the three ways of choosing absent objects; `accuracy` and `f1` are their means over the three, and papers mostly mean `f1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omnimamba.eval.benchmark import SHORT_ANSWER, Benchmark, Question
from omnimamba.eval.files import fields, json_lines, require_files
from omnimamba.eval.scores import Figure, ratio_of_sums, sum_of_ratios, yes_or_no, yes_or_no_parts

SAMPLINGS = ("random", "popular", "adversarial")
FILES_FROM = "https://github.com/RUCAIBox/POPE/tree/main/output/coco"


def read(data: Path, split: str) -> list[Question]:
    files = require_files(data, "POPE", {f"coco_pope_{sampling}.json": FILES_FROM for sampling in SAMPLINGS})
    questions = []
    for sampling, path in zip(SAMPLINGS, files, strict=True):
        for place, record in json_lines(path):
            number, image, text, label = fields(record, place, "question_id", "image", "text", "label")
            if label not in ("yes", "no"):
                raise ValueError(f"{place}: label {label!r}; expected yes or no")
            questions.append(
                Question(f"{sampling}/{number}", data / "val2014" / image, image, text + SHORT_ANSWER, label == "yes", sampling)
            )
    return questions


def says_yes(answer: str) -> bool:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def score(question: Question, answer: str) -> float:
    return float(says_yes(answer) == question.reference)


def figures(questions: Sequence[Question], answers: Sequence[str], seed: int) -> dict[str, Figure]:
    values: dict[str, Figure] = {}
    parts: dict[str, list] = {"accuracy": [], "f1": []}
    for sampling in dict.fromkeys(question.group for question in questions):
        asked = [(question, answer) for question, answer in zip(questions, answers, strict=True) if question.group == sampling]
        images = [question.image_name for question, _ in asked]
        truth, yes = np.array([question.reference for question, _ in asked]), np.array([says_yes(answer) for _, answer in asked])
        ratios = yes_or_no_parts(truth, yes) | {"unclear": ([yes_or_no(answer) is None for _, answer in asked], None)}
        values |= {f"{sampling}_{name}": ratio_of_sums(images, above, below, seed=seed) for name, (above, below) in ratios.items()}
        for name, some in parts.items():
            some.append((images, *ratios[name]))
    return {name: sum_of_ratios(some, scale=1 / len(some), seed=seed) for name, some in parts.items()} | values


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    splits=("coco",),
    read=read,
    images_from="http://images.cocodataset.org/zips/val2014.zip",
    score=score,
    figures=figures,
    protocol=f"question + {SHORT_ANSWER!r}; greedy; answers read as LLaVA's eval_pope.py does; accuracy and f1 are means of three splits",
    paper={"f1": "86.3"},
)
