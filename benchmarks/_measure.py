"""Time, read bandwidth and memory, on a GPU or a CPU."""

import collections
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Kernel(NamedTuple):
    name: str
    count: float
    ms: float


def kernels(run: Callable[[], Any], device: str, repeats: int = 1) -> list[Kernel]:
    """What a run has on the device, the longest first, those of one name apart by their grids; on a CPU, operators, those called by others
    counted twice."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    categories = ("kernel", "gpu_memcpy", "gpu_memset") if device == "cuda" else ("cpu_op",)
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(repeats):
            run()
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    times = collections.defaultdict(list)
    for event in events:
        if event.get("cat") in categories:
            grid = event["args"].get("grid")
            times[event["name"][:80] + (f" {grid}" if grid else "")].append(event["dur"] / 1e3)
    return sorted((Kernel(name, len(ms) / repeats, sum(ms) / repeats) for name, ms in times.items()), key=lambda kernel: -kernel.ms)


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
