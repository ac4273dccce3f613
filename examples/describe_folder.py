"""Describes all images of a folder in one batch: `python examples/describe_folder.py FOLDER [MODEL]`."""

import sys
from pathlib import Path

from omnimamba import OmniMamba

folder, source = Path(sys.argv[1]), (sys.argv[2:] or ["nano"])[0]
files = sorted(folder.glob("*.png")) + sorted(folder.glob("*.jpg"))
model = OmniMamba.from_pretrained(source)
for file, answer in zip(files, model.describe(files, "What is this?"), strict=True):
    print(f"{file.name}: {answer}")
