"""The load benchmark, small: its checks hold for a model of random weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/load.py"


@pytest.mark.slow
def test_the_checks_of_the_load_benchmark(tmp_path):
    out = tmp_path / "load.json"
    sizes = ["--requests", "24", "--concurrency", "4", "--max-waiting", "40", "--repeats", "1"]
    command = [sys.executable, SCRIPT, "--preset", "tiny", *sizes, "--json", out]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(result.stdout.splitlines()[-1])
    assert report["load"]["wrong answers"] == 0 and report["load"]["hung up"] > 0 and report["queue"]["refused"] > 0
    rates = report["throughput"]
    assert all(rates[f"{side} {what}/s"] > 0 for side in ("served", "offline") for what in ("tokens", "images"))
    assert report["first token seconds"]["ratio"] > 0
