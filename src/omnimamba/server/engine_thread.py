"""The engine in a thread of its own, and the bridge between it and asyncio.

All work on the model is done in that thread, one thing after another: commands that coroutines post, then a step, and so on.
What a step brings forth is handed to the event loop in one go.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Event, Request
from omnimamba.server.errors import ApiError

logger = logging.getLogger(__name__)

RATE_SECONDS = 10.0
"""Tokens per second are counted over this long."""
STOP_SECONDS = 30.0

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")


def aside(function: Callable[[], T]) -> T:
    """What `function` returns or raises in a thread that ends with it. For work on tensors outside of the engine's thread.

    Each thread that ran a parallel operator has OpenMP threads of its own for as long as it lives. If there are more of them than cores,
    libgomp sends them to sleep at the end of every operator, and the engine's pay for the waking.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return future.result()


class EngineStopped(ApiError):
    """The engine's thread has come to an end, and all its requests with it."""

    def __init__(self) -> None:
        super().__init__(503, "the engine has stopped; this server answers no more", code="engine_stopped")


class EngineThread:
    """Runs `engine`. `on_failure` is called in the event loop if the thread ends by an error: nothing more will be answered."""

    def __init__(self, engine: Engine, *, on_failure: Callable[[], None] | None = None) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self.num_tokens = 0
        self.step_began: float | None = None
        """time.monotonic() of the work under way; None while there is nothing to do."""
        self._on_failure = on_failure
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._outbox: dict[_Inbox, list[tuple[int, Event]]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: set[asyncio.Future] = set()
        self._inboxes: set[_Inbox] = set()
        self._counts: deque[tuple[float, int]] = deque()  # (time, tokens until then)

    # ---- in the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step under way; requests that are left fail. A step that does not end is left behind."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, STOP_SECONDS)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def post(self, command: Callable[[], object]) -> None:
        """Has the thread run `command` before its next step."""
        self._commands.put(command)

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises in the thread."""
        if not self.is_alive:
            raise EngineStopped
        assert self._loop is not None
        loop, future = self._loop, self._loop.create_future()
        self._calls.add(future)

        def settle(result: T | None, error: Exception | None) -> None:
            if future.done():  # the caller was cancelled
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def command() -> None:
            result = error = None
            try:
                result = function()
            except Exception as caught:  # of whatever kind: it is raised again where the call is awaited
                error = caught
            loop.call_soon_threadsafe(settle, result, error)

        self.post(command)
        try:
            return await future
        finally:
            self._calls.discard(future)

    def tokens_per_second(self) -> float:
        """Between the first and the last token of the last RATE_SECONDS."""
        now = time.monotonic()
        recent = [(at, num) for at, num in list(self._counts) if now - at <= RATE_SECONDS]
        (first, before), (last, until) = (recent[0], recent[-1]) if recent else ((0.0, 0), (0.0, 0))
        return (until - before) / (last - first) if last > first else 0.0

    def _deliver(self, outbox: dict[_Inbox, list[tuple[int, Event]]]) -> None:
        for inbox, batch in outbox.items():
            inbox.put_nowait(batch)

    def _fail_all(self) -> None:
        error = EngineStopped()
        for future in self._calls:
            if not future.done():
                future.set_exception(error)
        for inbox in self._inboxes:
            inbox.put_nowait(error)
        if self.failure is not None and self._on_failure is not None:
            self._on_failure()

    # ---- in the thread

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while self._obey():
                if self.engine.has_work:
                    self.step_began = time.monotonic()
                    self._count(self.engine.step())
                    self.step_began = None
                if self._outbox:
                    outbox, self._outbox = self._outbox, {}
                    self._loop.call_soon_threadsafe(self._deliver, outbox)
        except BaseException as error:  # whatever it is, all requests must hear that nothing comes any more
            logger.critical("the engine's thread ends", exc_info=True)
            self.failure = error
        self._loop.call_soon_threadsafe(self._fail_all)

    def _obey(self) -> bool:
        """Runs the commands posted so far, waiting for one if there is nothing else to do. False if one was to stop."""
        is_idle = not self.engine.has_work and not self._outbox
        for _ in range(self._commands.qsize() or is_idle):
            command = self._commands.get()
            if command is None:
                return False
            self.step_began = time.monotonic()
            command()
            self.step_began = None
        return True

    def _count(self, events: Sequence[Event]) -> None:
        self.num_tokens += sum(event.token is not None for event in events)
        now = time.monotonic()
        self._counts.append((now, self.num_tokens))
        while now - self._counts[0][0] > RATE_SECONDS:
            self._counts.popleft()


class Together(Generic[Item, Result]):
    """A function of a list, called in the thread once for all who want something of it by then: a GPU makes many images as fast as one."""

    def __init__(self, function: Callable[[list[Item]], Sequence[Result]]) -> None:
        """function: gives a result for each item, whatever else is in the list."""
        self._function = function
        self._wanted: deque[_Wanted[Item, Result]] = deque()

    async def __call__(
        self, call: Callable[[Callable[[], Sequence[Result]]], Awaitable[Sequence[Result]]], items: Sequence[Item]
    ) -> Sequence[Result]:
        """The results of the items, or what the function raised. call: runs something in the thread, as `EngineThread.call` does."""
        mine = _Wanted[Item, Result](items)
        self._wanted.append(mine)
        return await call(lambda: self._results(mine))

    def _results(self, mine: _Wanted[Item, Result]) -> Sequence[Result]:
        if mine.results is None and mine.error is None:
            wanted = [self._wanted.popleft() for _ in range(len(self._wanted))]
            try:
                results = iter(self._function([item for one in wanted for item in one.items]))
                for one in wanted:
                    one.results = [next(results) for _ in one.items]
            except Exception as error:
                for one in wanted:
                    one.error = error
        if mine.error is not None:
            raise mine.error
        assert mine.results is not None
        return mine.results


@dataclasses.dataclass
class _Wanted(Generic[Item, Result]):
    items: Sequence[Item]
    results: Sequence[Result] | None = None
    error: Exception | None = None


_Inbox = asyncio.Queue[list[tuple[int, Event]] | Exception]


class Generation:
    """Requests under way: between `start` and `close` an iterator of batches of (sample index, event).

    The requests may be parts of one (`OmniMamba.split_samples`): samples count from the whole's first. A batch comes after every
    `every` tokens of each sample, and whenever one ends; what a step of the engine brings at once is one. TimeoutError `seconds` after
    the start.
    """

    def __init__(self, thread: EngineThread, requests: Sequence[Request], *, every: int = 1, seconds: float) -> None:
        self.began = time.monotonic()
        self.first_token_at: float | None = None
        """time.monotonic() of the first token of any sample."""
        self._thread, self._requests, self._every = thread, requests, every
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._inbox: _Inbox = asyncio.Queue()
        self._ids: list[int] = []
        self._num_left = sum(request.num_samples for request in requests)

    async def start(self) -> None:
        """Queues all requests. ValueError or QueueFull if one is not let in."""
        self._thread._inboxes.add(self._inbox)
        await self.call(self._submit)

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises in the thread."""
        async with asyncio.timeout_at(self._deadline):
            return await self._thread.call(function)

    def close(self) -> None:
        """Cancels what is left."""
        self._thread._inboxes.discard(self._inbox)
        self._thread.post(self._cancel)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[tuple[int, Event]]:
        if self._num_left == 0:
            raise StopAsyncIteration
        async with asyncio.timeout_at(self._deadline):
            batch = await self._inbox.get()
        if isinstance(batch, Exception):
            raise batch
        self._num_left -= sum(event.finish_reason is not None for _, event in batch)
        return batch

    def cancel_sample(self, sample_idx: int) -> None:
        """Ends a sample that has tokens already; its last event says so."""
        for request, request_id in zip(self._requests, self._ids, strict=True):
            idx = sample_idx - request.first_sample
            if 0 <= idx < request.num_samples:
                self._thread.post(functools.partial(self._thread.engine.cancel_sample, request_id, idx))

    # ---- in the thread

    def _submit(self) -> None:
        for request in self._requests:
            self._ids.append(self._thread.engine.submit(request, self._collector(request)))

    def _cancel(self) -> None:
        for request_id in self._ids:
            self._thread.engine.cancel(request_id)

    def _collector(self, request: Request) -> Callable[[Event], None]:
        batch: list[tuple[int, Event]] = []
        num_running = request.num_samples

        def collect(event: Event) -> None:
            nonlocal batch, num_running
            batch.append((request.first_sample + event.sample_idx, event))
            if self.first_token_at is None and event.token is not None:
                self.first_token_at = time.monotonic()
            num_running -= event.finish_reason is not None
            if event.finish_reason is not None or len(batch) >= self._every * num_running:
                self._thread._outbox.setdefault(self._inbox, []).extend(batch)
                batch = []

        return collect
