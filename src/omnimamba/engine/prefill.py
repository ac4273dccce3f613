"""The pass over a piece of prompts and, on a GPU, such passes as CUDA graphs, one per bucket of rows, positions and task.

From Python, a pass of the 1.3B model over one prompt takes longer to launch than to compute. A bucket's first pass runs from Python, and
compiles its kernels; the second is captured, and from then on it is one launch. Rows and positions that fill a bucket up change nothing:
positions are behind the rows' `lengths`, rows repeat the first one, slot and all.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omnimamba.config import Task
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.state import MambaState

ROWS = (1, 2, 4, 8)
LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
MAX_POSITIONS = 4096
"""Of all rows of a bucket; above, a pass takes longer to compute than to launch. So there are 40 buckets of each task at most."""


def read(model: OmniMambaModel, x: Tensor, task: Task, state: MambaState, slots: Tensor, lengths: Tensor | None) -> Tensor:
    """Logits [b, v] after the last position of each row; the rows go on from their slots of `state`, which are updated in place.

    x: [b, l, d] embeddings without positions, finite in the padding; slots: [b]; lengths: [b] of right-padded rows, None where no row is
    padded.
    """
    x = x + position_rows(model, state.position[slots, None] + torch.arange(x.shape[1], device=x.device), task).to(x.dtype)
    hidden = model.backbone.read(x, task, state, slots=slots, lengths=lengths)
    last = hidden[:, -1] if lengths is None else hidden[torch.arange(x.shape[0], device=x.device), lengths - 1]
    return model.logits(last, task)


def position_rows(model: OmniMambaModel, position: Tensor, task: Task) -> Tensor:
    """Rows of the task's table [..., d], the last one again past its end (requests that may not get there are refused)."""
    table = model.positions[task]
    return F.embedding(position.clamp(max=table.shape[0] - 1), table)


@dataclasses.dataclass
class _Bucket:
    """The inputs of a pass, at fixed addresses, and its output once it is captured."""

    x: Tensor
    """[b, l, d] embeddings without positions."""
    lengths: Tensor
    slots: Tensor
    logits: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None
    num_passes: int = 0


class PrefillGraphs:
    """Passes on the slots of `state`. The model's weights must stay where they are while it lives."""

    def __init__(self, model: OmniMambaModel, state: MambaState, *, use_graphs: bool = True) -> None:
        self.model = model
        self.state = state
        self.use_graphs = use_graphs
        self._buckets: dict[tuple[int, int, Task], _Bucket] = {}
        self._pool = torch.cuda.graph_pool_handle() if use_graphs else None

    def covers(self, num_rows: int, length: int) -> bool:
        """Whether a bucket holds so many rows, the longest of `length` positions."""
        return num_rows <= ROWS[-1] and length <= LENGTHS[-1] and rounded_up(num_rows, ROWS) * rounded_up(length, LENGTHS) <= MAX_POSITIONS

    @torch.no_grad()
    def run(self, slots: Sequence[int], chunks: Sequence[Tensor], task: Task) -> Tensor:
        """See `Runner.prefill`."""
        num_rows = len(slots)
        b, l = rounded_up(num_rows, ROWS), rounded_up(max(map(len, chunks)), LENGTHS)
        bucket = self._bucket(b, l, task)
        rows = [*range(num_rows), *[0] * (b - num_rows)]
        for i, row in enumerate(rows):
            bucket.x[i, : len(chunks[row])] = chunks[row]
        bucket.lengths.copy_(torch.tensor([len(chunks[row]) for row in rows]))
        bucket.slots.copy_(torch.tensor([slots[row] for row in rows]))
        bucket.num_passes += 1
        if not self.use_graphs or bucket.num_passes == 1:
            return read(self.model, bucket.x, task, self.state, bucket.slots, bucket.lengths)[:num_rows]
        if bucket.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                bucket.logits = read(self.model, bucket.x, task, self.state, bucket.slots, bucket.lengths)
            bucket.graph = graph
        bucket.graph.replay()
        assert bucket.logits is not None
        return bucket.logits[:num_rows].clone()

    def _bucket(self, b: int, l: int, task: Task) -> _Bucket:
        if (b, l, task) not in self._buckets:
            device, d = self.model.device, self.model.config.backbone.d_model
            x = torch.zeros(b, l, d, dtype=self.model.dtype, device=device)
            lengths, slots = (torch.zeros(b, dtype=torch.int64, device=device) for _ in range(2))
            self._buckets[b, l, task] = _Bucket(x, lengths, slots)
        return self._buckets[b, l, task]


def rounded_up(size: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that is not below `size`."""
    return sizes[bisect.bisect_left(sizes, size)]
