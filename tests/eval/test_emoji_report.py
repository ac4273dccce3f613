"""The report for people: confusion, pictures, the same bytes each time."""

import filecmp

import numpy as np
import pytest
from PIL import Image

from omnimamba.eval.emoji import evaluate
from omnimamba.eval.emoji_report import ConfusionMatrix, draw_confusions, table
from omnimamba.eval.emoji_set import Question


def asked(pairs):
    """(true style, answer) of each question, and a question of another kind."""
    questions = [Question(str(i), "style", "", "?", reference) for i, (reference, _) in enumerate(pairs)]
    return [*questions, Question("x", "name", "", "?", "noto")], [*(answer for _, answer in pairs), "noto"]


def test_confusion_by_hand():
    pairs = [("noto", "Noto."), ("noto", "fluent 3D"), ("fluent-3d", "fluent-3d"), ("fluent-3d", "a drawing"), ("fluent-3d", "")]
    matrix = ConfusionMatrix.of("style", *asked(pairs))
    assert matrix.labels == ("fluent-3d", "noto")
    np.testing.assert_array_equal(matrix.counts, [[1, 0, 2], [1, 1, 0]])
    assert ConfusionMatrix.of("group", *asked(pairs)) is None


def test_drawn_matrices(tmp_path):
    """A right answer darkens the diagonal: blue, not white."""
    matrix = ConfusionMatrix.of("style", *asked([("a", "a"), ("b", "b")]))
    draw_confusions([matrix], tmp_path / "one.png")
    draw_confusions([matrix, matrix], tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width > 1.8 * one.width
        colours = {colour for _, colour in one.convert("RGB").getcolors(maxcolors=1 << 20)}
        assert (8, 48, 107) in colours and (247, 251, 255) in colours  # the ends of matplotlib's Blues


def test_table_is_escaped():
    rows = "<tr><th>a</th><th>b</th></tr>\n<tr><td>&lt;x&gt;</td><td>&amp;</td></tr>"
    assert table([("a", "b"), ("<x>", "&")]) == f"<table>\n{rows}\n</table>"


@pytest.mark.parametrize("num_prompts", [3, 0])
def test_a_second_run_gives_the_same_bytes(omni, data, judge_folder, tmp_path, num_prompts):
    for name in ("first", "second"):
        evaluate(omni, data, split="hidden", judge=judge_folder, num_prompts=num_prompts, out=tmp_path / name)
    files = sorted(str(path.relative_to(tmp_path / "first")) for path in (tmp_path / "first").rglob("*") if path.is_file())
    with_paintings = ["grid.png", "painted/000.png", "painted/001.png", "painted/002.png", "paintings.jsonl"] if num_prompts else []
    assert files == sorted(["answers.jsonl", "confusion.png", "report.html", *with_paintings])
    same, different, lost = filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", files, shallow=False)
    assert (sorted(same), different, lost) == (files, [], [])
    page = (tmp_path / "first/report.html").read_text()
    assert ('src="grid.png"' in page) == bool(num_prompts)
    for text in ('src="confusion.png"', "caption, exact match", omni.bundle.fingerprint, "hidden"):
        assert text in page
