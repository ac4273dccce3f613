"""Tokens of an answer to pieces of its text, as they come."""

from __future__ import annotations

from collections.abc import Sequence

from omnimamba.processor.tokenizer import TextTokenizer


class AnswerText:
    """All pieces joined are the answer without outer white space, cut before the first of the `stop` strings."""

    def __init__(self, tok: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        """A stop string has come; nothing more will."""
        self._stream = tok.stream()
        self._stop = stop
        self._held = ""
        self._has_begun = False

    def push(self, token: int | None, *, is_last: bool) -> str:
        """What can be said now. White space waits for a word after it, and what may become a stop string for its rest."""
        if self.is_stopped:
            return ""
        self._held += self._stream.push(token) if token is not None else ""
        self._held += self._stream.flush() if is_last else ""
        places = [place for place in map(self._held.find, self._stop) if place >= 0]
        self.is_stopped = bool(places)
        if places:
            self._held = self._held[: min(places)]
        num_free = len(self._held) if places or is_last else len(self._held) - self._num_unsure()
        piece = self._held[:num_free] if self._has_begun else self._held[:num_free].lstrip()
        piece = piece.rstrip()
        if piece:
            self._has_begun = True
            self._held = self._held[self._held.index(piece) + len(piece) :]
        return piece

    def _num_unsure(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        for num in range(min(len(self._held), max(map(len, self._stop), default=0)), 0, -1):
            if any(text.startswith(self._held[-num:]) for text in self._stop):
                return num
        return 0
