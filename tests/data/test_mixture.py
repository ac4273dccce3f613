"""Which samples a step uses: a pure function of seed and step, every sample once per epoch."""

import pytest

from omnimamba.data.mixture import GROUPED_BATCHES, EpochSampler, step_rng


def drawn(sampler, steps):
    return [i for step in steps for i in sampler.indices(step)]


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 3), (7, 7), (5, 1), (3, 8), (1, 4)])
def test_every_sample_once_per_epoch(num_samples, batch_size):
    num_epochs = 6 * batch_size  # whole batches, some of which span two epochs or more
    stream = drawn(EpochSampler(num_samples, batch_size, 0), range(num_epochs * num_samples // batch_size))
    for start in range(0, len(stream), num_samples):
        assert sorted(stream[start : start + num_samples]) == list(range(num_samples))


def test_steps_in_any_order_give_the_same_samples():
    lengths = tuple(range(50))
    for more in ((), (lengths,)):
        forwards = [EpochSampler(50, 4, 3, *more).indices(step) for step in range(60)]
        sampler = EpochSampler(50, 4, 3, *more)
        assert [sampler.indices(step) for step in reversed(range(60))] == forwards[::-1]


def test_seeds_and_epochs_differ():
    epochs = [drawn(EpochSampler(50, 5, seed), range(first, first + 10)) for seed in (0, 1) for first in (0, 10)]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_like_lengths_meet_and_nothing_is_lost_or_doubled():
    lengths = tuple((37 * i) % 100 for i in range(400))
    plain, grouped = EpochSampler(400, 5, 0), EpochSampler(400, 5, 0, lengths)
    for group in range(10):  # an epoch is five groups
        steps = range(group * GROUPED_BATCHES, (group + 1) * GROUPED_BATCHES)
        assert sorted(drawn(grouped, steps)) == sorted(drawn(plain, steps))
    assert all(len(grouped.indices(step)) == 5 for step in range(160))

    def padding(sampler):
        batches = [[lengths[i] for i in sampler.indices(step)] for step in range(160)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(grouped) < 0.2 * padding(plain)


def test_batches_of_a_group_come_in_no_order_of_length():
    sampler = EpochSampler(400, 5, 0, tuple(range(400)))
    longest = [max(sampler.indices(step)) for step in range(GROUPED_BATCHES)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_draw(num_samples, batch_size):
    with pytest.raises(ValueError, match=f"cannot draw batches of {batch_size} from {num_samples} samples"):
        EpochSampler(num_samples, batch_size, 0)


def test_random_streams_are_independent():
    def first(seed, step, stream):
        return step_rng(seed, step, stream).random()

    assert first(0, 5, "captions") == first(0, 5, "captions")
    assert len({first(*key) for key in ((0, 5, "captions"), (1, 5, "captions"), (0, 6, "captions"), (0, 5, "mixup"), (5, 0, "mixup"))}) == 5
