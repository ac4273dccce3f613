"""Conversations that clients asked to keep, by ids that cannot be guessed; as files they are those of `omnimamba chat`."""

from __future__ import annotations

import secrets
import tempfile
from collections import OrderedDict
from pathlib import Path

from omnimamba.engine.omnimamba import Conversation, OmniMamba


class StateStore:
    """At most `max_bytes` of states; those not used for longest go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._conversations: OrderedDict[str, Conversation] = OrderedDict()  # the oldest first

    def __len__(self) -> int:
        return len(self._conversations)

    def add(self, conversation: Conversation) -> str:
        """The id of a conversation, now kept."""
        state_id = f"state-{secrets.token_urlsafe(24)}"
        self._conversations[state_id] = conversation
        while sum(map(num_bytes, self._conversations.values())) > self.max_bytes:
            self._conversations.popitem(last=False)
        return state_id

    def get(self, state_id: str) -> Conversation | None:
        if state_id in self._conversations:
            self._conversations.move_to_end(state_id)
        return self._conversations.get(state_id)

    def remove(self, state_id: str) -> bool:
        """Whether there was one."""
        return self._conversations.pop(state_id, None) is not None


def num_bytes(conversation: Conversation) -> int:
    assert conversation.state is not None
    return conversation.state.bytes_per_slot


def to_file(conversation: Conversation) -> bytes:
    """The file that `omnimamba chat --load-state` goes on from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        conversation.save(path)
        return path.read_bytes()


def from_file(omni: OmniMamba, data: bytes) -> Conversation:
    """A conversation from its file. ValueError if it is not one of this model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        path.write_bytes(data)
        try:
            conversation = omni.load_conversation(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), "the state file")) from None
    assert conversation.state is not None
    if conversation.state.num_slots != 1:
        raise ValueError(f"the state file holds {conversation.state.num_slots} sequences; a conversation is one")
    return conversation
