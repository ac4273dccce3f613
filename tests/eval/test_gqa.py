"""GQA's comparison of answers, on cases worked by hand."""

from pathlib import Path

import pytest

from omnimamba.eval.benchmark import Question
from omnimamba.eval.gqa import figures, score


def asked(reference, structure="query", i=0):
    return Question(str(i), Path(), str(i), "?", reference, structure)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Red", "red", 1),
        ("red.", "red", 1),
        ("red...", "red", 1),
        ("a red", "red", 0),
        ("red ", "red", 0),
        ("NO", "no", 1),
        ("No, it is not.", "no", 0),
        ("", "no", 0),
        ("The answer is B", "b", 0),
        ("two", "2", 0),
        ("Café", "café", 1),
    ],
)
def test_score(answer, reference, expected):
    assert score(asked(reference), answer) == expected


def test_figures_by_hand():
    questions = [asked("red", "query", 0), asked("yes", "verify", 1), asked("no", "verify", 2), asked("left", "choose", 3)]
    values = {key: figure.value for key, figure in figures(questions, ["red", "yes", "yes", "right"], 0).items()}
    assert values == pytest.approx({"accuracy": 2 / 4, "open": 1, "binary": 1 / 3, "query": 1, "verify": 1 / 2, "choose": 0})
