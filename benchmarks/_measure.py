"""Time, read bandwidth and memory, on a GPU or a CPU."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 2  # a captured pass compiles in its first run and is captured in its second


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], repeats: int, device: str, before: Callable[[], Any] = lambda: None) -> float:
    """Median time of `run`, what the host adds included; `before` is not timed."""
    times = []
    for i in range(WARM_UPS + repeats):
        before()
        synchronize(device)
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            start_time = time.perf_counter()
            run()
            elapsed = (time.perf_counter() - start_time) * 1e3
        if i >= WARM_UPS:
            times.append(elapsed)
    return statistics.median(times)


def read_bandwidth(device: str) -> float:
    """Bytes per second of summing 4 GiB (256 MiB on a CPU)."""
    values = torch.ones(2**30 if device == "cuda" else 2**26, device=device)
    return values.nbytes / milliseconds(values.sum, 20, device) * 1e3


class Memory:
    """GB of a GPU's memory that tensors take beyond those that were there at first; on a CPU, None."""

    def __init__(self, device: str) -> None:
        self.is_gpu = device == "cuda"
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated()

    def restart(self) -> None:
        """Forgets the peak."""
        if self.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def now(self) -> float | None:
        return (torch.cuda.memory_allocated() - self.before) / 1e9 if self.is_gpu else None

    def peak(self) -> float | None:
        return (torch.cuda.max_memory_allocated() - self.before) / 1e9 if self.is_gpu else None
