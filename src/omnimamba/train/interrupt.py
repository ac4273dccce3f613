"""How a run is stopped from outside: SIGINT (Ctrl-C) and SIGTERM (job schedulers) are asked about between two steps.

Imports no torch, because the command line imports it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run that a signal has ended; what it has reached is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
        """That of a program that died of the signal."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Gives a function that returns the number of the stop signal that has come, 0 if none has.

    The second signal acts as if nobody listened, so an impatient user ends the program at once. Signals reach the main thread only;
    elsewhere the function always returns 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    received = 0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = number
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield lambda: received
    finally:
        restore()
