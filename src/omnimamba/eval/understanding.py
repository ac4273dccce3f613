"""The benchmarks that ask about images: `evaluate` asks and scores, `merge` scores what several computers have asked.

`benchmark.py` says what a benchmark is made of; each is in a file of its own. `ask.py` has batches, files of answers and shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omnimamba.config import nearest_name
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.engine.request import require_int
from omnimamba.eval import gqa, mme, mmmu, pope, textvqa, vqav2
from omnimamba.eval.ask import (
    Answer,
    Progress,
    Shard,
    answer_in_batches,
    append_answers,
    cut_unfinished_line,
    is_past_last_position,
    no_progress,
    read_answers,
)
from omnimamba.eval.benchmark import Benchmark, Question
from omnimamba.eval.files import RUN_FILE, claim_folder, write_json
from omnimamba.eval.report import Report, model_protocol
from omnimamba.model.files import read_json

BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in (pope, mme, gqa, vqav2, textvqa, mmmu)}
MAX_NEW_TOKENS = 128
"""That of LLaVA's `model_vqa_loader.py`."""
REPORT_FILE, UPLOAD_FILE = "report.json", "upload.json"


def benchmark_named(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; {nearest_name(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def evaluate(
    model: OmniMamba,
    name: str,
    data: Path,
    out: Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    shard: Shard | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Report | None:
    """The figures of `model` on a benchmark whose published files are in `data`; None for a shard, which `merge` scores with others.

    out: a folder for the answers as they come, from which the same call goes on if it is interrupted, and for `report.json`.
    limit: the first questions only. seed: of the intervals.
    """
    benchmark = benchmark_named(name)
    require_int("max_new_tokens", max_new_tokens, 1)
    data, out, split = Path(data), Path(out), benchmark.split(split)
    questions = benchmark.questions(data, split, limit)
    run = {
        "benchmark": name,
        "split": split,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "questions": digest(questions),
        **model_protocol(model),
    }
    claim_folder(out, run)
    part = shard or Shard()
    mine = part.of([question.image_name for question in questions])
    answers = ask(
        model, [question for question in questions if question.image_name in mine], out / part.file_name, max_new_tokens, progress
    )
    return None if shard else conclude(benchmark, data, questions, answers, run, out, seed)


def merge(data: Path, folders: Sequence[Path], out: Path, *, seed: int = 0) -> Report:
    """The figures of the answers in all files `answers*.jsonl` of some folders, which must be of one run and complete."""
    files = [path for folder in folders for path in sorted(Path(folder).glob("answers*.jsonl"))]
    if not files:
        raise ValueError(f"{', '.join(map(str, folders))}: no answers*.jsonl; pass the --out folders of the shards")
    run = read_json(files[0].parent / RUN_FILE)
    answers: dict[str, Answer] = {}
    for path in files:
        if read_json(path.parent / RUN_FILE) != run:
            raise ValueError(f"{path}: of another run than {files[0]}; pass folders of one run")
        answers |= read_answers(path)
    benchmark = benchmark_named(run["benchmark"])
    questions = benchmark.questions(Path(data), run["split"], run["limit"])
    if digest(questions) != run["questions"]:
        raise ValueError(f"{data}: other questions than those that were asked; pass the folder that the shards were asked from")
    if lost := [question.id for question in questions if question.id not in answers]:
        raise ValueError(f"{len(lost)} of {len(questions)} questions have no answer, e.g. {lost[0]}; finish every shard first")
    return conclude(benchmark, Path(data), questions, answers, run, Path(out), seed)


def digest(questions: Sequence[Question]) -> str:
    """Tells sets of questions apart."""
    content = json.dumps([[question.id, question.image_name, question.text] for question in questions])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def ask(model: OmniMamba, questions: Sequence[Question], path: Path, max_new_tokens: int, progress: Progress) -> dict[str, Answer]:
    """All answers by question id: those in the file, and of the other questions new ones, which are appended to it."""
    cut_unfinished_line(path)
    answers = read_answers(path) if path.is_file() else {}
    left = [question for question in questions if question.id not in answers]
    images = {question.image_name: question.image for question in left}
    asked = [(question.image_name, question.text) for question in left]
    progress("questions", len(answers), len(questions))
    for batch in answer_in_batches(model, images, asked, max_new_tokens=max_new_tokens, past_last_position="clamp"):
        new = {left[i].id: Answer(text, is_past_last_position(model, left[i].text, text)) for i, text in batch.items()}
        append_answers(path, new)
        answers |= new
        progress("questions", len(answers), len(questions))
    return answers


def conclude(
    benchmark: Benchmark,
    data: Path,
    questions: Sequence[Question],
    answers: Mapping[str, Answer],
    run: Mapping[str, Any],
    out: Path,
    seed: int,
) -> Report:
    """The report, which is also written to `out` together with the file for the evaluation server, if the split has one."""
    texts = [answers[question.id].text for question in questions]
    protocol = {
        **{key: value for key, value in run.items() if key != "questions"},
        "data": str(data),
        "num_questions": len(questions),
        "num_images": len({question.image_name for question in questions}),
        "num_past_last_position": sum(answers[question.id].past_last_position for question in questions),
        "protocol": benchmark.protocol,
        "seed": seed,
    }
    rows = [
        {
            "id": question.id,
            "group": question.group,
            "image": question.image_name,
            "prompt": question.text,
            "answer": text,
            "reference": question.reference,
            "score": benchmark.score(question, text),
        }
        for question, text in zip(questions, texts, strict=True)
    ]
    figures = benchmark.figures(questions, texts, seed)
    report = Report(protocol, figures, forms=benchmark.forms, paper=benchmark.paper, answers=rows)
    upload = benchmark.upload(data, run["split"], questions, texts) if benchmark.upload else None
    write_json(out / REPORT_FILE, report.to_dict())
    if upload is not None:
        write_json(out / UPLOAD_FILE, upload, indent=None)
    return report
