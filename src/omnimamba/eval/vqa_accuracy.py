"""VQA accuracy: agreement with ten people after normalising (Antol et al. 2015, arXiv:1505.00468; Goyal et al. 2017, arXiv:1612.00837).

The normalisation is that of the evaluation server, as `EvalAIAnswerProcessor` of MMF and of LLaVA's `llava/eval/m4c_evaluator.py`
has it, which goes back to `vqaEval.py` of github.com/GT-Vision-Lab/VQA. It is applied to the answer and to all references.
(`vqaEval.py` leaves references alone if all ten are equal; the two differ for the rare ones with an article or punctuation.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERS = {word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")

_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am
mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll
what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
you'll you're you've
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've something'd've there'd've
they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
""".split()


def _without_one(word: str) -> list[str]:
    """The word without one of its apostrophes, in each way."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {short: word for word in _CONTRACTED for short in _without_one(word)} | {"somebody'd": "somebodyd"}
"""Contractions that lack an apostrophe, and the whole ones. The last entry runs the other way in the original, too."""


def normalise(answer: str) -> str:
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _numbers_and_articles(_punctuation(text))


def _punctuation(text: str) -> str:
    """Marks beside a space vanish, others become one; all vanish if the text has a number such as 1,000."""
    has_thousands = _THOUSANDS.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        result = result.replace(mark, "" if has_thousands or f"{mark} " in text or f" {mark}" in text else " ")
    return _PERIOD.sub("", result)


def _numbers_and_articles(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Mean over the people left out of min(1, people among the others who gave this answer / 3)."""
    given = [normalise(reference) for reference in references]
    said = normalise(answer)
    num_same = given.count(said)
    total = sum(min(1.0, (num_same - (reference == said)) / 3) for reference in given)
    return total / len(given)
