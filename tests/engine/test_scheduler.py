"""Slots and queue, without any model."""

import pytest

from omnimamba.engine.scheduler import Scheduler


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


def test_a_slot_is_released_once():
    scheduler = Scheduler(2)
    scheduler.submit(0, 1)
    scheduler.admit()
    scheduler.release([0])
    with pytest.raises(AssertionError):
        scheduler.release([0])
