"""Pieces of an answer against the whole text, cut at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnimamba.engine.text import AnswerText


def pieces(tokenizer, text, stop=()):
    answer = AnswerText(tokenizer, stop)
    ids = tokenizer.encode(text)
    return [answer.push(token, is_last=False) for token in ids] + [answer.push(None, is_last=True)], answer


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="ab \né", max_size=30), st.lists(st.text(alphabet="ab \n", min_size=1, max_size=4), max_size=3))
def test_joined_pieces_are_the_text_before_the_first_stop(tokenizer, text, stop):
    found, answer = pieces(tokenizer, text, stop)
    whole = "".join(found)
    assert answer.is_stopped == any(word in text for word in stop)
    if len(stop) <= 1:  # of several the one that is complete first wins, which a search in the whole text does not tell
        places = [text.index(word) for word in stop if word in text]
        assert whole == text[: min(places, default=len(text))].strip()
    assert not any(word.strip() and word in whole for word in stop) and text.strip().startswith(whole)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_every_piece_stays_said(tokenizer, text):
    found, _ = pieces(tokenizer, text)
    said = ""
    for piece in found:
        said += piece
        assert text.strip().startswith(said) and said == said.rstrip()
    assert said == text.strip()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two", [". "], "one"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo", ["\n\n"], "one\ntwo"),
        ("\none", ["\n"], ""),
        ("aab", ["ab"], "a"),
        ("ends with sto", ["stop"], "ends with sto"),
    ],
)
def test_stop_strings(tokenizer, text, stop, expected):
    found, answer = pieces(tokenizer, text, stop)
    assert "".join(found) == expected and answer.is_stopped == (stop[0] in text)


def test_nothing_comes_after_a_stop_string(tokenizer):
    answer = AnswerText(tokenizer, ["b"])
    said = [answer.push(tokenizer.encode(letter)[0], is_last=False) for letter in "abcb"]
    assert said == ["a", "", "", ""] and answer.push(None, is_last=True) == ""
