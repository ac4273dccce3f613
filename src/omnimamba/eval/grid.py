"""A picture of pictures: real drawings, below each the painting of its caption, below that the caption."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE = 128
"""Pixels of a picture's side; smaller pictures are enlarged without smoothing."""
GAP, MARGIN, LABEL_WIDTH = 12, 20, 64
FONT_SIZE, CAPTION_LINES = 13, 2
BACKGROUND, FRAME, INK, FAINT = "#ffffff", "#dddddd", "#222222", "#888888"


def draw_grid(cells: Sequence[tuple[Image.Image, Image.Image, str]], columns: int = 8) -> Image.Image:
    """Cells of (real, painted, caption), row by row, under `real` and `painted` labels."""
    font = ImageFont.load_default(FONT_SIZE)
    line = round(FONT_SIZE * 1.3)
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    row_height = 2 * SIDE + 2 * GAP + CAPTION_LINES * line
    width = 2 * MARGIN + LABEL_WIDTH + columns * (SIDE + GAP) - GAP
    height = 2 * MARGIN + rows * (row_height + GAP) - GAP
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, (real, painted, caption) in enumerate(cells):
        left, top = MARGIN + LABEL_WIDTH + i % columns * (SIDE + GAP), MARGIN + i // columns * (row_height + GAP)
        for picture, label, y in ((real, "real", top), (painted, "painted", top + SIDE + GAP)):
            canvas.paste(
                picture.resize((SIDE, SIDE), Image.Resampling.NEAREST if picture.width < SIDE else Image.Resampling.LANCZOS), (left, y)
            )
            draw.rectangle((left - 1, y - 1, left + SIDE, y + SIDE), outline=FRAME)
            if i % columns == 0:
                draw.text((MARGIN, y + SIDE // 2), label, fill=FAINT, font=font, anchor="lm")
        for n, text in enumerate(wrap(caption, font, SIDE + GAP - 2)):
            draw.text((left + SIDE // 2, top + 2 * (SIDE + GAP) + n * line), text, fill=INK, font=font, anchor="ma")
    return canvas


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """At most CAPTION_LINES lines no wider than `width`; what does not fit ends in dots."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], " ".join(lines[CAPTION_LINES - 1 :])]
    return [_shorten(entry, font, width) for entry in lines]


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
