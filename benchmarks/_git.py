"""What a benchmark was run on."""

import shutil
import subprocess
from pathlib import Path


def commit() -> str | None:
    """The checked-out commit, with `-dirty` if the tree differs from it; None without git or outside a clone."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or None
