"""Continuous batching of both tasks (iteration-level scheduling, Orca, Yu et al. 2022) over fixed-size state slots.

A step decodes one token for everything that runs, lets waiting requests into the slots that are free, and reads a piece of
the prompts that came in. A sample owns one slot, a guided one two: the second has read the prompt without a caption. The
samples of a request are forks of one prefilled prompt.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Generator, Iterable, Sequence

import torch
from torch import Tensor

from omnimamba.config import Task
from omnimamba.engine.request import Event, FinishReason, OnEvent, Request, Sample
from omnimamba.engine.runner import Runner
from omnimamba.engine.sampler import SamplingRows, guide, sample, stream_key
from omnimamba.engine.scheduler import Scheduler
from omnimamba.model.omnimamba import OmniMambaModel


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
    num_tokens: int
    on_event: OnEvent | None
    sequences: list[_Sequence] = dataclasses.field(default_factory=list)
    """Those not finished; none while the job waits."""
    prompt: Tensor | None = None
    """[g, l, d] what is left to read."""


class Engine:
    """Runs requests for one model. Not thread-safe: one thread submits, steps and cancels.

    stop_ids end a text, suppressed_ids are never sampled in one (both of the text vocabulary). max_prefill_tokens bounds the
    positions of one prefill pass, padding included; longer prompts are read in pieces between decode steps.
    """

    def __init__(
        self,
        model: OmniMambaModel,
        *,
        stop_ids: Iterable[int] = (),
        suppressed_ids: Sequence[int] = (),
        num_slots: int = 16,
        max_prefill_tokens: int = 4096,
        ssm_dtype: torch.dtype = torch.float32,
    ) -> None:
        if max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens={max_prefill_tokens} reads no prompt; pass at least 1")
        self.scheduler = Scheduler(num_slots)
        self.runner = Runner(model, num_slots, ssm_dtype=ssm_dtype)
        self.config = model.config
        self.device = model.device
        self.stop_ids = frozenset(stop_ids)
        self.suppressed_ids = torch.tensor(suppressed_ids, dtype=torch.int64, device=self.device)
        self.max_prefill_tokens = max_prefill_tokens
        self._jobs: dict[int, _Job] = {}
        self._prefilling: list[_Job] = []
        self._running: list[_Sequence] = []
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def submit(self, request: Request, on_event: OnEvent | None = None) -> int:
        """The id of a request, now at the end of the queue. ValueError if it could never run.

        on_event gets each of its events at the end of the step that made it.
        """
        num_tokens = request.check(self.config)
        request_id = self._num_submitted
        self.scheduler.submit(request_id, request.num_samples * request.slots_per_sample)
        self._jobs[request_id] = _Job(request_id, request, num_tokens, on_event)
        self._num_submitted += 1
        return request_id

    def step(self) -> list[Event]:
        """The events of one step; none if there is nothing to do."""
        events = self._decode()
        self._admit()
        events += self._prefill()
        return self._send(events)

    def cancel(self, request_id: int) -> list[Event]:
        """A `cancelled` event for each sample of the request that is not finished; its slots are free at once."""
        job = self._jobs.get(request_id)
        if job is None:
            return []
        self.scheduler.withdraw(request_id)
        sequences = list(job.sequences)
        for sequence in sequences:
            self._finish(sequence)
        sample_idxs = [sequence.sample_idx for sequence in sequences] or list(range(job.request.num_samples))
        self._jobs.pop(request_id, None)
        return self._send([(job, Event(request_id, sample_idx, None, FinishReason.CANCELLED)) for sample_idx in sample_idxs])

    def stream(self, requests: Sequence[Request]) -> Generator[tuple[int, Event], None, None]:
        """(index of the request, event) of these requests as they come; whatever else is in the engine moves on beside them.

        Requests are checked and queued before the first event is asked for. Closing the iterator cancels what is left.
        """
        events: deque[Event] = deque()
        request_ids: list[int] = []
        try:
            for request in requests:
                request_ids.append(self.submit(request, events.append))
        except ValueError:
            self._cancel_all(request_ids)
            raise
        return self._events_of(request_ids, events, sum(request.num_samples for request in requests))

    def run(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Per request its finished samples."""
        samples = [[Sample() for _ in range(request.num_samples)] for request in requests]
        for request_idx, event in self.stream(requests):
            samples[request_idx][event.sample_idx].add(event)
        return samples

    # ---- the parts of a step

    def _decode(self) -> list[tuple[_Job, Event]]:
        """One token for every running sequence."""
        if not self._running:
            return []
        rows = sorted((slot, sequence.job.request.task) for sequence in self._running for slot in sequence.slots)
        last = {slot: sequence.tokens[-1] for sequence in self._running for slot in sequence.slots}
        slots = [slot for slot, _ in rows]
        logits = self.runner.decode(slots, [task for _, task in rows], [last[slot] for slot in slots])
        events = []
        for task, task_logits in logits.items():
            row = {slot: i for i, slot in enumerate(slot for slot, slot_task in rows if slot_task is task)}
            sequences = [sequence for sequence in self._running if sequence.job.request.task is task]
            rows_of = [(row[sequence.slots[0]], row[sequence.slots[-1]]) for sequence in sequences]
            events += self._advance(sequences, task_logits, rows_of)
        return events

    def _admit(self) -> None:
        """Gives slots to waiting requests; the first sample's slots will read the prompt."""
        for request_id, slots in self.scheduler.admit():
            job = self._jobs[request_id]
            request, g = job.request, job.request.slots_per_sample
            job.sequences = [
                _Sequence(job, i, slots[g * i : g * (i + 1)], stream_key(request.seed, request.first_sample + i))
                for i in range(request.num_samples)
            ]
            self.runner.reset(slots[:g])
            if request.state is not None:
                self.runner.load(slots[0], request.state)
            job.prompt = self.runner.embed_prompt(request)
            self._prefilling.append(job)

    def _prefill(self) -> list[tuple[_Job, Event]]:
        """Reads a piece of the oldest prompt and of others of its task; prompts that end give their samples' first tokens."""
        if not self._prefilling:
            return []
        first = self._prefilling[0]
        assert first.prompt is not None
        width = max(1, min(first.prompt.shape[1], self.max_prefill_tokens // first.prompt.shape[0]))
        jobs: list[_Job] = []
        slots: list[int] = []
        chunks: list[Tensor] = []
        for job in self._prefilling:
            assert job.prompt is not None
            if job is not first and (len(slots) + len(job.prompt)) * width > self.max_prefill_tokens:
                break
            if job.request.task is first.request.task:
                jobs.append(job)
                slots += job.sequences[0].slots
                chunks += job.prompt[:, :width].unbind(0)
                job.prompt = job.prompt[:, width:]
        logits = self.runner.prefill(slots, chunks, first.request.task)
        started: list[_Sequence] = []
        rows_of: list[tuple[int, int]] = []
        for job in jobs:
            assert job.prompt is not None
            if job.prompt.shape[1] == 0:
                self._prefilling.remove(job)
                job.prompt = None
                started += job.sequences
                prefilled = job.sequences[0].slots
                rows_of += [(slots.index(prefilled[0]), slots.index(prefilled[-1]))] * len(job.sequences)
                for i, slot in enumerate(prefilled):
                    self.runner.fork(slot, [sequence.slots[i] for sequence in job.sequences[1:]])
        self._running += started
        return self._advance(started, logits, rows_of)

    def _advance(self, sequences: list[_Sequence], logits: Tensor, rows_of: list[tuple[int, int]]) -> list[tuple[_Job, Event]]:
        """Samples the next token of each sequence from its (own, null) rows of `logits` and finishes those that end."""
        if not sequences:
            return []
        own, null = torch.tensor(rows_of, device=self.device).unbind(1)
        params = [sequence.job.request.sampling for sequence in sequences]
        keys, steps = [sequence.key for sequence in sequences], [len(sequence.tokens) for sequence in sequences]
        rows = SamplingRows.of(params, keys, steps, self.device)
        guided = guide(logits[own].float(), logits[null].float(), rows.guidance_scale)
        is_text = sequences[0].job.request.task is Task.MMU
        if is_text:
            guided[:, self.suppressed_ids] = -torch.inf
        events = []
        for sequence, token in zip(sequences, sample(guided, rows).tolist(), strict=True):
            sequence.tokens.append(token)
            job, reason, state = sequence.job, None, None
            if is_text and token in self.stop_ids:
                reason = FinishReason.STOP
            elif len(sequence.tokens) == job.num_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                state = self.runner.snapshot(sequence.slots[0]) if job.request.keep_state else None
                self._finish(sequence)
            events.append((job, Event(job.request_id, sequence.sample_idx, token, reason, state)))
        return events

    # ---- bookkeeping

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

    def _events_of(self, request_ids: list[int], events: deque[Event], num_samples: int) -> Generator[tuple[int, Event], None, None]:
        try:
            while num_samples:
                while not events:
                    self.step()
                event = events.popleft()
                num_samples -= event.finish_reason is not None
                yield request_ids.index(event.request_id), event
        finally:
            self._cancel_all(request_ids)

    def _cancel_all(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            self.cancel(request_id)
