"""The scripts of examples/ run."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *args: object, cwd: Path) -> str:
    command = [sys.executable, EXAMPLES / script, *(str(arg) for arg in args)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=200).stdout


@pytest.mark.slow
def test_examples(folder, omni, picture, tmp_path):
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"paint.py", "describe_folder.py", "conversation.py"}
    out = run("paint.py", "red apple", folder, cwd=tmp_path)
    assert out.endswith("image 1: 100%\n")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["painting-0.png", "painting-1.png"]
    assert run("describe_folder.py", tmp_path, folder, cwd=tmp_path).count("painting-") == 2
    assert "('user', 'What is this?')" in run("conversation.py", picture, folder, cwd=tmp_path)
