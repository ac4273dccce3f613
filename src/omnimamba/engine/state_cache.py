"""Snapshots of prompts that were read before, so that a request which begins alike reads only the rest.

A prefix is an image and the ids that follow it: a second question about the image, or the next turn of a conversation.
"""

from __future__ import annotations

from collections import OrderedDict

from omnimamba.model.state import MambaState


class StateCache:
    """At most `max_bytes` of snapshots; those not used for longest go first."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} is negative; pass 0 to keep no snapshot")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._states: OrderedDict[tuple[str, tuple[int, ...]], MambaState] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._states)

    def find(self, key: str, ids: tuple[int, ...]) -> tuple[int, MambaState] | None:
        """(number of ids, snapshot) of the longest prefix of `ids` that leaves at least one to read, under `key`."""
        found = [known for image, known in self._states if image == key and len(known) < len(ids) and ids[: len(known)] == known]
        if not found:
            self.num_misses += 1
            return None
        self.num_hits += 1
        longest = max(found, key=len)
        self._states.move_to_end((key, longest))
        return len(longest), self._states[key, longest]

    def has(self, key: str, ids: tuple[int, ...]) -> bool:
        return (key, ids) in self._states

    def add(self, key: str, ids: tuple[int, ...], state: MambaState) -> None:
        """Keeps the snapshot of a sequence that has read the image of `key` and `ids`; one larger than the budget is not kept."""
        if state.bytes_per_slot > self.max_bytes:
            return
        self._forget(key, ids)
        self._states[key, ids] = state
        self.num_bytes += state.bytes_per_slot
        while self.num_bytes > self.max_bytes:
            self._forget(*next(iter(self._states)))

    def _forget(self, key: str, ids: tuple[int, ...]) -> None:
        state = self._states.pop((key, ids), None)
        if state is not None:
            self.num_bytes -= state.bytes_per_slot
