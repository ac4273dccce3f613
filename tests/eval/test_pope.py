"""POPE's reading of answers and its figures, on cases worked by hand."""

from pathlib import Path

import pytest

from omnimamba.eval.benchmark import Question
from omnimamba.eval.pope import figures, says_yes


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("Yes, it is.", True),
        ("No, there is not.", False),
        ("There is not a dog", False),
        ("Yes. No.", True),  # the first sentence counts
        ("no.", False),
        ("NO", True),  # eval_pope.py knows No, no and not; all else is a yes
        ("NO.", True),
        ("", True),
        ("The answer is B", True),
        ("nothing", True),
        ("nein", True),
        ("Nо", True),  # a Cyrillic o
        ("No\nYes", True),  # it splits at spaces alone
        ("zero", True),
    ],
)
def test_says_yes(answer, expected):
    assert says_yes(answer) is expected


def asked(sampling, references):
    return [Question(f"{sampling}/{i}", Path(), str(i), "?", reference, sampling) for i, reference in enumerate(references)]


def test_figures_by_hand():
    """random: tp 2, fn 1, tn 1, fp 1 (one of them unclear). popular: all right."""
    questions = asked("random", [True, True, True, False, False]) + asked("popular", [True, False])
    answers = ["Yes", "yes", "no", "No", "maybe", "Yes", "No"]
    values = {key: figure.value for key, figure in figures(questions, answers, 0).items()}
    assert values == pytest.approx(
        {
            "accuracy": (3 / 5 + 1) / 2,
            "f1": (4 / 6 + 1) / 2,
            "random_accuracy": 3 / 5,
            "random_precision": 2 / 3,
            "random_recall": 2 / 3,
            "random_f1": 2 / 3,
            "random_yes_ratio": 3 / 5,
            "random_unclear": 1 / 5,
            "popular_accuracy": 1,
            "popular_precision": 1,
            "popular_recall": 1,
            "popular_f1": 1,
            "popular_yes_ratio": 1 / 2,
            "popular_unclear": 0,
        }
    )


def test_without_a_yes_precision_is_undefined():
    values = figures(asked("random", [True, False]), ["no", "no"], 0)
    assert values["random_precision"].value is None
    assert values["random_f1"].value == values["random_recall"].value == 0
