"""The training benchmark: its recipes can be read, and its checks and figures hold for the tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_its_recipes(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import train as benchmark

    for case in benchmark.CASES.values():
        for variant in benchmark.VARIANTS:
            recipe = benchmark.made_up(case, variant, tmp_path, 4, 2)
            assert (recipe.train.graphs, recipe.train.recompute) == ("graphs" in variant, "recompute" in variant)
            assert bool(recipe.train.mmu_batch) == bool(case.answer) and recipe.data.folder == str(tmp_path)
    assert {
        name: (r.train.mmu_batch, r.train.t2i_batch)
        for name, r in ((n, benchmark.made_up(c, "python", tmp_path, 4, 2)) for n, c in benchmark.CASES.items())
    } == {
        "1.3b stage 2": (3, 48),
        "1.3b stage 2, 4 MMU": (4, 48),
        "1.3b stage 1 T2I": (0, 90),
        "nano stage 2": (320, 224),
        "tiny": (6, 6),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "variants"), [([], ["python", "recompute, chunk", "parts, chunk"]), (TORCHRUN, ["ddp, chunk", "fsdp, recompute, chunk"])]
)
def test_its_figures(tmp_path, launcher, variants):
    out = tmp_path / "train.json"
    command = [sys.executable, *launcher, BENCHMARKS / "train.py", "--cpu", "--cases", "tiny", "--steps", "2", "--json", out]
    command += ["--variants", *variants]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(out.read_text())
    assert report == json.loads(result.stdout.splitlines()[-1])
    assert list(report["cases"]["tiny"]) == variants and report["processes"] == (2 if launcher else 1)
    for figures in report["cases"]["tiny"].values():
        assert figures["tokens/s"] > figures["steps/s"] > 0 and 0 < figures["MFU"] < 1


@pytest.mark.slow
def test_its_profile(tmp_path):
    out = tmp_path / "train.json"
    command = [sys.executable, BENCHMARKS / "train.py", "--cpu", "--profile", "--cases", "tiny", "--json", out]
    command += ["--variants", "python", "recompute"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(out.read_text())["cases"]["tiny"]
    times = [kernel["ms"] for kernel in found["python"]["kernels"]]
    assert times == sorted(times, reverse=True) and times[0] > 0
    kept = {variant: sum(tensors["GB"] for tensors in figures["kept"]) for variant, figures in found.items()}
    assert 0 < kept["recompute"] < 0.5 * kept["python"]
