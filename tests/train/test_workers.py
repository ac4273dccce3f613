"""Runs over several processes: each run is done once, failures and dead processes cost no other, and a signal ends all."""

import importlib
import os
import signal
import threading
import time

import pytest

from omnimamba.train.interrupt import Interrupted
from omnimamba.train.workers import Run, run_all, visible_gpus

WORK = """
import os, time
from pathlib import Path

def work(folder, name, kept):
    made = kept.get("made", lambda: name)
    with open(Path(folder) / name, "x") as file:
        file.write(f"{os.getpid()} {made} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    print("text of", name, flush=True)
    if name == "fails":
        raise ValueError("so it says")
    if name == "dies":
        os.write(2, b"last words")
        os._exit(3)
    time.sleep(60 if name.startswith("long") else 0.3)
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A function that a new process can import, too."""
    (tmp_path / "work_of_the_test.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("work_of_the_test").work


def runs(folder, names):
    folder.mkdir()
    return [Run(f"run {name}", folder / "logs" / name / "log.txt", (str(folder), name)) for name in names]


@pytest.mark.slow
def test_each_run_is_done_once(tmp_path, work, caplog):
    out = tmp_path / "out"
    names = ["a", "fails", "dies", "b", "c", "d"]
    failed = run_all(runs(out, names), work, jobs=2, gpus=["7", "8"])
    assert sorted(run.name for run in failed) == ["run dies", "run fails"]
    assert "ValueError: so it says" in caplog.text and "last words" in caplog.text
    assert "run fails failed: ValueError;" in caplog.text and "run dies failed: its process ended with exit code 3;" in caplog.text
    assert all((out / "logs" / name / "log.txt").read_text().startswith(f"text of {name}\n") for name in names)
    facts = {name: (out / name).read_text().split() for name in names}
    assert len({pid for pid, *_ in facts.values()}) <= 4  # two processes, each replaced at most once
    assert {gpu for *_, gpu in facts.values()} == {"7", "8"}
    for name, (pid, made, _) in facts.items():
        assert made == next(other for other in names if facts[other][0] == pid), name  # by the first of the process


@pytest.mark.slow
def test_a_signal_ends_all(tmp_path, work):
    out = tmp_path / "out"
    todo = runs(out, ["long-1", "long-2", "long-3"])

    def stop():
        deadline = time.monotonic() + 60
        while len(list(out.glob("long-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(Interrupted, match="SIGINT"):
        run_all(todo, work, jobs=2)
    thread.join()
    pids = [int(file.read_text().split()[0]) for file in out.glob("long-*") if file.read_text()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_visible_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-ab")
    assert visible_gpus() == ["3", "GPU-ab"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
