"""TextVQA: questions that need reading (Singh et al. 2019, arXiv:1904.08920)

Folder: `TextVQA_0.5.1_val.json`, images in `train_images/`. Split `val` asks as LLaVA 1.5 does, with the words that an OCR system
saw (`TextVQA_Rosetta_OCR_v0.2_val.json`) after the question; split `val-plain` asks the question alone. Scored by `vqa_accuracy`,
as LLaVA's `llava/eval/eval_textvqa.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omnimamba.eval.benchmark import SHORT_ANSWER, Benchmark, Question, every, mean_scores
from omnimamba.eval.files import fields, read_json_file, require_files
from omnimamba.eval.scores import Figure
from omnimamba.eval.vqa_accuracy import accuracy

FILES_FROM = "https://textvqa.org/dataset"
QUESTIONS, OCR = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"


def read(data: Path, split: str) -> list[Question]:
    names = (QUESTIONS, OCR) if split == "val" else (QUESTIONS,)
    path, *ocr = require_files(data, "TextVQA", dict.fromkeys(names, FILES_FROM))
    seen = read_ocr(ocr[0]) if ocr else {}
    (records,) = fields(read_json_file(path), str(path), "data")
    questions = []
    for i, record in enumerate(records):
        number, image, text, answers = fields(record, f"{path} question {i}", "question_id", "image_id", "question", "answers")
        if ocr:
            if image not in seen:
                raise ValueError(f"{ocr[0]}: no words of image {image} of {path.name}; the files belong together")
            text += f"\nReference OCR token: {', '.join(seen[image])}"
        questions.append(Question(str(number), data / "train_images" / f"{image}.jpg", image, text + SHORT_ANSWER, answers))
    return questions


def read_ocr(path: Path) -> dict[str, list[str]]:
    """The words that were seen in each image."""
    (records,) = fields(read_json_file(path), str(path), "data")
    return dict(fields(record, f"{path} image {i}", "image_id", "ocr_tokens") for i, record in enumerate(records))  # type: ignore[misc]


def score(question: Question, answer: str) -> float:
    return accuracy(answer, question.reference)


def figures(questions: Sequence[Question], answers: Sequence[str], seed: int) -> dict[str, Figure]:
    values = [score(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return mean_scores(questions, values, {"accuracy": every}, seed)


BENCHMARK = Benchmark(
    name="textvqa",
    title="TextVQA",
    splits=("val", "val-plain"),
    read=read,
    images_from="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
    score=score,
    figures=figures,
    protocol=f"question (val: + OCR words of the data set) + {SHORT_ANSWER!r}; greedy; VQA accuracy of normalised answers",
)
