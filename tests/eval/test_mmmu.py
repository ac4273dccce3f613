"""MMMU's reading of answers, on cases worked by hand."""

import pytest

from omnimamba.eval.benchmark import Question
from omnimamba.eval.mmmu import DISCIPLINES, figures, guess, is_open_match, named_option, score
from omnimamba.eval.mmmu import question as read_question

OPTIONS = ["a red square", "blue", "12", "1/2"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("B.", "B"),
        ("The answer is B", "B"),
        ("The answer is (C), not (A)", "A"),  # the last one named
        ("C: 12", None),
        ("C is right, D wrong", "D"),
        ("a", None),
        ("It clearly shows a red square in the middle", "A"),
        ("a red square", None),  # texts count in answers of more than five words
        ("Neither blue nor anything that I could name", "B"),
        ("", None),
        ("Yes, it is.", None),
        ("NO", None),
        ("E", None),
        ("Ｂ", None),
        ("twelve", None),
    ],
)
def test_named_option(answer, expected):
    assert named_option(answer, OPTIONS) == expected


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("12", "12", True),
        ("12.004", "12", True),  # two places
        ("12.01", "12", False),
        ("The result is 1,200 m", "1200", True),
        ("so x = 3.5", "3.5", True),
        ("1.2e3", "1200", True),
        ("It is 5. So the answer is 7.", "7", True),
        ("a hamster wheel", "hamster", True),
        ("wheel", "hamster", False),
        ("twelve", "12", False),
        ("", "12", False),
        ("Yes, it is.", "yes", True),
        ("Yes, it is so.", "yes", False),  # what follows `is` counts
        ("NO", "no", True),
        ("The answer is B", "b", True),
        ("bark", "b", False),  # a letter must stand by a space
        ("option b or c", "b", True),
        ("-3", "3", False),
        ("1200 metres", ["1,200", "1200 m"], True),
        ("café", "Café", True),
    ],
)
def test_open_match(answer, reference, expected):
    assert is_open_match(answer, reference) is expected


def question(i, answer, options=OPTIONS, subject="Art"):
    return Question(f"validation_{subject}_{i}", b"", str(i), "?", {"answer": answer, "options": list(options), "num_images": 1}, subject)


def test_an_answer_without_an_option_is_a_guess_of_its_own():
    guesses = [guess(f"validation_Art_{i}", 4) for i in range(400)]
    assert guesses[:3] == [guess(f"validation_Art_{i}", 4) for i in range(3)]
    assert all(80 < guesses.count(letter) < 120 for letter in "ABCD")
    assert score(question(0, guesses[0]), "no idea") == 1


def test_figures_by_hand():
    questions = [question(0, "A"), question(1, "B", subject="Math"), question(2, "12", (), "Math"), question(3, "D")]
    wrong = next(letter for letter in "ABCD" if letter != guess(questions[3].id, 4))
    questions[3] = question(3, wrong)
    values = {key: figure.value for key, figure in figures(questions, ["A", "(A)", "= 12", "none of them"], 0).items()}
    expected = {"accuracy": 2 / 4, "multiple_choice": 1 / 3, "open": 1, "Art and Design": 1 / 2, "Science": 1 / 2, "guessed": 1 / 3}
    assert values == pytest.approx(expected)
    assert len({subject for some in DISCIPLINES.values() for subject in some}) == 30


@pytest.mark.parametrize(
    "changes", [{"options": "['a'"}, {"options": None}, {"answer": "[1"}, {"image_1": None, "image_2": None}, {"answer": None}]
)
def test_a_row_that_cannot_be_read(changes):
    row = {"id": "x", "question": "?", "options": "['a']", "answer": "A", "question_type": "multiple-choice"}
    row |= {f"image_{i}": {"bytes": b"", "path": None} if i <= 2 else None for i in range(1, 8)}
    assert read_question(row, "Art", "file row 3").text.startswith("?\n(A) a\n\nAnswer with")
    with pytest.raises(ValueError, match="file row 3: options, answer or image_1 cannot be read"):
        read_question(row | changes, "Art", "file row 3")
