"""Which request gets which slots, first come first served. Pure bookkeeping: no tensors here."""

from __future__ import annotations

import bisect
from collections import deque


class Scheduler:
    """A pool of `num_slots` slots and the requests that wait for them.

    A request gets all of its slots at once. One that does not fit yet holds back those behind it, so none starves.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} has room for no sequence; pass at least 1")
        self.num_slots = num_slots
        self.free = list(range(num_slots))  # ascending
        self.waiting: deque[tuple[int, int]] = deque()  # (request id, slots needed)

    def submit(self, request_id: int, num_slots: int) -> None:
        """Puts a request at the end of the queue. ValueError if it could never run."""
        if num_slots > self.num_slots:
            raise ValueError(
                f"the request needs {num_slots} slots (2 a guided sample, else 1) but the engine has {self.num_slots}; "
                "ask for fewer samples, or raise num_slots"
            )
        self.waiting.append((request_id, num_slots))

    def admit(self) -> list[tuple[int, list[int]]]:
        """The requests that start now, each with its slots; the lowest free ones, so that running slots stay close together."""
        admitted = []
        while self.waiting and self.waiting[0][1] <= len(self.free):
            request_id, num_slots = self.waiting.popleft()
            admitted.append((request_id, self.free[:num_slots]))
            del self.free[:num_slots]
        return admitted

    def withdraw(self, request_id: int) -> None:
        """Takes a request out of the queue; nothing happens if it is not in it."""
        self.waiting = deque(entry for entry in self.waiting if entry[0] != request_id)

    def release(self, slots: list[int]) -> None:
        """Makes slots free again."""
        for slot in slots:
            assert slot not in self.free
            bisect.insort(self.free, slot)
