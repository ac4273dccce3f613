"""The scripts of examples/ run."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *args: object, cwd: Path) -> str:
    command = [sys.executable, EXAMPLES / script, *(str(arg) for arg in args)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=200).stdout


@pytest.mark.parametrize(
    ("script", "args", "says"),
    [
        ("paint.py", [], "required: prompt"),
        ("paint.py", ["red apple", "absent"], "there is no file or folder 'absent'"),
        ("describe_folder.py", [], "required: folder"),
        ("describe_folder.py", ["absent"], "no .png or .jpg files in absent"),
        ("conversation.py", [], "required: image"),
        ("conversation.py", ["absent.png"], "no such file: absent.png"),
        ("conversation.py", [__file__], "not a whole image"),
    ],
)
def test_wrong_arguments(script, args, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *args])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{script}: error: ") and says in err and err.count("\n") == 1


@pytest.mark.slow
def test_examples(folder, omni, picture, tmp_path):
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"paint.py", "describe_folder.py", "conversation.py"}
    out = run("paint.py", "red apple", folder, cwd=tmp_path)
    assert out.endswith("image 1: 100%\n")
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["painting-0.png", "painting-1.png"]
    assert run("describe_folder.py", tmp_path, folder, cwd=tmp_path).count("painting-") == 2
    assert "('user', 'What is this?')" in run("conversation.py", picture, folder, cwd=tmp_path)
