"""Decode on a GPU: whole steps, from token to next sampled token, as CUDA graphs over the state pool.

A step embeds each row's token, runs the blocks (`ops/triton/decode.py`) on the rows' slots in place, scores the vocabulary of each row's
task and draws the next token (`ops/triton/decode_sample.py`). Nothing in it depends on the host, so a block of steps is as many replays
of one graph, and the tokens are read once at its end. Graphs are captured on first use, one per (bucket of rows, tasks, filters).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnimamba.config import Task
from omnimamba.engine.request import SamplingParams
from omnimamba.engine.runner import DecodeSample
from omnimamba.engine.sampler import SamplingRows, guide, sample, signed
from omnimamba.model.mamba2 import Mamba2Block
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.state import MambaState
from omnimamba.ops.cuda import mix_rows, project_rows
from omnimamba.ops.cuda.backbone_step import BackboneStep, Buffers, Shape, device_shape
from omnimamba.ops.norm import Squares
from omnimamba.ops.quant import QuantizedWeight
from omnimamba.ops.triton import decode as kernels
from omnimamba.ops.triton import decode_sample as sampling
from omnimamba.ops.triton.decode import Embedding, LayerWeights, Lora, MixerWeights, Shift, Weight
from omnimamba.ops.triton.decode_sample import Partial, Rows


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """How steps run. The defaults are the fastest measured (docs/LOG.md)."""

    use_graphs: bool | None = None
    """None: on a GPU."""
    use_pdl: bool | None = None
    """Programmatic dependent launch; None: where the GPU has it."""
    use_one_launch: bool | None = None
    """All layers and the heads in one launch (`ops/cuda/backbone_step.py`); None: where it can."""
    max_vector_rows: int = 2
    """Up to so many rows, a layer is three launches that multiply matrix and vectors; above, projections are matrix products."""
    min_streamed_rows: int = 8
    """From so many rows on, states are updated on their way through shared memory (`ops/cuda/mix_rows.py`), where that can be."""
    max_product_rows: int = 64
    """Up to so many rows, projections are products of our own, out_proj in parts that the next norm adds up."""
    max_steps: int = 16
    """Steps of a block at most."""


class _Bucket:
    """Static buffers of a number of rows; `rows` are views of `ints` and `floats`."""

    def __init__(self, b: int, num_parts: int, max_steps: int, device: torch.device) -> None:
        num_ints = len(Rows._fields) - 3
        pin = device.type == "cuda"
        self.b = b
        self.host_ints = torch.zeros(num_ints, b, dtype=torch.int64, pin_memory=pin)
        self.host_floats = torch.zeros(3, b, pin_memory=pin)
        self.results = [
            (torch.zeros(num_ints, b, dtype=torch.int64, pin_memory=pin), torch.zeros(b, max_steps, dtype=torch.int64, pin_memory=pin))
            for _ in range(2)
        ]
        """`ints` and `drawn` after a block, for two blocks in turn."""
        self.ints = torch.zeros(num_ints, b, dtype=torch.int64, device=device)
        self.floats = torch.zeros(3, b, device=device)
        self.drawn = torch.zeros(b, max_steps, dtype=torch.int64, device=device)
        self.rows = Rows(*self.ints, *self.floats)
        self.partial = Partial(
            torch.zeros(b, num_parts, device=device),
            torch.zeros(b, num_parts, device=device),
            torch.zeros(b, num_parts, dtype=torch.int64, device=device),
        )
        self.ints[Rows._fields.index("slots")] = -1


@dataclasses.dataclass(frozen=True)
class Block:
    """Steps that are under way, or done."""

    bucket: _Bucket
    tasks: frozenset[Task]
    is_filtered: bool
    num: int
    """Blocks before this one since its samples were put in their rows."""
    left: tuple[int, ...]
    """Steps that each sample has yet to take after the block; a text may have ended earlier, by a stop id."""
    done: torch.cuda.Event | None
    """None: they are done."""

    def of(self, field: str) -> Tensor:
        """A field of the bucket's rows [b] after the block, which must be done."""
        return self.bucket.results[self.num % 2][0][Rows._fields.index(field)]


