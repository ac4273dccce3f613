"""What runs beside the engine's thread."""

import asyncio
import threading

import pytest

from omnimamba.server.engine_thread import Together, aside


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
