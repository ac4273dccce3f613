"""Errors in the shape that OpenAI's clients expect: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Route

from omnimamba.server.schema import ErrorBody

logger = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, dict(headers or {})

    @property
    def body(self) -> ErrorBody:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        # ASCII only: a message may quote a lone surrogate of the request, which UTF-8 cannot carry
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


@contextlib.contextmanager
def bad_request(param: str | None = None, *, code: str | None = None) -> Iterator[None]:
    """The library's ValueError inside is the client's mistake: status 400."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error), param=param, code=code) from error


def install(app: FastAPI) -> None:
    """Every error of `app` gets the shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # of a value that may be of several kinds, the errors as each; the kind meant is the one of which most was right
        first = max(error.errors(), key=lambda found: len(found["loc"]))
        is_broken = first["type"] == "json_invalid"
        place = place_of(first, error.body) or None
        message = f"the body is not JSON: {first['ctx']['error']}" if is_broken else f"{place or 'body'}: {first['msg']}"
        return ApiError(400, message, param=None if is_broken else place, code="invalid_json" if is_broken else None).response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers, hint, path = dict(error.headers or {}), "", request.url.path
        routes = [route for route in app.routes if isinstance(route, Route)]
        if error.status_code == 405:  # Starlette names the methods of one route, and a path may have several
            matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            headers["Allow"] = ", ".join(sorted(set().union(*(route.methods or () for route in matching))))
        if error.status_code == 404:
            lacks_v1 = any(route.path == f"/v1{path}" for route in routes)
            hint = f"; it is at /v1{path}: end the client's base URL in /v1" if lacks_v1 else "; /v1/openapi.json lists what is here"
        message = f"{request.method} {path}: {error.detail}{hint}"
        return ApiError(error.status_code, message, code=_CODES.get(error.status_code), headers=headers).response

    @app.exception_handler(Exception)  # Starlette logs it with its traceback
    async def internal(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed on this request; its log says how", code="internal_error").response


def place_of(error: Mapping[str, Any], body: Any) -> str:
    """`messages.0.content`: where in `body` an error of pydantic is, without the names of types that its path goes through as well."""
    parts: list[str] = []
    for part in error["loc"][1:]:  # the first is "body"
        is_key = isinstance(body, dict) and part in body
        if is_key or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
            parts.append(str(part))
    if error["type"] == "missing":
        parts.append(str(error["loc"][-1]))
    return ".".join(parts)
