"""The kernel tests of this folder in Triton's interpreter, in a process of their own (conftest.py says why)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent


def test_kernels_in_the_interpreter():
    files = sorted(path for path in FOLDER.glob("test_triton_*.py") if path.stem not in ("test_triton_interpreter", "test_triton_compiles"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *map(str, files)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_operators_do_not_import_triton():
    code = "import sys, omnimamba.ops; sys.exit('omnimamba.ops.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
