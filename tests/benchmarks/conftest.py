import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its scripts import each other as they do when one is run


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., Any]:
    """Runs a script with arguments on the CPU; the report, which must be the last line of its output and what --json wrote."""

    def run(script: str, *arguments: str) -> Any:
        out = tmp_path / "report.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(out)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
        assert result.returncode == 0, result.stdout + result.stderr
        report = json.loads(out.read_text())
        assert report == json.loads(result.stdout.splitlines()[-1])
        return report

    return run
