"""What stands before every request to the API: key, load, size and time of its body; and what follows when its client hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnimamba.server.errors import ApiError
from omnimamba.server.service import Service

WORK = ("/v1/chat/completions", "/v1/images/generations")
"""Paths that put the engine to work; they wait their turn."""
_UNREAD = {"Connection": "close"}
"""What is left of the body cannot be told from the next request."""
OTHER = "other"
"""Paths without a route, in the metrics."""


class Guard:
    """ASGI middleware. The application behind it gets the whole body at once and is cancelled when the client is gone."""

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self.app, self.service, self.config, self.paths = app, service, service.config, paths
        self.num_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        named = path if path in self.paths else OTHER

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.requests.labels(named, message["status"]).inc()
            await send(message)

        body = _Body(receive, self.config.body_seconds)
        try:
            self._check_key(scope)
            if path in WORK and self.num_in_flight >= self.service.max_in_flight:
                raise self.service.overloaded()
            self.num_in_flight += path in WORK
            try:
                await self._pass(body, scope, receive, counted)
            finally:
                self.num_in_flight -= path in WORK
        except ApiError as error:
            await body.discard(self.config.max_body_bytes)
            await error.response(scope, receive, counted)

    async def _pass(self, body: _Body, scope: Scope, receive: Receive, send: Send) -> None:
        content = await self._content(body, scope)
        if body.is_gone:
            return
        is_gone = asyncio.Event()
        messages: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await is_gone.wait()
            return {"type": "http.disconnect"}

        async def watch(work: asyncio.Task) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            is_gone.set()
            work.cancel()

        work = asyncio.ensure_future(self.app(scope, replay, send))
        watcher = asyncio.ensure_future(watch(work))
        try:
            await work
        except asyncio.CancelledError:
            if not is_gone.is_set():  # it is this task that is cancelled, not the work by its client
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                raise
        finally:
            watcher.cancel()

    def _check_key(self, scope: Scope) -> None:
        if self.config.api_key is None or not scope["path"].startswith("/v1/"):
            return
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.config.api_key.encode()):
            message = "wrong or no API key; send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _content(self, body: _Body, scope: Scope) -> bytes:
        """The whole body."""
        limit = self.config.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes, the limit", code="body_too_large", headers=_UNREAD)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        content = bytearray()
        try:
            while not body.is_over:
                content += await body.piece()
                if len(content) > limit:
                    raise too_large
        except TimeoutError:
            message = f"the body did not come in within {self.config.body_seconds:g} s"
            raise ApiError(408, message, code="body_timeout", headers=_UNREAD) from None
        return bytes(content)


class _Body:
    """A body as it comes in, with a deadline."""

    def __init__(self, receive: Receive, seconds: float) -> None:
        self.is_gone = False
        """The client is, before the end."""
        self.is_over = False
        self._receive = receive
        self._deadline = asyncio.get_running_loop().time() + seconds

    async def piece(self) -> bytes:
        """What comes next. TimeoutError past the deadline."""
        async with asyncio.timeout_at(self._deadline):
            message = await self._receive()
        self.is_gone = message["type"] == "http.disconnect"
        self.is_over = self.is_gone or not message.get("more_body", False)
        return message.get("body", b"")

    async def discard(self, max_bytes: int) -> None:
        """Takes in what is left, within limits: a connection that is closed on unread bytes takes the answer with it."""
        with contextlib.suppress(TimeoutError):
            while not self.is_over and max_bytes > 0:
                max_bytes -= len(await self.piece())
