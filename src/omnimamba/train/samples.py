"""Pictures that a run shows."""

from collections.abc import Sequence

from PIL import Image

GAP = 4


def image_grid(images: Sequence[Image.Image], *, columns: int) -> Image.Image:
    """One picture of equally large images, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for i, image in enumerate(images):
        grid.paste(image, ((i % columns) * (width + GAP), (i // columns) * (height + GAP)))
    return grid
