"""Server-sent events."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from omnimamba.server.errors import ApiError

logger = logging.getLogger(__name__)


class EventStream(Response):
    """Each item of `events` as one event, (name, data); a name of None is left out. An error on the way is the last event."""

    def __init__(self, events: AsyncGenerator[tuple[str | None, Mapping[str, Any] | str], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self.events):
            async for name, data in self._with_errors():
                text = data if isinstance(data, str) else json.dumps(data)
                event = f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_errors(self) -> AsyncIterator[tuple[str | None, Mapping[str, Any] | str]]:
        try:
            async for event in self.events:
                yield event
        except ApiError as error:
            yield None, error.body
        except Exception:  # of whatever kind: the status is sent already, so only an event can tell the client
            logger.exception("a streamed answer failed")
            yield None, ApiError(500, "the server failed on this request; its log says how", code="internal_error").body


async def begun(events: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The same events once the first has come, so that what goes wrong before it is still an answer with a status of its own."""
    first = await anext(events)

    async def all_of_them() -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_of_them()
