"""Continuous batching of both tasks (iteration-level scheduling, Orca, Yu et al. 2022) over fixed-size state slots.

A step decodes one token for everything that runs (a few where fused kernels do, see `Engine._block`), lets waiting requests
into the slots that are free, and reads a piece of the prompts that came in. A sample owns one slot, a guided one two: the
second has read the prompt without a caption. The samples of a request are forks of one prefilled prompt.

A pass that fails ends the requests that were in it, whose states it may have left half-written, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omnimamba.config import Task
from omnimamba.engine.request import Event, FinishReason, OnEvent, Request, Sample, UnreadImage
from omnimamba.engine.runner import DecodeSample, Runner
from omnimamba.engine.sampler import SamplingRows, guide, sample, stream_key
from omnimamba.engine.scheduler import QueueFull, Scheduler
from omnimamba.engine.state_cache import StateCache
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.ops.plain_path import launching_on

if TYPE_CHECKING:
    from omnimamba.engine.decoder import Block, FusedDecoder

logger = logging.getLogger(__name__)

NUM_MARKERS = 4
"""Ids of an MMU prompt around its image, [mmu][soi] and [eoi][sot]: the prefix that all questions about the image share."""
IMAGES_PER_PASS = 16
"""Images that pass the towers at once."""


@dataclasses.dataclass(eq=False)
class _Sequence:
    """One running sample."""

    job: _Job
    sample_idx: int
    slots: list[int]
    """The sample's own, and that of its null prompt if it is guided: first and last are the same without guidance."""
    key: int
    tokens: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Job:
    """A request on its way through the engine."""

    request_id: int
    request: Request
    """As submitted."""
    num_tokens: int
    on_event: OnEvent | None
    sequences: list[_Sequence] = dataclasses.field(default_factory=list)
    """Those not finished; none while the job waits."""
    prompt: Tensor | None = None
    """[g, l, d] what is left to read."""
    num_cached: int = 0
    """Positions of the prompt that a snapshot had read already."""
    num_to_image: int = 0
    """Positions left to the end of the image and its markers, where a snapshot is taken; 0 if none is."""


