"""Which samples a training step uses, as a pure function of (seed, step).

Nothing has to be saved to resume: step n draws the same samples in every run. Each epoch is a permutation of its own; a batch may
span two epochs, so no sample is dropped.
"""

import dataclasses
import functools

import numpy as np

GROUPED_BATCHES = 16
"""Batches that are sorted by length together; the more, the less padding and the less chance in what meets in a batch."""


@dataclasses.dataclass(frozen=True, eq=False)  # eq=False: the caches below hash it, and `lengths` may be long
class EpochSampler:
    """Batches of sample indices. With `lengths`, samples of like length meet in a batch, so that little of it is padding."""

    num_samples: int
    batch_size: int
    seed: int
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(f"cannot draw batches of {self.batch_size} from {self.num_samples} samples")

    def indices(self, step: int) -> list[int]:
        """The sample indices of step `step` (from 0)."""
        if not self.lengths:
            return self._drawn(step * self.batch_size, self.batch_size)
        group, place = divmod(step, GROUPED_BATCHES)
        return self._sorted_group(group)[place]

    def _drawn(self, first: int, num: int) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < num:
            epoch, place = divmod(first + len(drawn), self.num_samples)
            drawn += self._permutation(epoch)[place : place + num - len(drawn)].tolist()
        return drawn

    @functools.lru_cache(maxsize=4)  # noqa: B019  (four permutations at most)
    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _sorted_group(self, group: int) -> list[list[int]]:
        """The next GROUPED_BATCHES batches, cut from their samples in order of length and then shuffled."""
        num = GROUPED_BATCHES * self.batch_size
        drawn = sorted(self._drawn(group * num, num), key=self.lengths.__getitem__)
        batches = [drawn[start : start + self.batch_size] for start in range(0, num, self.batch_size)]
        return [batches[i] for i in np.random.default_rng((self.seed, group, 1)).permutation(GROUPED_BATCHES)]


def step_rng(seed: int, step: int, stream: str) -> np.random.Generator:
    """An independent random stream for one use (`stream`) in one step."""
    return np.random.default_rng((seed, step, *stream.encode()))
