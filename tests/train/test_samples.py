from PIL import Image

from omnimamba.train.samples import GAP, image_grid


def test_image_grid():
    images = [Image.new("RGB", (10, 6), colour) for colour in ("red", "green", "blue")]
    grid = image_grid(images, columns=2)
    assert grid.size == (20 + GAP, 12 + GAP)
    assert [grid.getpixel(place) for place in ((9, 5), (10 + GAP, 0), (0, 6 + GAP))] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert grid.getpixel((10, 0)) == grid.getpixel((19, 11)) == (255, 255, 255)
