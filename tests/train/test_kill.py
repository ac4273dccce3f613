"""A run that is killed again and again ends in the weights of the uninterrupted one, to the bit, on one process and on two.

The suite kills OMNIMAMBA_KILLS times, 2 by default; all of it is
    OMNIMAMBA_KILLS=20 pytest -m slow tests/train/test_kill.py --timeout 1800
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from omnimamba.train import checkpoint
from omnimamba.train.metrics import read_log

NUM_KILLS = int(os.environ.get("OMNIMAMBA_KILLS", "2"))
STEPS_PER_KILL = 5
"""At most, after a start; more happen while it is being killed, so a run has three times as many."""
START = 60
"""Seconds that a program may take to start."""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


class Run:
    """The command line that trains."""

    def __init__(self, recipe: Path, out: Path, processes: int, **options: object) -> None:
        self.out, self.num_lines = out, 0
        overrides = [f"train.{name}={value}" for name, value in options.items()]
        command = [sys.executable, *(TORCHRUN if processes == 2 else []), "-m", "omnimamba", "train", str(recipe), f"out={out}", *overrides]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def wait_for_steps(self, num: int) -> None:
        """Returns when so many steps more are logged than were at its start. AssertionError if the run ends before."""
        log, deadline = self.out / "log.jsonl", time.monotonic() + START
        before = len(read_log(log)) if log.is_file() else 0
        while (len(read_log(log)) if log.is_file() else 0) < before + num:
            assert self.process.poll() is None, f"the run ended before it could be killed: {self.process.communicate()[1][-2000:]}"
            assert time.monotonic() < deadline, "no step"
            time.sleep(0.005)

    def kill(self, rng: random.Random, processes: int) -> None:
        """SIGKILL to all processes of the run, or, of two, now and then to one only: torchrun has to end the other."""
        workers = self.workers() if processes == 2 else []  # torchrun gives each a session of its own
        if len(workers) == 2 and rng.random() < 0.3:
            os.kill(rng.choice(workers), signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=40)
        for pid in (self.process.pid, *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=START)

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()] if children.exists() else []

    def finish(self) -> int:
        self.error = self.process.communicate(timeout=280)[1]
        return self.process.returncode


@pytest.fixture(scope="module")
def options(plain_stage2) -> dict[str, object]:
    steps = 3 * STEPS_PER_KILL * NUM_KILLS
    return {"steps": steps, "save_every": 1, "val_every": 0, "sample_every": 0, "keep_checkpoints": 2}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9(plain_stage2, options, processes, tmp_path, folder_tensors):
    whole = Run(plain_stage2, tmp_path / "whole", processes, **options | {"save_every": options["steps"]})
    assert whole.finish() == 0, whole.error

    rng, out = random.Random(processes), tmp_path / "killed"
    for _ in range(NUM_KILLS):
        run = Run(plain_stage2, out, processes, **options)
        run.wait_for_steps(rng.randint(0, STEPS_PER_KILL))
        time.sleep(rng.uniform(0, 0.1))
        run.kill(rng, processes)
        for path in checkpoint.step_folders(out / "checkpoints"):
            checkpoint.read(path)  # raises for one that is not whole
    last = Run(plain_stage2, out, processes, **options)
    assert last.finish() == 0, last.error

    name = f"step-{options['steps']:08d}"
    for part, tensors in ((f"checkpoints/{name}", checkpoint.read), ("model", folder_tensors)):
        expected, found = tensors(tmp_path / "whole" / part), tensors(out / part)
        assert found.keys() == expected.keys() and expected
        different = [tensor for tensor in expected if not torch.equal(found[tensor], expected[tensor])]
        assert not different, different[:5]
    losses = [[(line["step"], line["loss"]) for line in read_log(folder / "log.jsonl")] for folder in (tmp_path / "whole", out)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM)])
def test_stop_signals(plain_stage2, options, processes, number, tmp_path):
    """The step at hand is finished and saved, and the program says so."""
    run = Run(plain_stage2, tmp_path, processes, **options | {"steps": 10_000, "save_every": 0})
    run.wait_for_steps(3)
    run.process.send_signal(number)
    code = run.finish()
    (folder,) = checkpoint.step_folders(tmp_path / "checkpoints")
    step = len(read_log(tmp_path / "log.jsonl"))
    assert folder.name == f"step-{step:08d}" and step >= 3
    assert f"omnimamba: stopped by {number.name} after step {step}; the same command goes on from there" in run.error
    assert code == 128 + number if processes == 1 else code != 0
    checkpoint.read(folder)
