"""Which request gets which slots, first come first served. Pure bookkeeping: no tensors here."""

from __future__ import annotations

import bisect
from collections import deque


class QueueFull(RuntimeError):
    """As many requests wait as may; try again later."""


class Scheduler:
    """A pool of `num_slots` slots and the requests that wait for them, at most `max_waiting` beside those that fit into free ones.

    A request gets all of its slots at once. One that does not fit yet holds back those behind it, so none starves.
    """

    def __init__(self, num_slots: int, *, max_waiting: int | None = None) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots={num_slots} has room for no sequence; pass at least 1")
        if max_waiting is not None and max_waiting < 1:
            raise ValueError(f"max_waiting={max_waiting} lets no request in; pass at least 1, or None for no bound")
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.free = list(range(num_slots))  # ascending
        self.waiting: deque[tuple[int, int]] = deque()  # (request id, slots needed)

    def submit(self, request_id: int, num_slots: int) -> None:
        """Puts a request at the end of the queue. ValueError if it could never run, QueueFull if the queue is full."""
        if num_slots > self.num_slots:
            raise ValueError(
                f"the request needs {num_slots} slots (2 a guided sample, else 1) but the engine has {self.num_slots}; "
                "ask for fewer samples, or raise num_slots"
            )
        if self.max_waiting is not None and self.num_held_back >= self.max_waiting:
            raise QueueFull(f"{self.num_held_back} requests wait already, as many as may; try again later")
        self.waiting.append((request_id, num_slots))

    @property
    def num_held_back(self) -> int:
        """Requests in the queue that `admit` would leave there."""
        num_free = len(self.free)
        for idx, (_, num_slots) in enumerate(self.waiting):
            num_free -= num_slots
            if num_free < 0:
                return len(self.waiting) - idx
        return 0

    @property
    def can_admit(self) -> bool:
        """Whether `admit` would let a request in."""
        return bool(self.waiting) and self.waiting[0][1] <= len(self.free)

    def admit(self) -> list[tuple[int, list[int]]]:
        """The requests that start now, each with its slots; the lowest free ones."""
        admitted = []
        while self.can_admit:
            request_id, num_slots = self.waiting.popleft()
            admitted.append((request_id, self.free[:num_slots]))
            del self.free[:num_slots]
        return admitted

    def withdraw(self, request_id: int) -> None:
        """Takes a request out of the queue; nothing happens if it is not in it."""
        self.waiting = deque(entry for entry in self.waiting if entry[0] != request_id)

    def compact(self) -> dict[int, int]:
        """Moves the highest slots that are held to the lowest free ones, so that those held have no gaps: {from: to}."""
        num_held = self.num_slots - len(self.free)
        gaps = [slot for slot in self.free if slot < num_held]
        above = [slot for slot in range(num_held, self.num_slots) if slot not in self.free]
        self.free = list(range(num_held, self.num_slots))
        return dict(zip(above, gaps, strict=True))

    def release(self, slots: list[int]) -> None:
        """Makes slots free again."""
        for slot in slots:
            assert slot not in self.free
            bisect.insort(self.free, slot)
