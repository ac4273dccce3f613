"""MME's reading of answers and its scores, on cases worked by hand."""

from pathlib import Path

import pytest

from omnimamba.eval.benchmark import Question
from omnimamba.eval.mme import figures, said


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("Yes, it is.", "yes"),
        ("no, there is not", "no"),
        ("", "other"),
        ("The answer is B", "other"),
        ("The answer is yes", "other"),  # the first four letters count
        ("Now", "no"),
        ("a no", "no"),
        ("I know", "other"),
        ("ｙｅｓ", "other"),  # full-width letters
        ("Nо", "other"),  # a Cyrillic o
        ("one", "other"),
    ],
)
def test_said(answer, expected):
    assert said(answer) == expected


def asked(kind, references, images):
    rows = enumerate(zip(references, images, strict=True))
    return [Question(f"{kind}/{i}", Path(), f"{kind}/{image}", "?", reference, kind) for i, (reference, image) in rows]


def test_scores_by_hand():
    """count: three of four right, one of two images; OCR: none; code_reasoning: all."""
    questions = asked("count", ["yes", "no", "yes", "no"], "aabb")
    questions += asked("OCR", ["yes", "no"], "cc") + asked("code_reasoning", ["no", "yes"], "dd")
    answers = ["Yes", "No", "Yes", "Yes", "unclear", "Yes", "No.", "yes"]
    values = {key: figure.value for key, figure in figures(questions, answers, 0).items()}
    assert values == pytest.approx(
        {
            "count": 75 + 50,
            "count_acc": 0.75,
            "count_acc_plus": 0.5,
            "OCR": 0,
            "OCR_acc": 0,
            "OCR_acc_plus": 0,
            "code_reasoning": 200,
            "code_reasoning_acc": 1,
            "code_reasoning_acc_plus": 1,
            "perception": 125,
            "cognition": 200,
        }
    )


def test_the_interval_of_a_sum_draws_each_kind_by_itself():
    """With one image of each kind there is nothing to draw, so the interval is the value."""
    questions = asked("count", ["yes", "no"], "aa") + asked("color", ["yes", "no"], "aa")
    figure = figures(questions, ["Yes", "No", "Yes", "Yes"], 0)["perception"]
    assert (figure.value, figure.low, figure.high, figure.n) == (250, 250, 250, 8)
