"""MMMU: college exam questions of 30 subjects (Yue et al. 2024, arXiv:2311.16502)

Folder: that of huggingface.co/datasets/MMMU/MMMU: a folder for each subject with `validation-*.parquet` and `dev-*.parquet`.

Prompts are those of the authors' configuration for LLaVA 1.5 (`mmmu/configs/llava1.5.yaml`), and as in their `run_llava.py` the
model sees the first image of a question; `num_images` of an answer says of how many. Answers are read as their
`utils/eval_utils.py` does: the option that is named by its letter or, in a longer answer, by its text; an open answer is right if
one of the phrases and numbers at its end is the reference. An answer that names no option counts as a guess there, drawn at random;
here the guess depends on nothing but the question, and `guessed` is the share of them.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnimamba.data.images import parquet_files, read_rows
from omnimamba.eval.benchmark import SHORT_ANSWER, Benchmark, Question, every, in_group, mean_scores
from omnimamba.eval.scores import Figure

FILES_FROM = "https://huggingface.co/datasets/MMMU/MMMU"
BY_LETTER = "\nAnswer with the option's letter from the given choices directly."
MAX_IMAGES = 7
DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
COLUMNS = ("id", "question", "options", "answer", "question_type", *(f"image_{i}" for i in range(1, MAX_IMAGES + 1)))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OUTER_MARKS = ",.!?;:'"
CONCLUSIONS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What may stand before the answer in a sentence; in the last one `=`, too."""
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 12, 1.2, .2
)


def read(data: Path, split: str) -> list[Question]:
    subjects = [subject for some in DISCIPLINES.values() for subject in some]
    if not data.is_dir():
        raise ValueError(f"{data}: no such folder; MMMU is read from a folder of its 30 subjects (from {FILES_FROM})")
    if lost := [subject for subject in subjects if not list((data / subject).glob(f"{split}-*.parquet"))]:
        names = ", ".join(f"{subject}/{split}-*.parquet" for subject in lost)
        raise ValueError(f"{data}: MMMU lacks {names} (from {FILES_FROM})")
    return [
        question(row, subject, f"{file} row {i}")
        for subject in subjects
        for file in parquet_files(data / subject, split)
        for i, row in enumerate(read_rows(file, COLUMNS))
    ]


def question(row: dict[str, Any], subject: str, place: str) -> Question:
    """The question of a row, whose lists are written as text."""
    has_options = row["question_type"] == "multiple-choice"
    try:
        options = [str(option) for option in ast.literal_eval(row["options"])] if has_options else []
        answer = ast.literal_eval(row["answer"]) if row["answer"].startswith("[") else row["answer"]
        images = [image["bytes"] for i in range(1, MAX_IMAGES + 1) if (image := row[f"image_{i}"]) is not None]
        first = images[0]
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{place}: options, answer or image_1 cannot be read; fetch the file again") from None
    text = row["question"] + SHORT_ANSWER
    if has_options:
        choices = "".join(f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        text = f"{row['question']}\n{choices}{BY_LETTER}"
    reference = {"answer": answer, "options": options, "num_images": len(images)}
    return Question(row["id"], first, row["id"], text, reference, subject)


def is_choice(question: Question) -> bool:
    return bool(question.reference["options"])


# ---- answers


def named_option(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names, the last one if there are several; None if it names none."""
    for mark in OUTER_MARKS:
        answer = answer.strip(mark)
    answer = f" {answer} "
    letters = LETTERS[: len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in letters if form.format(letter) in answer]:
            return max(found, key=lambda letter: answer.rfind(place.format(letter)))
    if len(answer.split()) > 5:
        texts = {letter: option.lower() for letter, option in zip(letters, options, strict=True)}
        if found := [letter for letter in letters if texts[letter] in answer.lower()]:
            return max(found, key=lambda letter: answer.lower().rfind(texts[letter]))
    return None


def guess(question_id: str, num_options: int) -> str:
    return LETTERS[int.from_bytes(hashlib.sha256(question_id.encode()).digest()[:8]) % num_options]


def comparable(text: str) -> list[str | float]:
    """A number rounded to two places, or the lower-case text; of a single letter with the space that keeps it from matching in a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def conclusions(answer: str) -> list[str]:
    """What the sentences of an answer end in, after words such as `is`; the whole answer if none has such words."""
    answer = answer.strip().strip(".").lower()
    lines, ends = answer.split("\n"), []  # theirs would also split before a capital, which lower case leaves none of
    for i, line in enumerate(lines):
        markers = (*CONCLUSIONS, "=") if i == len(lines) - 1 else CONCLUSIONS
        tails = [line.split(marker)[-1].strip() for marker in markers if marker in line]
        end = shortest(tails)
        if end and end not in tuple(OUTER_MARKS):
            ends.append(end)
    return ends or [answer]


def shortest(tails: Sequence[str]) -> str:
    """The first of the shortest; an empty one gives way to any that comes after it."""
    kept = ""
    for tail in tails:
        if not kept or len(tail) < len(kept):
            kept = tail
    return kept


def is_open_match(answer: str, reference: str | Sequence[str]) -> bool:
    wanted = [value for text in ([reference] if isinstance(reference, str) else reference) for value in comparable(str(text))]
    ends = conclusions(answer)
    numbers = [number for end in ends for pattern in _NUMBERS for number in re.findall(pattern, end)]
    for said in [value for text in (*ends, *numbers) for value in comparable(text)]:
        if said in wanted or (isinstance(said, str) and any(isinstance(value, str) and value in said for value in wanted)):
            return True
    return False


def score(question: Question, answer: str) -> float:
    reference = question.reference
    if not is_choice(question):
        return float(is_open_match(answer, reference["answer"]))
    option = named_option(answer, reference["options"]) or guess(question.id, len(reference["options"]))
    return float(option in reference["answer"] if isinstance(reference["answer"], list) else option == reference["answer"])


def figures(questions: Sequence[Question], answers: Sequence[str], seed: int) -> dict[str, Figure]:
    values = [score(question, answer) for question, answer in zip(questions, answers, strict=True)]
    parts = {"accuracy": every, "multiple_choice": is_choice, "open": lambda question: not is_choice(question)}
    parts |= {name: in_group(*subjects) for name, subjects in DISCIPLINES.items()}
    is_guess = [
        float(named_option(answer, question.reference["options"]) is None) for question, answer in zip(questions, answers, strict=True)
    ]
    return mean_scores(questions, values, parts, seed) | mean_scores(questions, is_guess, {"guessed": is_choice}, seed)


BENCHMARK = Benchmark(
    name="mmmu",
    title="MMMU",
    splits=("validation", "dev"),
    read=read,
    images_from=FILES_FROM,
    score=score,
    figures=figures,
    protocol="question, options and instruction of MMMU's llava1.5.yaml; first image; greedy; answers read as MMMU's eval_utils.py does",
    paper={"accuracy": "30.6"},
)
