"""Paints a text and shows the picture while it grows: `python examples/paint.py "red apple" [MODEL]`."""

import argparse

from PIL import Image

from omnimamba import OmniMamba


def on_row(image_idx: int, image: Image.Image, fraction: float) -> None:
    """Called after each row of image tokens; what is not painted yet is grey."""
    image.save(f"painting-{image_idx}.png")
    print(f"image {image_idx}: {fraction:.0%}")


def paint(prompt: str, source: str) -> None:
    model = OmniMamba.from_pretrained(source)
    images = model.generate_image(prompt, num_images=2, seed=3, callback=on_row)
    for image_idx, image in enumerate(images):
        image.save(f"painting-{image_idx}.png")


parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
parser.add_argument("prompt")
parser.add_argument("model", nargs="?", default="nano")
args = parser.parse_args()
try:
    paint(args.prompt, args.model)
except (OSError, ValueError) as error:
    parser.error(str(error))