class FusedDecoder:
    """Decodes on the slots of `state`. The model's weights must not change while it lives.

    LoRA A moves to the memory below its in_proj (`pack`): the model's parameters stay what they were, as views of it.
    """

    def __init__(
        self,
        model: OmniMambaModel,
        state: MambaState,
        image_table: Tensor,
        *,
        stop_ids: Sequence[int] = (),
        suppressed_ids: Sequence[int] = (),
        options: DecodeOptions = DecodeOptions(),
    ) -> None:
        config, device = model.config, model.device
        self.config = config
        self.state = state
        self.options = options
        self.device = device
        self.eps = config.backbone.norm_eps
        self.pdl = kernels.has_dependent_launch(device) if options.use_pdl is None else options.use_pdl
        self.use_graphs = device.type == "cuda" if options.use_graphs is None else options.use_graphs
        self.layers = [pack_layer(block, state.conv[i], state.ssm[i]) for i, block in enumerate(model.backbone.layers)]
        self.final_norm = model.backbone.norm_f.weight
        self.heads = {Task.T2I: weight_of(model.image_embedding.weight), Task.MMU: weight_of(model.text_embedding.weight)}
        self.embedding = Embedding(image_table, self.heads[Task.MMU], *(model.positions[task] for task in (Task.T2I, Task.MMU)))
        self.text_flags = torch.zeros(config.text_vocab_size, dtype=torch.int32, device=device)
        self.text_flags[list(suppressed_ids)] |= sampling.SUPPRESSED.value
        self.text_flags[list(stop_ids)] |= sampling.STOPS.value
        self._dtype = self.final_norm.dtype
        self._counters = torch.zeros(len(self.layers), 1, dtype=torch.int32, device=device)
        self._width = config.backbone.d_in_proj + self.layers[0].lora.A.shape[0]
        self._buckets: dict[int, _Bucket] = {}
        self._graphs: dict[tuple[int, frozenset[Task], bool], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.use_graphs else None
        self._workspace: dict[tuple[str, int], Tensor] = {}
        self._launches: dict[tuple[int, frozenset[Task]], BackboneStep] = {}

    # ---- blocks of steps

    def start(self, samples: Sequence[DecodeSample], num_steps: int) -> Block:
        """Enqueues steps of the samples, at most max_steps, whose slots are updated in place."""
        bucket = self.fill(samples)
        tasks = frozenset(sample.task for sample in samples)
        is_filtered = any(is_filtering(sample.params) for sample in samples)
        return self._enqueue(bucket, tasks, is_filtered, 0, [sample.remaining for sample in samples], num_steps)

    def go_on(self, block: Block) -> Block | None:
        """Enqueues the next block of a block's samples, which may be under way: as many steps as one may have, or as are left to the
        longest sample. None if none are.

        Nothing is told to the device anew, which knows what has ended by a stop id: meanwhile no sample may have been moved to another
        slot. The tokens of a block are to be read before the next but one is enqueued.
        """
        num_steps = min(self.options.max_steps, max(block.left))
        return self._follow(block, num_steps) if num_steps > 0 else None

    def go_on_until_one_ends(self, block: Block) -> Block | None:
        """The same, once the block is done, up to the first length that is reached. None if any sample has ended."""
        self.wait(block)
        is_sample = block.of("null_rows") >= 0
        if (block.of("slots")[is_sample] < 0).any():
            return None
        return self._follow(block, min(self.options.max_steps, *block.left))

    def _follow(self, block: Block, num_steps: int) -> Block:
        block.bucket.rows.emitted.zero_()
        return self._enqueue(block.bucket, block.tasks, block.is_filtered, block.num + 1, block.left, num_steps)

    def _enqueue(self, bucket: _Bucket, tasks: frozenset[Task], is_filtered: bool, num: int, left: Sequence[int], num_steps: int) -> Block:
        """left: steps of each sample before these."""
        assert 1 <= num_steps <= self.options.max_steps, num_steps
        for _ in range(num_steps):
            self.replay(bucket, tasks, is_filtered)
        ints, drawn = bucket.results[num % 2]
        ints.copy_(bucket.ints, non_blocking=True)
        drawn.copy_(bucket.drawn, non_blocking=True)
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self.device))
        return Block(bucket, tasks, is_filtered, num, tuple(steps - num_steps for steps in left), done)

    @staticmethod
    def wait(block: Block) -> None:
        if block.done is not None:
            block.done.synchronize()

    def tokens(self, block: Block) -> list[list[int]]:
        """Those that a block has drawn for each sample: one a step, fewer where the sample ended."""
        self.wait(block)
        drawn, emitted = block.bucket.results[block.num % 2][1].tolist(), block.of("emitted").tolist()
        own_rows = [row for row, null in enumerate(block.of("null_rows").tolist()) if null >= 0]
        return [drawn[row][: emitted[row]] for row in own_rows]

    def run(self, samples: Sequence[DecodeSample], num_steps: int) -> list[list[int]]:
        """The next tokens of each sample: num_steps (at most max_steps), or fewer where it ended. Their slots are updated in place."""
        return self.tokens(self.start(samples, num_steps))

    def fill(self, samples: Sequence[DecodeSample]) -> _Bucket:
        """Puts the samples in the rows of a bucket; a guided one takes two neighbours, its own first."""
        num_rows = sum(1 + (sample.slots[0] != sample.slots[1]) for sample in samples)
        bucket = self.bucket(num_rows)
        ints, floats = bucket.host_ints, bucket.host_floats
        values: list[tuple[int, ...]] = []
        settings: list[tuple[float, float, float]] = []
        for s in samples:
            params, row = s.params, len(values)
            is_guided = s.slots[0] != s.slots[1]
            is_greedy = params.temperature == 0 or params.top_k == 1
            shared = (signed(s.key), s.step, params.top_k, int(is_greedy), s.remaining, 0)
            for i in range(1 + is_guided):
                null_row = row + is_guided if i == 0 else -1
                values.append((s.token, s.slots[i], int(s.task is Task.T2I), null_row, *shared))
                settings.append((params.temperature, params.top_p, params.guidance_scale))
        ints.zero_()
        ints[Rows._fields.index("slots")] = -1
        ints[Rows._fields.index("null_rows")] = -1
        ints[:, :num_rows] = torch.tensor(values, dtype=torch.int64).T
        floats[:, :num_rows] = torch.tensor(settings).T
        bucket.ints.copy_(ints, non_blocking=True)
        bucket.floats.copy_(floats, non_blocking=True)
        return bucket

    def bucket(self, num_rows: int) -> _Bucket:
        """The smallest bucket of a power of two of rows."""
        b = 1 << (num_rows - 1).bit_length()
        if b not in self._buckets:
            num_parts = max(sampling.num_parts(self.config.image_vocab_size), sampling.num_parts(self.config.text_vocab_size))
            self._buckets[b] = _Bucket(b, num_parts, self.options.max_steps, self.device)
        return self._buckets[b]

    def replay(self, bucket: _Bucket, tasks: frozenset[Task], is_filtered: bool) -> None:
        """One step of what is in the bucket."""
        if not self.use_graphs:
            self._step(bucket, tasks, is_filtered)
            return
        self._graph(bucket, tasks, is_filtered).replay()

    def capture_all(self, num_rows: int) -> None:
        """Records the steps of all batches up to so many rows, so that none of them has to wait for it."""
        if not self.use_graphs:
            return
        alone = [frozenset({task}) for task in Task]
        for b in (1 << i for i in range((num_rows - 1).bit_length() + 1)):
            for tasks in alone if b == 1 else [*alone, frozenset(Task)]:
                for is_filtered in (False, True):
                    self._graph(self.bucket(b), tasks, is_filtered)

    def _graph(self, bucket: _Bucket, tasks: frozenset[Task], is_filtered: bool) -> torch.cuda.CUDAGraph:
        key = (bucket.b, tasks, is_filtered)
        if key not in self._graphs:
            self._graphs[key] = self._capture(bucket, tasks, is_filtered)
        return self._graphs[key]

    def _capture(self, bucket: _Bucket, tasks: frozenset[Task], is_filtered: bool) -> torch.cuda.CUDAGraph:
        """Compiles the kernels on rows that are padding, then records a step."""
        ints = bucket.ints.clone()
        bucket.rows.slots.fill_(-1)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._step(bucket, tasks, is_filtered)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        bucket.ints.copy_(ints)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(bucket, tasks, is_filtered)
        return graph

    # ---- one step

    def logits(self, samples: Sequence[DecodeSample]) -> dict[Task, Tensor]:
        """One step without its sampling: per task the logits [b, v] of all rows, those of samples in order, null prompts included."""
        return self._logits(self.fill(samples), frozenset(sample.task for sample in samples))

    def _step(self, bucket: _Bucket, tasks: frozenset[Task], is_filtered: bool) -> None:
        logits = self._logits(bucket, tasks)
        if is_filtered:
            self._filter(bucket, logits)
            parts = (1, 1)
        else:
            sampling.score(logits.get(Task.T2I), logits.get(Task.MMU), self.text_flags, bucket.rows, bucket.partial, pdl=self.pdl)
            parts = (sampling.num_parts(self.config.image_vocab_size), sampling.num_parts(self.config.text_vocab_size))
        sampling.finish(self.text_flags, bucket.rows, bucket.partial, bucket.drawn, parts=parts, pdl=self.pdl)

    @torch.no_grad()
    def _logits(self, bucket: _Bucket, tasks: frozenset[Task]) -> dict[Task, Tensor]:
        b, rows = bucket.b, bucket.rows
        residual = self._buffer("residual", b, self.config.backbone.d_model, torch.float32)
        path = self.path(b)
        next = self._entering(b) if path == "hopper" else None
        kernels.embed(rows.tokens, rows.is_t2i, rows.slots, self.state.position, self.embedding, residual, next, pdl=self.pdl)
        steps = {"one launch": self._one_launch, "vector": self._vector_step, "matrix": self._matrix_step, "hopper": self._hopper_step}
        return steps[path](b, rows, residual, tasks)

    def path(self, b: int) -> str:
        """How a bucket of b rows is computed: `one launch`, `vector`, `hopper` or `matrix`, see `DecodeOptions`."""
        if b > self.options.max_vector_rows:
            fits = self._streamed(b) and project_rows.fits(self.layers[0], list(self.heads.values()), b, self.device)
            return "hopper" if fits else "matrix"
        return "one launch" if self.options.use_one_launch is not False and self._shape(b) else "vector"

    def _streamed(self, b: int) -> mix_rows.Shape | None:
        return mix_rows.device_shape(self.layers[0], b, self.device) if b >= self.options.min_streamed_rows else None

    def _shape(self, b: int) -> Shape | None:
        return device_shape(self.layers[0], list(self.heads.values()), b, self.device)

    def _one_launch(self, b: int, rows: Rows, residual: Tensor, tasks: frozenset[Task]) -> dict[Task, Tensor]:
        """Logits [b, v] of each task, by a kernel that goes through all layers."""
        logits = self._logit_buffers(b, tasks, torch.float32)
        if (b, tasks) not in self._launches:
            shape = self._shape(b)
            assert shape is not None
            heads, buffers = [self.heads[task] for task in logits], Buffers(rows.slots, rows.is_t2i, residual, list(logits.values()))
            self._launches[b, tasks] = BackboneStep(shape, self.layers, self.final_norm, heads, buffers, eps=self.eps)
        self._launches[b, tasks]()
        return logits

    def _vector_step(self, b: int, rows: Rows, residual: Tensor, tasks: frozenset[Task]) -> dict[Task, Tensor]:
        """The same by products of matrix and vector."""
        config = self.config.backbone
        projected = self._buffer("projected", b, self._width, torch.float32)
        y = self._buffer("y", b, config.d_inner, torch.float32)
        newest = self._buffer("newest", b, 2 * config.d_state, torch.float32)
        for layer in self.layers:
            kernels.project(residual, layer.norm, layer.in_proj, projected, eps=self.eps, lora=layer.lora, pdl=self.pdl)
            kernels.mix(projected, layer.lora, layer.mixer, layer.conv, layer.ssm, rows.slots, rows.is_t2i, y, newest, pdl=self.pdl)
            kernels.project(
                y, layer.gated_norm, layer.out_proj, residual, eps=self.eps, add=True, shift=Shift(layer.conv, rows.slots, newest),
                pdl=self.pdl,
            )  # fmt: skip
        logits = self._logit_buffers(b, tasks, torch.float32)
        for task in tasks:
            kernels.project(residual, self.final_norm, self.heads[task], logits[task], eps=self.eps, pdl=self.pdl)
        return logits

    def _logit_buffers(self, b: int, tasks: frozenset[Task], dtype: torch.dtype) -> dict[Task, Tensor]:
        return {task: self._buffer(f"{task} logits in {dtype}", b, self.heads[task].values.shape[0], dtype) for task in tasks}

    def _matrix_step(self, b: int, rows: Rows, residual: Tensor, tasks: frozenset[Task]) -> dict[Task, Tensor]:
        """The same by matrix products, in the model's dtype."""
        config = self.config.backbone
        u = self._buffer("u", b, config.d_model, self._dtype)
        projected = self._buffer("matrix projected", b, self._width, self._dtype)
        newest = self._buffer("newest", b, 2 * config.d_state, torch.float32)
        gated = self._buffer("gated", b, config.d_inner, self._dtype)
        has_products = b <= self.options.max_product_rows
        has_own_in_proj = has_products and self._dtype != torch.float32 and kernels.matrix_tile(config.d_model, 1) > 0
        num_parts = kernels.matrix_parts(config.d_inner) if has_products and self.layers[0].out_proj.scale is None else 0
        if num_parts:
            mixed = self._buffer("mixed parts", num_parts * b, config.d_model, torch.float32).view(num_parts, b, -1)
        else:
            mixed = self._buffer("mixed", b, config.d_model, self._dtype)
        streamed = self._streamed(b)
        behind: dict[str, Any] = {}  # what the next norm does for a layer
        for layer, counter in zip(self.layers, self._counters, strict=True):
            kernels.norm(residual, layer.norm, u, eps=self.eps, **behind, pdl=self.pdl)
            if has_own_in_proj and layer.packed is not None:
                kernels.multiply_parts(u, layer.packed, projected[None], pdl=self.pdl)
            else:
                multiply_with_lora(u, layer, projected)
            behind = {"addend": mixed}
            shift = Shift(layer.conv, rows.slots, newest)
            if streamed is None:
                y = self._buffer("y", b, config.d_inner, torch.float32)
                kernels.mix(projected, layer.lora, layer.mixer, layer.conv, layer.ssm, rows.slots, rows.is_t2i, y, newest, pdl=self.pdl)
                kernels.norm(y, layer.gated_norm, gated, eps=self.eps, shift=shift, pdl=self.pdl)
            else:
                mixed_rows = self._mixed(b, streamed, gated)
                behind |= {"squares": Squares(mixed_rows.squares, config.d_inner), "shift": shift}
                mix_rows.mix_rows(streamed, projected, layer, rows.slots, rows.is_t2i, mixed_rows, counter, pdl=self.pdl)
            if num_parts:
                kernels.multiply_parts(gated, layer.out_proj.values, mixed, pdl=self.pdl)
            else:
                multiply(gated, layer.out_proj, mixed)
        kernels.norm(residual, self.final_norm, u, eps=self.eps, **behind, pdl=self.pdl)
        logits = self._logit_buffers(b, tasks, self._dtype)
        for task in tasks:
            multiply(u, self.heads[task], logits[task])
        return logits

    def _entering(self, b: int) -> kernels.Normed:
        """What the first layer of `_hopper_step` begins with."""
        u = self._buffer("u", max(b, project_rows.WHOLE), self.config.backbone.d_model, self._dtype)
        return kernels.Normed(self.layers[0].norm, u, self._buffer("first squares", b, 1, torch.float32))

    def _hopper_step(self, b: int, rows: Rows, residual: Tensor, tasks: frozenset[Task]) -> dict[Task, Tensor]:
        """The same in three kernels a layer, and one for a head: none for norms."""
        config, streamed = self.config.backbone, self._streamed(b)
        assert streamed is not None
        num_squares = project_rows.num_squares(self.layers[0], b, self.device)
        entering = self._entering(b)
        u = project_rows.Rows(entering.values, self._buffer("u squares", b, num_squares, torch.float32))
        projected = self._buffer("matrix projected", b, self._width, self._dtype)
        mixed = self._mixed(b, streamed, self._buffer("gated", max(b, project_rows.WHOLE), config.d_inner, self._dtype))
        gated = project_rows.Rows(mixed.gated, mixed.squares)
        rows_in = project_rows.Rows(entering.values, entering.squares)
        next_norms = [*(layer.norm for layer in self.layers[1:]), self.final_norm]
        for layer, counter, next_norm in zip(self.layers, self._counters, next_norms, strict=True):
            assert layer.packed is not None
            project_rows.project_in(rows_in, layer.packed, projected, eps=self.eps, pdl=self.pdl)
            mix_rows.mix_rows(streamed, projected, layer, rows.slots, rows.is_t2i, mixed, counter, pdl=self.pdl)
            shift = Shift(layer.conv, rows.slots, mixed.newest)
            project_rows.project_out(gated, layer.out_proj.values, residual, next_norm, u, shift, eps=self.eps, pdl=self.pdl)
            rows_in = u
        logits = self._logit_buffers(b, tasks, self._dtype)
        for task in tasks:
            project_rows.project_in(u, self.heads[task].values, logits[task], eps=self.eps, pdl=self.pdl)
        return logits

    def _mixed(self, b: int, streamed: mix_rows.Shape, gated: Tensor) -> mix_rows.Mixed:
        squares = self._buffer("squares", b, streamed.row_chunks, torch.float32)
        return mix_rows.Mixed(gated, squares, self._buffer("newest", b, 2 * self.config.backbone.d_state, torch.float32))

    @torch.no_grad()
    def _filter(self, bucket: _Bucket, logits: dict[Task, Tensor]) -> None:
        """Tokens of the sampler with top-k and top-p, as the one part that `finish` chooses from."""
        rows = bucket.rows
        own_null = rows.null_rows.clamp(min=0)
        settings = SamplingRows(
            rows.temperature, rows.top_k, rows.top_p, rows.guidance_scale, rows.keys, rows.steps, rows.is_greedy.bool(), False, True
        )
        tokens = torch.zeros_like(rows.tokens)
        for task, scores in logits.items():
            guided = guide(scores.float(), scores[own_null].float(), rows.guidance_scale)
            if task is Task.MMU:
                guided = guided.masked_fill((self.text_flags & sampling.SUPPRESSED.value) != 0, -torch.inf)
            tokens = torch.where(rows.is_t2i == (task is Task.T2I), sample(guided, settings), tokens)
        bucket.partial.maximum[:, 0] = 0
        bucket.partial.score[:, 0] = 0
        bucket.partial.token[:, 0] = tokens

    def buffers(self) -> list[Tensor]:
        """All that a step writes and no later step reads, so far."""
        return list(self._workspace.values())

    def _buffer(self, name: str, b: int, width: int, dtype: torch.dtype) -> Tensor:
        """The [b, width] of this name, which lives as long as the graphs that use it."""
        key = (name, b)
        if key not in self._workspace:
            self._workspace[key] = torch.zeros(b, width, dtype=dtype, device=self.device)
        return self._workspace[key]


