"""What runs beside the engine's thread."""

import threading

import pytest

from omnimamba.server.engine_thread import aside


def test_aside_runs_in_a_thread_that_ends():
    thread = aside(threading.current_thread)
    thread.join(10)
    assert thread is not threading.current_thread() and not thread.is_alive()


def test_aside_raises_what_the_function_raises():
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0)
