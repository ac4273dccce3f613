"""Scorers on cases worked by hand."""

import math

import numpy as np
import pytest

from omnimamba.eval.scores import (
    MAX_PSNR,
    Figure,
    is_match,
    mentions,
    normalise,
    psnr,
    ranks,
    ratio_of_sums,
    sum_of_ratios,
    word_f1,
    words,
    yes_or_no,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Waving  Hand:\nmedium-light skin tone. ", "waving hand: medium light skin tone"),
        ("“Mrs. Claus”", "mrs. claus"),
        ("It’s", "it's"),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("STRASSE straße", "strasse strasse"),
        ("fluent–high_contrast", "fluent high contrast"),
        ("keycap: #", "keycap: #"),
        ("keycap: *", "keycap: *"),
        ("São Tomé & Príncipe!", "são tomé & príncipe"),
        ("Sa\u0303o", "são"),
        ("", ""),
        (" ?! ", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_match():
    assert is_match("Red apple.", "red apple")
    assert is_match("Fluent-Flat", "fluent flat")
    assert not is_match("a red apple", "red apple")
    assert not is_match("keycap: *", "keycap: #")
    assert not is_match("", "red apple")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("red apple", "red apple", 1),
        ("apple red", "red apple", 1),
        ("green apple", "red apple", 0.5),
        ("apple", "red apple", 2 / 3),
        ("apple apple", "red apple", 0.5),  # a word counts as often as it stands in both
        ("", "red apple", 0),
        ("kiwi", "red apple", 0),
        ("", "", 1),
    ],
)
def test_word_f1(answer, reference, expected):
    assert word_f1(answer, reference) == pytest.approx(expected)


def test_mentions():
    assert words("It's a five-finger hand!") == ["it", "s", "a", "five", "finger", "hand"]
    assert mentions("Keywords: fruit, five fingers, red.", "Five Fingers")
    assert not mentions("five red fingers", "five fingers")
    assert not mentions("a redder apple", "red")
    assert not mentions("anything", "#")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes", True),
        ("Yes, it is.", True),
        ("yes — no doubt", True),
        ("ＹＥＳ", True),
        ("I would say yes.", True),
        ("NO", False),
        ("No, not a yes", False),
        ("“No”", False),
        ("The answer is no.", False),
        ("", None),
        ("The answer is B", None),
        ("It is either yes or no", None),
        ("Nothing, yesterday", None),
        ("one", None),
    ],
)
def test_yes_or_no(answer, expected):
    assert yes_or_no(answer) is expected


def test_psnr():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr(grey, black) == pytest.approx(10 * math.log10(25))  # 51/255 = 1/5
    assert psnr(black, np.full_like(black, 255)) == 0
    assert psnr(black, black) == MAX_PSNR
    one_step = np.zeros((128, 128, 3), np.uint8)
    one_step[0, 0, 0] = 1
    assert psnr(one_step, np.zeros_like(one_step)) == pytest.approx(95.0, abs=0.1)
    with pytest.raises(ValueError, match="resize one"):
        psnr(black, one_step)


def test_ranks():
    scores = np.array([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.4, 0.4, 0.4], [np.nan, 1.0, 0.0]])
    assert ranks(scores, np.array([0, 1, 2, 1, 0])).tolist() == [1, 3, 2, 3, 3]


def test_ratio_of_sums():
    assert ratio_of_sums(["a", "b"], [3, 1]).value == 2
    assert ratio_of_sums(["a", "b"], [1, 1], [1, 3]).value == 0.5
    assert ratio_of_sums(["a", "b"], np.array([True, False])).value == 0.5
    assert ratio_of_sums(["a", "b"], [0, 0], [0, 0]) == Figure(None, None, None, 2)
    assert ratio_of_sums(["a", "b", "a"], [1, 1, 1]) == Figure(1, 1, 1, 3)


def test_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).integers(0, 2, 400)
    figure = ratio_of_sums([str(i) for i in range(400)], values)
    error = 1.96 * values.std() / 20
    assert figure.value == values.mean()
    assert (figure.low, figure.high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.01)


def test_interval_depends_on_nothing_but_values_and_seed():
    names, values = list("abcdef"), [0.1, 0.7, 0.2, 0.9, 0.45, 0.33]
    assert ratio_of_sums(names, values, seed=1) == ratio_of_sums(names, values, seed=1)
    assert ratio_of_sums(names, values, seed=1) != ratio_of_sums(names, values, seed=2)


def test_answers_about_one_image_are_drawn_together():
    """Four copies of each answer narrow the interval if they count as images of their own, and not if they do not."""
    values = [1, 0] * 20
    names = [str(i) for i in range(40)]
    once = ratio_of_sums(names, values)
    assert ratio_of_sums(names * 4, values * 4) == Figure(once.value, once.low, once.high, 160)
    apart = ratio_of_sums([str(i) for i in range(160)], values * 4)
    assert apart.high - apart.low < 0.7 * (once.high - once.low)


def test_sum_of_ratios():
    first, second = (["a", "a", "b"], [1, 0, 1], None), (["b", "c"], [1, 0], [1, 1])
    figure = sum_of_ratios([first, second], scale=10)
    assert figure.value == pytest.approx(10 * (2 / 3 + 1 / 2)) and figure.n == 5
    assert figure.low <= figure.value <= figure.high
    assert sum_of_ratios([first, (["c"], [1], [0])]).value is None


def test_shared_images_are_drawn_together():
    """Two parts with opposite answers about the same images: their sum is the same in every draw."""
    images, right = [str(i) for i in range(20)], np.arange(20) % 2
    together = sum_of_ratios([(images, right, None), (images, 1 - right, None)])
    assert (together.low, together.value, together.high) == pytest.approx((1, 1, 1))
    apart = sum_of_ratios([(images, right, None), ([f"other {image}" for image in images], 1 - right, None)])
    assert apart.high - apart.low > 0.3
