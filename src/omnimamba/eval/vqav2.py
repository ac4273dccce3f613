"""VQAv2: open questions about COCO images (Goyal et al. 2017, arXiv:1612.00837)

Folder: the files of visualqa.org by their published names. Split `val`: `v2_OpenEndedQuestions_mscoco_val2014_questions.json`,
`v2_mscoco_val2014_annotations.json`, images in `val2014/`; scored here by `vqa_accuracy`. Splits `test-dev` and `test`:
`v2_OpenEndedQuestions_mscoco_test-dev2015_questions.json` (`test2015`), images in `test2015/`; their references are secret, so the
result is `upload.json` for the evaluation server. It holds normalised answers, as LLaVA's `scripts/convert_vqav2_for_submission.py`
writes them, and as there, if the questions of all of test2015 are in the folder, an empty answer to each of those not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnimamba.eval.benchmark import SHORT_ANSWER, Benchmark, Question, every, in_group, mean_scores
from omnimamba.eval.files import fields, read_json_file, require_files
from omnimamba.eval.scores import Figure
from omnimamba.eval.vqa_accuracy import accuracy, normalise

FILES_FROM = "https://visualqa.org/download.html"
IMAGE_SETS = {"test-dev": "test2015", "val": "val2014", "test": "test2015"}
QUESTION_SETS = {"test-dev": "test-dev2015", "val": "val2014", "test": "test2015"}
ANSWER_TYPES = ("yes/no", "number", "other")


def questions_file(split: str) -> str:
    return f"v2_OpenEndedQuestions_mscoco_{QUESTION_SETS[split]}_questions.json"


def read_questions(path: Path) -> list[tuple[int, int, str]]:
    """(question id, image id, text) of each question."""
    (records,) = fields(read_json_file(path), str(path), "questions")
    return [tuple(fields(record, f"{path} question {i}", "question_id", "image_id", "question")) for i, record in enumerate(records)]


def read(data: Path, split: str) -> list[Question]:
    sources = {questions_file(split): FILES_FROM}
    if split == "val":
        sources["v2_mscoco_val2014_annotations.json"] = FILES_FROM
    path, *annotations = require_files(data, "VQAv2", sources)
    references = read_references(annotations[0]) if annotations else {}
    image_set, questions = IMAGE_SETS[split], []
    for number, image, text in read_questions(path):
        reference, kind = None, ""
        if annotations:
            if number not in references:
                raise ValueError(f"{annotations[0]}: no annotation of question {number} of {path.name}; the files belong together")
            reference, kind = references[number]
        file = data / image_set / f"COCO_{image_set}_{image:012}.jpg"
        questions.append(Question(str(number), file, str(image), text + SHORT_ANSWER, reference, kind))
    return questions


def read_references(path: Path) -> dict[int, tuple[list[str], str]]:
    """The answers of ten people and the type of answer, by question id."""
    (records,) = fields(read_json_file(path), str(path), "annotations")
    references = {}
    for i, record in enumerate(records):
        place = f"{path} annotation {i}"
        number, answers, kind = fields(record, place, "question_id", "answers", "answer_type")
        references[number] = ([fields(answer, place, "answer")[0] for answer in answers], kind)
    return references


def score(question: Question, answer: str) -> float | None:
    return None if question.reference is None else accuracy(answer, question.reference)


def figures(questions: Sequence[Question], answers: Sequence[str], seed: int) -> dict[str, Figure]:
    values = [score(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return mean_scores(questions, values, {"accuracy": every, **{kind: in_group(kind) for kind in ANSWER_TYPES}}, seed)


def upload(data: Path, split: str, questions: Sequence[Question], answers: Sequence[str]) -> list[dict[str, Any]] | None:
    """Records (question_id, answer) for the evaluation server."""
    if split == "val":
        return None
    given = {int(question.id): normalise(answer) for question, answer in zip(questions, answers, strict=True)}
    whole = data / questions_file("test")
    numbers = [number for number, _, _ in read_questions(whole)] if whole.is_file() else list(given)
    return [{"question_id": number, "answer": given.get(number, "")} for number in numbers]


BENCHMARK = Benchmark(
    name="vqav2",
    title="VQAv2",
    splits=("test-dev", "val", "test"),
    read=read,
    images_from="http://images.cocodataset.org/zips/val2014.zip or test2015.zip",
    score=score,
    figures=figures,
    protocol=f"question + {SHORT_ANSWER!r}; greedy; VQA accuracy of normalised answers, or upload.json for the evaluation server",
    paper={"accuracy": "77.7 (test)"},
    upload=upload,
)
