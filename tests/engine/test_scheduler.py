"""Slots and queue, without any model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from omnimamba.engine.scheduler import QueueFull, Scheduler


def test_lowest_slots_first_come_first_served():
    scheduler = Scheduler(5)
    for request_id, num_slots in enumerate((2, 2, 2, 1)):
        scheduler.submit(request_id, num_slots)
    assert scheduler.admit() == [(0, [0, 1]), (1, [2, 3])]
    assert scheduler.admit() == []  # request 3 would fit, but request 2 is ahead of it
    scheduler.release([1, 0])
    assert scheduler.admit() == [(2, [0, 1]), (3, [4])]
    assert scheduler.free == [] and not scheduler.waiting


def test_withdrawn_requests_make_way():
    scheduler = Scheduler(1)
    for request_id in range(3):
        scheduler.submit(request_id, 1)
    assert scheduler.admit() == [(0, [0])]
    scheduler.withdraw(1)
    scheduler.withdraw(0)  # it runs: not in the queue
    scheduler.release([0])
    assert scheduler.admit() == [(2, [0])]


def test_requests_that_never_fit():
    with pytest.raises(ValueError, match="needs 3 slots .* has 2"):
        Scheduler(2).submit(0, 3)
    with pytest.raises(ValueError, match="num_slots=0"):
        Scheduler(0)
    with pytest.raises(ValueError, match="max_waiting=0"):
        Scheduler(1, max_waiting=0)


def test_a_full_queue_refuses():
    scheduler = Scheduler(1, max_waiting=2)
    scheduler.submit(0, 1)
    assert scheduler.admit() == [(0, [0])]
    scheduler.submit(1, 1)
    scheduler.submit(2, 1)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.submit(3, 1)
    scheduler.withdraw(1)
    scheduler.submit(3, 1)
    scheduler.release([0])
    assert scheduler.admit() == [(2, [0])]


def test_requests_that_fit_into_free_slots_do_not_fill_the_queue():
    scheduler = Scheduler(3, max_waiting=2)
    for request_id in range(3 + 2):
        scheduler.submit(request_id, 1)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.submit(5, 1)
    assert [request_id for request_id, _ in scheduler.admit()] == [0, 1, 2] and len(scheduler.waiting) == 2


def test_requests_behind_one_that_does_not_fit_fill_the_queue():
    scheduler = Scheduler(3, max_waiting=2)
    for request_id, num_slots in enumerate((2, 2, 1)):  # a slot stays free, and the last one would fit
        scheduler.submit(request_id, num_slots)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.submit(3, 1)
    assert scheduler.admit() == [(0, [0, 1])] and len(scheduler.waiting) == 2


def test_a_slot_is_released_once():
    scheduler = Scheduler(2)
    scheduler.submit(0, 1)
    scheduler.admit()
    scheduler.release([0])
    with pytest.raises(AssertionError):
        scheduler.release([0])


def test_gaps_are_closed_with_as_few_moves_as_may_be():
    scheduler = Scheduler(6)
    for request_id in range(5):
        scheduler.submit(request_id, 1)
    scheduler.admit()
    scheduler.release([0, 2])
    assert scheduler.compact() == {3: 0, 4: 2} and scheduler.free == [3, 4, 5]
    assert scheduler.compact() == {}


class SchedulerMachine(RuleBasedStateMachine):
    """Requests that come, start, give up and end in any order, beside a plain model of what should be: a list and a dict."""

    ids = Bundle("ids")

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(7, max_waiting=5)
        self.queue: list[tuple[int, int]] = []
        self.held: dict[int, list[int]] = {}
        self.num_submitted = 0

    @property
    def num_held_back(self):
        num_free = 7 - sum(map(len, self.held.values()))
        needed = [num_slots for _, num_slots in self.queue]
        return min(len(needed) - num for num in range(len(needed) + 1) if sum(needed[:num]) <= num_free)

    @precondition(lambda self: self.num_held_back < 5)
    @rule(target=ids, num_slots=st.integers(1, 7))
    def submit(self, num_slots):
        self.num_submitted += 1
        self.scheduler.submit(self.num_submitted, num_slots)
        self.queue.append((self.num_submitted, num_slots))
        return self.num_submitted

    @precondition(lambda self: self.num_held_back == 5)
    @rule(num_slots=st.integers(1, 7))
    def submit_to_a_full_queue(self, num_slots):
        with pytest.raises(QueueFull):
            self.scheduler.submit(-1, num_slots)

    @rule(num_slots=st.integers(8, 99))
    def submit_what_never_fits(self, num_slots):
        with pytest.raises(ValueError, match="slots"):
            self.scheduler.submit(-1, num_slots)

    @rule()
    def admit(self):
        for request_id, slots in self.scheduler.admit():
            assert self.queue.pop(0) == (request_id, len(slots)), "not first come first served"
            self.held[request_id] = slots
        if self.queue:
            assert self.queue[0][1] > 7 - sum(map(len, self.held.values())), "the first in the queue would have fitted"
        assert len(self.queue) <= 5

    @rule()
    def compact(self):
        moves = self.scheduler.compact()
        for slots in self.held.values():
            slots[:] = [moves.get(slot, slot) for slot in slots]
        held = sorted(slot for slots in self.held.values() for slot in slots)
        assert held == list(range(len(held))), "there are gaps"

    @rule(request_id=ids)
    def withdraw(self, request_id):
        self.scheduler.withdraw(request_id)
        self.queue = [entry for entry in self.queue if entry[0] != request_id]

    @rule(request_id=consumes(ids), num=st.integers(1, 7))
    def release(self, request_id, num):
        """Of a running request, some of its slots and then the others, as its samples end one by one."""
        slots = self.held.pop(request_id, [])
        self.scheduler.withdraw(request_id)
        self.queue = [entry for entry in self.queue if entry[0] != request_id]
        self.scheduler.release(slots[:num])
        self.scheduler.release(slots[num:])

    @invariant()
    def every_slot_is_free_or_held_once(self):
        held = [slot for slots in self.held.values() for slot in slots]
        assert sorted(held + self.scheduler.free) == list(range(7))
        assert self.scheduler.free == sorted(self.scheduler.free)
        assert list(self.scheduler.waiting) == self.queue and self.scheduler.num_held_back == self.num_held_back <= 5


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
