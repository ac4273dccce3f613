"""VQA accuracy and its normalisation, on cases worked by hand."""

import pytest

from omnimamba.eval.vqa_accuracy import CONTRACTIONS, accuracy, normalise


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes, it is.", "yes it is"),
        ("NO", "no"),
        ("", ""),
        ("The answer is B", "answer is b"),
        ("A dog", "dog"),
        ("two", "2"),
        ("Ten cats", "10 cats"),
        ("none", "0"),
        ("twenty", "twenty"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("x-ray", "x ray"),
        ("x -ray", "x ray"),
        ("salt/pepper", "salt pepper"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("dog's bowl", "dog 's bowl"),
        ("it's", "it 's"),
        ("line\nbreak\ttab", "line break tab"),
        ("Wi-Fi (free)", "wi fi free"),
        ("café!", "café"),
        ("“quoted”", "“quoted”"),
        ("10:30", "10:30"),
    ],
)
def test_normalise(answer, expected):
    assert normalise(answer) == expected


def test_contractions():
    assert CONTRACTIONS["wont"] == "won't"
    assert CONTRACTIONS["yall'd've"] == "y'all'd've"
    assert CONTRACTIONS["'ows'at"] == "'ow's'at"
    assert len(CONTRACTIONS) == 114  # those of the original but for four with capitals and two without a change


@pytest.mark.parametrize(("num_people", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_of_ten_people(num_people, expected):
    """k of 10 people agree: k of the subsets of nine hold k - 1 of them, 10 - k hold k; a third of these, at most 1."""
    references = ["red"] * num_people + [f"colour {i}" for i in range(10 - num_people)]
    assert accuracy("Red.", references) == pytest.approx(expected)


def test_references_are_normalised_too():
    assert accuracy("2", ["two"] * 10) == 1
    assert accuracy("stop sign", ["A stop sign"] * 10) == 1
    assert accuracy("", ["yes"] * 10) == 0
