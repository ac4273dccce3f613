"""The picture of pictures."""

import pytest
from PIL import Image, ImageFont

from omnimamba.eval.grid import CAPTION_LINES, GAP, LABEL_WIDTH, MARGIN, SIDE, draw_grid, wrap


@pytest.mark.parametrize("num", [1, 8, 11])
def test_real_above_painted(num):
    cells = [(Image.new("RGB", (32, 32), "red"), Image.new("RGB", (200, 200), "blue"), "a caption")] * num
    grid = draw_grid(cells)
    left = MARGIN + LABEL_WIDTH + (min(num, 8) - 1) * (SIDE + GAP) + SIDE // 2
    assert grid.getpixel((left, MARGIN + SIDE // 2)) == (255, 0, 0)
    assert grid.getpixel((left, MARGIN + SIDE + GAP + SIDE // 2)) == (0, 0, 255)
    assert grid.width == 2 * MARGIN + LABEL_WIDTH + min(num, 8) * (SIDE + GAP) - GAP


def test_captions_are_wrapped():
    font = ImageFont.load_default(13)
    assert wrap("red apple", font, 140) == ["red apple"]
    assert wrap("", font, 140) == [""]
    for text in ("flag: South Georgia & South Sandwich Islands and more of them", "x" * 100, "short " + "x" * 100):
        lines = wrap(text, font, 140)
        assert len(lines) <= CAPTION_LINES
        assert lines[-1].endswith("...")
        assert all(font.getlength(line) <= 140 for line in lines)
