"""What runs beside the engine's thread."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from omnimamba.engine.request import Event, FinishReason
from omnimamba.server.engine_thread import EngineThread, Generation, Together, aside


def test_aside_runs_in_a_thread_that_ends():
    thread = aside(threading.current_thread)
    thread.join(10)
    assert thread is not threading.current_thread() and not thread.is_alive()


def test_aside_raises_what_the_function_raises():
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0)


def test_what_is_wanted_at_a_time_is_made_together():
    made = []

    def squares(numbers):
        made.append(list(numbers))
        return [number**2 for number in numbers]

    async def three():
        together = Together(squares)

        async def call(function):
            """As a busy thread does: everything posted runs later, one after the other."""
            await asyncio.sleep(0)
            return function()

        first = await asyncio.gather(*(together(call, items) for items in ([1], [2, 3], [])))
        return first, await together(call, [4])

    assert asyncio.run(three()) == ([[1], [4, 9], []], [16])
    assert made == [[1, 2, 3], [4]]


def test_all_of_them_hear_of_a_failure():
    async def two():
        together = Together(lambda numbers: [1 // number for number in numbers])

        async def call(function):
            await asyncio.sleep(0)
            return function()

        return await asyncio.gather(together(call, [1]), together(call, [0]), return_exceptions=True), await together(call, [1])

    failures, after = asyncio.run(two())
    assert [type(failure) for failure in failures] == [ZeroDivisionError] * 2 and after == [1]


class BlockEngine:
    """Each request has seven tokens, of which a step brings three of each at once."""

    def __init__(self):
        self.requests = []

    @property
    def has_work(self):
        return bool(self.requests)

    def submit(self, request, on_event):
        self.requests.append([on_event, list(range(7))])
        return len(self.requests) - 1

    def cancel(self, request_id):
        pass

    def step(self):
        events = []
        for _ in range(3):
            for i, (on_event, tokens) in enumerate(self.requests):
                if tokens:
                    token = tokens.pop(0)
                    events.append((on_event, Event(i, 0, token, None if tokens else FinishReason.LENGTH)))
        self.requests = [request for request in self.requests if request[1]]
        for on_event, event in events:
            on_event(event)
        return [event for _, event in events]


@pytest.mark.parametrize(("every", "expected"), [(1, [[0, 1, 2], [3, 4, 5], [6]]), (4, [[0, 1, 2, 3], [4, 5, 6]])])
def test_what_a_step_brings_is_one_batch(every, expected):
    async def two():
        thread = EngineThread(BlockEngine())
        thread.start()
        request = SimpleNamespace(num_samples=1, first_sample=0)
        generations = [Generation(thread, [request], every=every, seconds=10) for _ in range(2)]
        await thread.call(lambda: [generation._submit() for generation in generations])
        found = [[[event.token for _, event in batch] async for batch in generation] for generation in generations]
        await thread.stop()
        return found

    assert asyncio.run(two()) == [expected, expected]
