"""All tests of kernels in Triton's interpreter, in two processes of their own (conftest.py says why)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent


def test_kernels_in_the_interpreter():
    files = sorted(
        path for path in FOLDER.parent.rglob("test_triton_*.py") if path.stem not in ("test_triton_interpreter", "test_triton_compiles")
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    halves = [
        subprocess.Popen(
            [*command, *half], cwd=FOLDER.parents[1], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for half in (files[::2], files[1::2])
    ]
    printed = [half.communicate()[0] for half in halves]
    assert [half.returncode for half in halves] == [0, 0], "".join(printed)


def test_operators_do_not_import_triton():
    code = "import sys, omnimamba.ops; sys.exit('omnimamba.ops.triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