def is_filtering(params: SamplingParams) -> bool:
    """Whether top-k or top-p excludes tokens of a sample that is drawn at random."""
    return params.temperature > 0 and params.top_k != 1 and (params.top_k > 0 or params.top_p < 1)


def weight_of(parameter: Tensor | QuantizedWeight) -> Weight:
    return Weight(parameter.values, parameter.scale) if isinstance(parameter, QuantizedWeight) else Weight(parameter)


def multiply(u: Tensor, weight: Weight, out: Tensor) -> None:
    """out [b, n] = u @ weight.T; numbers of 8 bits are exact in u's dtype, and their scales multiply the products."""
    if weight.scale is None:
        torch.mm(u, weight.values.T, out=out)
    else:
        torch.mul(u @ weight.values.to(u.dtype).T, weight.scale, out=out)


def multiply_with_lora(u: Tensor, layer: LayerWeights, out: Tensor) -> None:
    """out [b, n + 2 * r] = u @ in_proj.T, followed by u @ lora_A.T."""
    if layer.packed is not None:
        torch.mm(u, layer.packed.T, out=out)
        return
    n = layer.in_proj.values.shape[0]
    multiply(u, layer.in_proj, out[:, :n])
    out[:, n:] = u @ layer.lora.A.T


def pack(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts [n_i, k] as one matrix, whose views the parts become, unless they are the views of one already."""
    first, offset = parts[0], parts[0].storage_offset()
    neighbours = []
    for part in parts:
        neighbours.append((part.untyped_storage().data_ptr(), part.storage_offset()) == (first.untyped_storage().data_ptr(), offset))
        offset += part.numel()
    num_rows, k = sum(part.shape[0] for part in parts), first.shape[1]
    if all(neighbours):
        return first.detach().as_strided((num_rows, k), (k, 1))
    packed = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, packed.split([part.shape[0] for part in parts]), strict=True):
        part.data = rows
    return packed


@torch.no_grad()
def pack_layer(block: nn.Module, conv: Tensor, ssm: Tensor) -> LayerWeights:
    assert isinstance(block, Mamba2Block)
    mixer = block.mixer
    in_proj = mixer.in_proj
    n, d = in_proj.weight.shape
    pairs = [str(task) for task in (Task.MMU, Task.T2I)]
    if in_proj.lora_A:
        A = torch.cat([in_proj.lora_A[task] for task in pairs])
        B = torch.stack([in_proj.lora_B[task] for task in pairs])
    else:  # a pair that adds nothing
        A, B = block.norm.weight.new_zeros(2, d), block.norm.weight.new_zeros(2, n, 1)
    packed = None
    if isinstance(in_proj.weight, Tensor):
        packed = pack([in_proj.weight, *(in_proj.lora_A[task] for task in pairs)] if in_proj.lora_A else [in_proj.weight, A])
        A = packed[n:]
    return LayerWeights(
        norm=block.norm.weight,
        in_proj=weight_of(in_proj.weight),
        packed=packed,
        lora=Lora(A, B, in_proj.scaling),
        mixer=MixerWeights(mixer.conv1d.weight[:, 0].contiguous(), mixer.bias, mixer.A_log, mixer.D, mixer.dt_bias),
        gated_norm=mixer.norm.weight,
        out_proj=weight_of(mixer.out_proj.weight),
        conv=conv,
        ssm=ssm,
    )
