"""Many runs in a few processes that last: each run is taken by one of them, and what runs share is made once in each.

The processes are spread over the visible GPUs. What a run writes goes to a log of its own. One that fails, or takes its process with it,
is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from omnimamba.data.kept import Kept
from omnimamba.train.interrupt import Interrupted, stop_requests

logger = logging.getLogger("omnimamba.train")
POLL_SECONDS = 0.2
GRACE_SECONDS = 60.0
"""For a run that is stopped to write its checkpoint."""
SHOWN_LINES = 12
"""Of the log of a run that failed."""
LOG_FORMAT = "%(asctime)s %(message)s"


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    log: Path
    """What it writes is added to this file."""
    values: tuple[Any, ...]
    """What `work` is called with."""


Work = Callable[..., None]
"""Called in a process with a run's values and the process's `Kept`; can be pickled."""


class Worker:
    def __init__(self, work: Work, gpu: str, num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, work, gpu, num_threads), daemon=True)
        self.process.start()
        theirs.close()

    def start(self, run: Run) -> None:
        self.run, self.since = run, time.monotonic()
        with contextlib.suppress(OSError):  # a process that has died is seen when it is waited for
            self.pipe.send(run)

    def problem(self) -> str:
        """Why the run failed, empty if it did not; waits for its end."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(GRACE_SECONDS)
            return f"its process ended with exit code {self.process.exitcode}"

    def join(self) -> None:
        """Waits for the process to end, but not for ever."""
        self.process.join(GRACE_SECONDS)
        self.process.kill()
        self.process.join()


def run_all(runs: Sequence[Run], work: Work, *, jobs: int, gpus: Sequence[str] = ()) -> list[Run]:
    """Does the runs, the first ones first, `jobs` at once; returns those that failed.

    gpus: what CUDA_VISIBLE_DEVICES is set to, process after process. SIGINT and SIGTERM stop all and raise `Interrupted`.
    """
    left, failed = deque(runs), list[Run]()
    num_threads = max(1, torch.get_num_threads() // jobs)
    idle: list[Worker | int] = list(range(min(jobs, len(runs))))  # a place where no process is yet, or the one there
    places: dict[Connection, int] = {}
    busy: dict[Connection, Worker] = {}
    workers: list[Worker] = []
    with stop_requests() as stop_signal:
        try:
            while left or busy:
                while left and idle:
                    worker = idle.pop(0)
                    if isinstance(worker, int):
                        place, worker = worker, Worker(work, gpus[worker % len(gpus)] if gpus else "", num_threads)
                        places[worker.pipe] = place
                        workers.append(worker)
                    logger.info("%s begins", left[0].name)
                    worker.start(left.popleft())
                    busy[worker.pipe] = worker
                for pipe in wait(list(busy), POLL_SECONDS):
                    assert isinstance(pipe, Connection)
                    worker = busy.pop(pipe)
                    if problem := worker.problem():
                        failed.append(worker.run)
                        log = worker.run.log
                        logger.error("%s failed: %s; the end of %s:\n%s", worker.run.name, problem, log, last_lines(log))
                        idle.append(places[pipe])  # a new process, for an error may leave this one without its GPU
                        pipe.close()
                    else:
                        logger.info("%s is done, %.0f s", worker.run.name, time.monotonic() - worker.since)
                        idle.append(worker)
                if number := stop_signal():
                    raise Interrupted(f"stopped by {signal.Signals(number).name}; the same command goes on from there", number)
        finally:
            for worker in busy.values():
                worker.process.terminate()  # training ends between two steps, with a checkpoint
            for worker in workers:
                worker.pipe.close()  # which ends those without a run
            for worker in workers:
                worker.join()
    return failed


def last_lines(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return "\n".join(f"    {line}" for line in lines[-SHOWN_LINES:])


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; without touching them."""
    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in names.split(",") if name.strip()]
    return [str(i) for i in range(torch.cuda.device_count())]


# ---- in the process


def serve(pipe: Connection, work: Work, gpu: str, num_threads: int) -> None:
    """Does the runs that come through the pipe, and says of each why it failed, an empty text if it did not."""
    os.setpgid(0, 0)  # Ctrl-C goes to the one who started this, who passes it on
    threading.Thread(target=end_with_parent, daemon=True).start()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(num_threads)
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    logging.getLogger("omnimamba").setLevel(logging.INFO)
    kept = Kept()
    with contextlib.suppress(EOFError, OSError):  # the other end is closed
        while True:
            run = pipe.recv()
            with output_to(run.log):
                try:
                    work(*run.values, kept=kept)
                    problem = ""
                except Exception as error:
                    traceback.print_exc()
                    problem = type(error).__name__
            pipe.send(problem)


def end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def output_to(file: Path) -> Iterator[None]:
    """Within, what this process writes, libraries in C included, goes to the end of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    saved = {number: os.dup(number) for number in (1, 2)}
    with file.open("ab") as log:
        for number in saved:
            os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in saved.items():
            os.dup2(copy, number)
            os.close(copy)
