"""Describes all images of a folder in one batch: `python examples/describe_folder.py FOLDER [MODEL]`."""

import argparse
from pathlib import Path

from omnimamba import OmniMamba


def describe(folder: Path, source: str) -> None:
    files = sorted(folder.glob("*.png")) + sorted(folder.glob("*.jpg"))
    if not files:
        raise ValueError(f"no .png or .jpg files in {folder}")
    model = OmniMamba.from_pretrained(source)
    for file, answer in zip(files, model.describe(files, "What is this?"), strict=True):
        print(f"{file.name}: {answer}")


parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("model", nargs="?", default="nano")
args = parser.parse_args()
try:
    describe(args.folder, args.model)
except (OSError, ValueError) as error:
    parser.error(str(error))
