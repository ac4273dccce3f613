"""GQA: compositional questions about real images (Hudson & Manning 2019, arXiv:1902.09506)

Folder: `testdev_balanced_questions.json` of questions1.2.zip (`{id: {"imageId", "question", "answer", "types"}}`), images in
`images/`.

An answer without closing periods in lower case must equal the reference (LLaVA's `convert_gqa_for_eval.py`, then `eval.py` of GQA).
`open` are questions of the structural type `query`, `binary` all others, as in `eval.py`; also each structural type by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omnimamba.eval.benchmark import SHORT_ANSWER, Benchmark, Question, every, in_group, mean_scores
from omnimamba.eval.files import fields, read_json_file, require_files
from omnimamba.eval.scores import Figure

FILES_FROM = "https://downloads.cs.stanford.edu/nlp/data/gqa/questions1.2.zip"


def read(data: Path, split: str) -> list[Question]:
    (path,) = require_files(data, "GQA", {f"{split}_questions.json": FILES_FROM})
    questions = []
    for number, record in read_json_file(path).items():
        place = f"{path} question {number}"
        image, text, answer, types = fields(record, place, "imageId", "question", "answer", "types")
        (structure,) = fields(types, place, "structural")
        questions.append(Question(number, data / "images" / f"{image}.jpg", str(image), text + SHORT_ANSWER, answer, structure))
    return questions


def score(question: Question, answer: str) -> float:
    return float(answer.rstrip(".").lower() == question.reference)


def figures(questions: Sequence[Question], answers: Sequence[str], seed: int) -> dict[str, Figure]:
    structures = sorted({question.group for question in questions})
    parts = {"accuracy": every, "open": in_group("query"), "binary": in_group(*(name for name in structures if name != "query"))}
    parts |= {name: in_group(name) for name in structures}
    return mean_scores(questions, [score(question, answer) for question, answer in zip(questions, answers, strict=True)], parts, seed)


BENCHMARK = Benchmark(
    name="gqa",
    title="GQA",
    splits=("testdev_balanced", "val_balanced"),
    read=read,
    images_from="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
    score=score,
    figures=figures,
    protocol=f"question + {SHORT_ANSWER!r}; greedy; right if equal to the reference in lower case without closing periods",
    paper={"accuracy": "60.8"},
)