class Engine:
    """Runs requests for one model. Not thread-safe: one thread submits, steps and cancels.

    stop_ids end a text, suppressed_ids are never sampled in one (both of the text vocabulary). max_prefill_tokens bounds the
    positions of one prefill pass, padding included; longer prompts are read in pieces between decode steps. max_waiting bounds
    the queue, beside what fits into free slots. prefix_cache_bytes is the room for snapshots of prompts that requests with a
    `prefix_key` have read.
    """

    def __init__(
        self,
        model: OmniMambaModel,
        *,
        stop_ids: Iterable[int] = (),
        suppressed_ids: Sequence[int] = (),
        num_slots: int = 16,
        max_prefill_tokens: int = 4096,
        max_waiting: int | None = None,
        prefix_cache_bytes: int = 0,
        ssm_dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens={max_prefill_tokens} reads no prompt; pass at least 1")
        self.scheduler = Scheduler(num_slots, max_waiting=max_waiting)
        self.prefix_cache = StateCache(prefix_cache_bytes)
        self.stop_ids = frozenset(stop_ids)
        self.config = model.config
        self.device = model.device
        with launching_on(self.device):
            self.runner = Runner(model, num_slots, ssm_dtype=ssm_dtype, stop_ids=tuple(self.stop_ids), suppressed_ids=suppressed_ids)
        self.suppressed_ids = torch.tensor(suppressed_ids, dtype=torch.int64, device=self.device)
        self.max_prefill_tokens = max_prefill_tokens
        self._jobs: dict[int, _Job] = {}
        self._prefilling: list[_Job] = []
        self._running: list[_Sequence] = []
        self._under_way: tuple[Block, list[_Sequence]] | None = None
        """Steps that the device takes while the tokens of those before are awaited and handed on, and whose they are."""
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def submit(self, request: Request, on_event: OnEvent | None = None) -> int:
        """The id of a request, now at the end of the queue. ValueError if it could never run, QueueFull if it may not wait.

        on_event gets each of its events at the end of the step that made it.
        """
        num_tokens = request.check(self.config)
        request_id = self._num_submitted
        self.scheduler.submit(request_id, request.num_samples * request.slots_per_sample)
        self._jobs[request_id] = _Job(request_id, request, num_tokens, on_event)
        self._num_submitted += 1
        return request_id

    def step(self) -> list[Event]:
        """The events of one step; none if there is nothing to do. RuntimeError if the device itself is lost."""
        events: list[tuple[_Job, Event]] = []
        with launching_on(self.device):
            self._close_gaps()
            self._decode(events)
            self._admit(events)
            self._prefill(events)
        return self._send(events)

    def capture_steps(self) -> None:
        """Records decode steps of every number of rows, where steps are recorded at all: no request waits for it later."""
        if self.runner.decoder is not None:
            with launching_on(self.device):
                self.runner.decoder.capture_all(self.scheduler.num_slots)

    def cancel(self, request_id: int) -> list[Event]:
        """A `cancelled` event for each sample of the request that is not finished; its slots are free at once."""
        job = self._jobs.get(request_id)
        return [] if job is None else self._send(self._end(job, FinishReason.CANCELLED))

    def cancel_sample(self, request_id: int, sample_idx: int) -> list[Event]:
        """The `cancelled` event of one sample that has tokens already; the others of its request go on."""
        sequence = next((s for s in self._running if s.job.request_id == request_id and s.sample_idx == sample_idx), None)
        if sequence is None:
            return []
        self._finish(sequence)
        return self._send([(sequence.job, Event(request_id, sample_idx, None, FinishReason.CANCELLED))])

    def stream(self, requests: Sequence[Request]) -> Generator[tuple[int, Event], None, None]:
        """(index of the request, event) of these requests as they come; whatever else is in the engine moves on beside them.

        Requests are checked and queued before the first event is asked for. Closing the iterator cancels what is left. The
        error of a pass that failed is raised here.
        """
        events: deque[Event] = deque()
        request_ids: list[int] = []
        try:
            for request in requests:
                request_ids.append(self.submit(request, events.append))
        except (ValueError, QueueFull):
            self._cancel_all(request_ids)
            raise
        stream = self._events_of(request_ids, events, sum(request.num_samples for request in requests))
        next(stream)  # closing a generator that has not begun would cancel nothing
        return stream

    def run(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Per request its finished samples."""
        samples = [[Sample() for _ in range(request.num_samples)] for request in requests]
        for request_idx, event in self.stream(requests):
            samples[request_idx][event.sample_idx].add(event)
        return samples

    # ---- the parts of a step

    def _close_gaps(self) -> None:
        """Moves states into the gaps that finished sequences left, unless steps are under way, which know the old slots.

        Across gaps, a step would copy all states there and back.
        """
        if self._under_way is not None:
            return
        moves = self.scheduler.compact()
        for source, target in moves.items():
            self.runner.fork(source, [target])
        if moves:
            for job in self._jobs.values():
                for sequence in job.sequences:
                    sequence.slots = [moves.get(slot, slot) for slot in sequence.slots]

    def _decode(self, events: list[tuple[_Job, Event]]) -> None:
        """One token for every running sequence."""
        if not self._running:
            self._under_way = None
            return
        with self._failures_end([sequence.job for sequence in self._running], events):
            if self.runner.decoder is not None:
                self._block(self.runner.decoder, events)
                return
            rows = sorted((slot, sequence.job.request.task) for sequence in self._running for slot in sequence.slots)
            last = {slot: sequence.tokens[-1] for sequence in self._running for slot in sequence.slots}
            slots = [slot for slot, _ in rows]
            logits = self.runner.decode(slots, [task for _, task in rows], [last[slot] for slot in slots])
            for task, task_logits in logits.items():
                row = {slot: i for i, slot in enumerate(slot for slot, slot_task in rows if slot_task is task)}
                sequences = [sequence for sequence in self._running if sequence.job.request.task is task]
                rows_of = [(row[sequence.slots[0]], row[sequence.slots[-1]]) for sequence in sequences]
                self._advance(sequences, task_logits, rows_of, events)

    def _block(self, decoder: FusedDecoder, events: list[tuple[_Job, Event]]) -> None:
        """Tokens for every running sequence, drawn without a look at any between them.

        If no prompt is to be read, the next block is enqueued before this one is done, so that the device never waits for the host: it
        knows by itself which sequences have ended. While requests wait for slots, the host looks first, and stops if one has.
        """
        under_way, self._under_way = self._under_way, None
        block, sequences = under_way or self._start_block(decoder)
        running = set(self._running)  # others of the block may have been cancelled since it began
        if not self._prefilling and not self.scheduler.can_admit and running <= set(sequences):
            following = decoder.go_on_until_one_ends(block) if self.scheduler.waiting else decoder.go_on(block)
            self._under_way = None if following is None else (following, sequences)
        drawn = decoder.tokens(block)
        for step in range(max(map(len, drawn))):
            for sequence, tokens in zip(sequences, drawn, strict=True):
                if step < len(tokens) and sequence in running:
                    self._receive(sequence, tokens[step], events)

    def _start_block(self, decoder: FusedDecoder) -> tuple[Block, list[_Sequence]]:
        """One step while prompts are read or can be let in, for they come between steps. While requests wait for slots, none beyond the
        first length that is reached."""
        sequences = list(self._running)
        left = [sequence.job.num_tokens - len(sequence.tokens) for sequence in sequences]
        samples = [
            DecodeSample(
                (sequence.slots[0], sequence.slots[-1]),
                sequence.job.request.task,
                sequence.tokens[-1],
                sequence.job.request.sampling,
                sequence.key,
                len(sequence.tokens),
                num,
            )
            for sequence, num in zip(sequences, left, strict=True)
        ]
        most = min(left) if self.scheduler.waiting else max(left)
        num_steps = 1 if self._prefilling or self.scheduler.can_admit else min(most, decoder.options.max_steps)
        return decoder.start(samples, num_steps), sequences

    def _admit(self, events: list[tuple[_Job, Event]]) -> None:
        """Gives slots to waiting requests; the first sample's slots will read the prompt, or what no snapshot has read of it."""
        starting: dict[_Job, Request] = {}
        for request_id, slots in self.scheduler.admit():
            job = self._jobs[request_id]
            request, g = job.request, job.request.slots_per_sample
            job.sequences = [
                _Sequence(job, i, slots[g * i : g * (i + 1)], stream_key(request.seed, request.first_sample + i))
                for i in range(request.num_samples)
            ]
            starting[job] = self._after_prefix(job)
        self._encode(starting, events)
        for job, request in starting.items():
            if job.request_id not in self._jobs:  # its image could not be read
                continue
            with self._failures_end([job], events):
                slots = job.sequences[0].slots
                self.runner.reset(slots)
                if request.state is not None:
                    self.runner.load(slots[0], request.state)
                job.prompt = self.runner.embed_prompt(request)
                self._prefilling.append(job)

    def _after_prefix(self, job: _Job) -> Request:
        """The job's request, or the rest of it that goes on from a snapshot which has read the image and more."""
        request = job.request
        if request.prefix_key is not None:
            found = self.prefix_cache.find(request.prefix_key, request.ids)
            if found is not None:
                num_ids, state = found
                job.num_cached = num_ids + self.config.num_vision_tokens
                return dataclasses.replace(request, ids=request.ids[num_ids:], features=None, state=state)
            if request.features is not None and len(request.ids) > NUM_MARKERS:
                job.num_to_image = NUM_MARKERS + self.config.num_vision_tokens
        return request

    def _encode(self, starting: dict[_Job, Request], events: list[tuple[_Job, Event]]) -> None:
        """Puts features in the place of unread images: a few images in a pass, and one that several requests are about only once."""
        about: dict[tuple[object, object], list[_Job]] = {}  # jobs about one image, by the function that encodes it
        for job, request in starting.items():
            if isinstance(request.features, UnreadImage):
                about.setdefault((request.features.encode, request.prefix_key or job), []).append(job)
        passes: dict[Callable[[Sequence[Any]], Tensor], list[tuple[list[_Job], Any]]] = {}
        for jobs in about.values():
            image = starting[jobs[0]].features
            assert isinstance(image, UnreadImage)
            with self._failures_end(jobs, events):
                passes.setdefault(image.encode, []).append((jobs, image.pixels()))
        for encode, images in passes.items():
            for start in range(0, len(images), IMAGES_PER_PASS):
                part = images[start : start + IMAGES_PER_PASS]
                with self._failures_end([job for jobs, _ in part for job in jobs], events):
                    for (jobs, _), row in zip(part, encode([pixels for _, pixels in part]), strict=True):
                        starting.update({job: dataclasses.replace(starting[job], features=row) for job in jobs})

    def _prefill(self, events: list[tuple[_Job, Event]]) -> None:
        """Reads a piece of the oldest prompt and of others of its task; prompts that end give their samples' first tokens."""
        if not self._prefilling:
            return
        first = self._prefilling[0]
        assert first.prompt is not None
        width = max(1, min(first.prompt.shape[1], self.max_prefill_tokens // first.prompt.shape[0]))
        jobs: list[_Job] = []
        num_rows = 0
        for job in self._prefilling:
            assert job.prompt is not None
            if job is not first and (num_rows + len(job.prompt)) * width > self.max_prefill_tokens:
                break
            if job.request.task is first.request.task:
                jobs.append(job)
                num_rows += len(job.prompt)
        with self._failures_end(jobs, events):
            self._read(jobs, width, events)

    def _read(self, jobs: list[_Job], width: int, events: list[tuple[_Job, Event]]) -> None:
        """One prefill pass over at most `width` positions of each job's prompt."""
        slots: list[int] = []
        chunks: list[Tensor] = []
        reach_image: list[_Job] = []
        for job in jobs:
            assert job.prompt is not None
            num = min(width, job.num_to_image or width)
            slots += job.sequences[0].slots
            chunks += job.prompt[:, :num].unbind(0)
            job.prompt = job.prompt[:, num:]
            if job.num_to_image:
                job.num_to_image -= num
                reach_image += [job] * (job.num_to_image == 0)
        logits = self.runner.prefill(slots, chunks, jobs[0].request.task)
        started: list[_Sequence] = []
        rows_of: list[tuple[int, int]] = []
        for job in jobs:
            assert job.prompt is not None
            prefilled = job.sequences[0].slots
            if job in reach_image:
                self._keep_prefix(job, job.request.ids[:NUM_MARKERS], prefilled[0])
            if job.prompt.shape[1] == 0:
                self._prefilling.remove(job)
                job.prompt = None
                started += job.sequences
                rows_of += [(slots.index(prefilled[0]), slots.index(prefilled[-1]))] * len(job.sequences)
                for i, slot in enumerate(prefilled):
                    self.runner.fork(slot, [sequence.slots[i] for sequence in job.sequences[1:]])
        self._running += started
        self._advance(started, logits, rows_of, events)

    def _advance(
        self, sequences: list[_Sequence], logits: Tensor, rows_of: list[tuple[int, int]], events: list[tuple[_Job, Event]]
    ) -> None:
        """Samples the next token of each sequence from its (own, null) rows of `logits` and finishes those that end."""
        if not sequences:
            return
        own, null = torch.tensor(rows_of, device=self.device).unbind(1)
        params = [sequence.job.request.sampling for sequence in sequences]
        keys, steps = [sequence.key for sequence in sequences], [len(sequence.tokens) for sequence in sequences]
        rows = SamplingRows.of(params, keys, steps, self.device)
        # index_select: see Runner.decode
        guided = guide(logits.index_select(0, own).float(), logits.index_select(0, null).float(), rows.guidance_scale)
        if sequences[0].job.request.task is Task.MMU:
            guided[:, self.suppressed_ids] = -torch.inf
        for sequence, token in zip(sequences, sample(guided, rows).tolist(), strict=True):
            self._receive(sequence, token, events)

    def _receive(self, sequence: _Sequence, token: int, events: list[tuple[_Job, Event]]) -> None:
        """Takes in the next token of a sequence and finishes it if that is its last."""
        sequence.tokens.append(token)
        job, reason, state = sequence.job, None, None
        if job.request.task is Task.MMU and token in self.stop_ids:
            reason = FinishReason.STOP
        elif len(sequence.tokens) == job.num_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            state = self.runner.snapshot(sequence.slots[0]) if job.request.keep_state else None
            if job.request.prefix_key is not None:
                self._keep_prefix(job, (*job.request.ids, *sequence.tokens[:-1]), sequence.slots[0])
            self._finish(sequence)
        events.append((job, Event(job.request_id, sequence.sample_idx, token, reason, state, job.num_cached)))

    # ---- bookkeeping

    def _keep_prefix(self, job: _Job, ids: tuple[int, ...], slot: int) -> None:
        """Puts a snapshot of `slot`, which has read the job's image and `ids`, into the cache."""
        assert job.request.prefix_key is not None
        if not self.prefix_cache.has(job.request.prefix_key, ids):
            self.prefix_cache.add(job.request.prefix_key, ids, self.runner.snapshot(slot))

    @contextlib.contextmanager
    def _failures_end(self, jobs: list[_Job], events: list[tuple[_Job, Event]]) -> Iterator[None]:
        """An error inside ends `jobs` with an event that carries it. It goes on to the caller if the device is lost."""
        jobs = list(dict.fromkeys(jobs))
        try:
            yield
        except Exception as error:
            logger.exception("a pass of the engine failed; %d requests end", len(jobs))
            for job in jobs:
                if job.request_id in self._jobs:
                    events += self._end(job, FinishReason.ERROR, error)
            torch.zeros(1, device=self.device).item()  # raises where the device takes no more work

    def _end(self, job: _Job, reason: FinishReason, error: Exception | None = None) -> list[tuple[_Job, Event]]:
        """Takes out all that is left of a job, in the queue or in slots: an event for each sample that was not finished."""
        self.scheduler.withdraw(job.request_id)
        sequences = list(job.sequences)
        for sequence in sequences:
            self._finish(sequence)
        sample_idxs = [sequence.sample_idx for sequence in sequences] or list(range(job.request.num_samples))
        self._jobs.pop(job.request_id, None)
        return [(job, Event(job.request_id, sample_idx, None, reason, error=error)) for sample_idx in sample_idxs]

    def _finish(self, sequence: _Sequence) -> None:
        """Takes a sequence out and frees its slots."""
        job = sequence.job
        job.sequences.remove(sequence)
        self.scheduler.release(sequence.slots)
        if sequence in self._running:
            self._running.remove(sequence)
        if not job.sequences:
            if job in self._prefilling:
                self._prefilling.remove(job)
            del self._jobs[job.request_id]

    def _send(self, sent: list[tuple[_Job, Event]]) -> list[Event]:
        """The events, each shown to its request's `on_event`. The engine is between steps here, so that may submit and cancel."""
        for job, event in sent:
            if job.on_event is not None:
                job.on_event(event)
        return [event for _, event in sent]

    def _events_of(self, request_ids: list[int], events: deque[Event], num_samples: int) -> Generator[Any, None, None]:
        """(index of the request, event) of the requests as they come, after a first None."""
        try:
            yield None
            while num_samples:
                while not events:
                    self.step()
                event = events.popleft()
                if event.error is not None:
                    raise event.error
                num_samples -= event.finish_reason is not None
                yield request_ids.index(event.request_id), event
        finally:
            self._cancel_all(request_ids)

    def _cancel_all(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self.cancel(request_id)
