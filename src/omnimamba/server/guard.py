"""What stands before every request to the API: key, load, size and time of its body; and what follows when its client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omnimamba.server.errors import ApiError
from omnimamba.server.service import Service

logger = logging.getLogger(__name__)

NO_BODY = ("GET", "HEAD", "OPTIONS")
"""Methods of requests without a body. All others, and those of large files, bring memory or work: so many at once and no more."""
_UNREAD = {"Connection": "close"}
"""What is left of the body cannot be told from the next request."""
OTHER = "other"
"""Paths without a route, in the metrics."""


class Guard:
    """ASGI middleware. The application behind it gets the whole body at once and is cancelled when the client is gone.

    paths: those with a route. files: how the paths of large files begin. max_body_bytes: by path, where it is another than the
    configuration's.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str], files: str, max_body_bytes: Mapping[str, int]) -> None:
        self.app, self.service, self.config = app, service, service.config
        self.paths, self.files, self.max_body_bytes = paths, files, max_body_bytes
        self.num_in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, has_body = scope["path"], scope["method"] not in NO_BODY
        is_heavy = has_body or path.startswith(self.files)
        named = path if path in self.paths else OTHER
        if scope["method"] == "HEAD":  # the HTTP server leaves out the body of its answer
            scope = {**scope, "method": "GET"}
        limit = self.max_body_bytes.get(path, self.config.max_body_bytes)
        has_begun = False

        async def counted(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self.service.metrics.requests.labels(named, message["status"]).inc()
            await send(message)

        body = _Body(receive, self.config.body_seconds)
        try:
            self._check_key(scope)
            if is_heavy and self.num_in_flight >= self.service.max_in_flight:
                raise self.service.overloaded()
            self.num_in_flight += is_heavy
            try:
                content = await self._content(body, limit, scope) if has_body else b""
                if not body.is_gone:
                    await self._pass(content, scope, receive, counted)
            finally:
                self.num_in_flight -= is_heavy
        except ApiError as error:
            await body.discard(limit)
            await error.response(scope, receive, counted)
        except Exception:
            if not has_begun:  # Starlette answers it outside of this middleware
                self.service.metrics.requests.labels(named, 500).inc()
            raise

    async def _pass(self, content: bytes, scope: Scope, receive: Receive, send: Send) -> None:
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

        async def send_in_time(message: Message) -> None:
            """Waits until the client has taken in most of what was sent before. One that does not is as good as gone."""
            try:
                async with asyncio.timeout(self.config.send_seconds):
                    await send(message)
            except TimeoutError:
                logger.warning("a client of %s did not read on for %g s; its answer is dropped", scope["path"], self.config.send_seconds)
                is_gone.set()
                raise asyncio.CancelledError from None

        work = asyncio.ensure_future(self.app(scope, replay, send_in_time))
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

    async def _content(self, body: _Body, limit: int, scope: Scope) -> bytes:
        """The whole body."""
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
