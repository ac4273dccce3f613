"""All tests of kernels in Triton's interpreter, each file in a process of its own (conftest.py says why)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]
FILES = sorted(path for path in TESTS.rglob("test_triton_*.py") if path.stem not in ("test_triton_interpreter", "test_triton_compiles"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout


def test_operators_do_not_import_triton():
    code = "import sys, omnimamba.ops; sys.exit('omnimamba.ops.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
