"""Training steps as CUDA graphs: a step that has been recorded is one launch, where Python would make some thousand.

A recording works on fixed addresses and shapes. So each set of shapes that batches come in has buffers of its own; a batch is copied into
them, and the step runs on them: the first time from Python, which compiles kernels and makes the optimizer's state, the second time it is
recorded, and from then on the recording plays. All three compute the same, to the bit, dropout included: a graph draws from the generators
as they are seeded when it plays.

What a step keeps must stay where it is: weights, the optimizer's state and the learning rate (a tensor, see `optim.adamw`). Gradients come
and go within it. What changes from step to step must come in through the batch, the generators or the learning rate.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from omnimamba.data.kept import Kept

Figures = dict[str, Tensor]
Part = Mapping[Any, Any]  # of NamedTuples of tensors and None
Parts = Sequence[Part]
"""Of a batch, computed one after the other."""
MAX_RECORDINGS = 32
"""Sets of shapes that are kept, each with its graph and the buffers of a batch. `nano`'s stage 2 meets 3."""


def mapped(part: Part, change: Callable[[Tensor], Tensor]) -> dict[Any, Any]:
    """The part with each of its tensors changed."""
    return {key: type(value)(*(None if tensor is None else change(tensor) for tensor in value)) for key, value in part.items()}


def shapes_of(parts: Parts) -> Hashable:
    return tuple((key, *(None if tensor is None else tensor.shape for tensor in value)) for part in parts for key, value in part.items())


class Recorder(Protocol):
    def run(self, step: Callable[[], Figures]) -> Figures:
        """What a step returns that runs from Python, with the surroundings that a recording has."""
        ...

    def record(self, step: Callable[[], Figures]) -> Callable[[], Figures]:
        """A recording of the step, which has not run yet. It returns the same tensors whenever it plays, with new values."""
        ...


class GraphRecorder:
    """CUDA graphs on one stream. They share one memory pool, for none reads what another has left there."""

    def __init__(self, generator: torch.Generator) -> None:
        """generator: what steps draw from beside the default one."""
        self.generator = generator
        self.stream, self.pool = torch.cuda.Stream(generator.device), torch.cuda.graph_pool_handle()

    def run(self, step: Callable[[], Figures]) -> Figures:
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True", UserWarning)  # it will be captured
            figures = step()
        outer.wait_stream(self.stream)
        return figures

    def record(self, step: Callable[[], Figures]) -> Callable[[], Figures]:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        # thread_local: the thread that makes batches allocates and copies meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            figures = step()

        def play() -> Figures:
            graph.replay()
            return figures

        return play


@dataclasses.dataclass
class _Bucket:
    parts: Parts
    """The buffers."""
    play: Callable[[], Figures] | None = None
    has_run: bool = False


class RecordedSteps:
    """A training step that is recorded for each set of shapes; `run(parts, step)` may not depend on the step's number.

    Of more than MAX_RECORDINGS sets, those used last are kept. One that comes back begins anew, so rare shapes run from Python.
    """

    def __init__(self, run: Callable[[Parts, int], Figures], device: torch.device, recorder: Recorder) -> None:
        self.run, self.device, self.recorder = run, device, recorder
        self.buckets = Kept(MAX_RECORDINGS)

    def __call__(self, parts: Parts, step: int) -> Figures:
        """What `run` returns. The next step may overwrite it."""
        bucket = self.buckets.get(
            shapes_of(parts), lambda: _Bucket([mapped(part, lambda tensor: torch.empty_like(tensor, device=self.device)) for part in parts])
        )
        for buffers, part in zip(bucket.parts, parts, strict=True):
            for name, value in part.items():
                for buffer, tensor in zip(buffers[name], value, strict=True):
                    if tensor is not None:
                        buffer.copy_(tensor, non_blocking=True)
        if not bucket.has_run:
            bucket.has_run = True
            return self.recorder.run(lambda: self.run(bucket.parts, step))
        if bucket.play is None:
            bucket.play = self.recorder.record(lambda: self.run(bucket.parts, step))
        return bucket.play()
