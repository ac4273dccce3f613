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
    def body(self) -> dict[str, Any]:
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
        first = error.errors()[0]
        # the first part of the place is "body"; numbers are where the JSON does not parse
        place = ".".join(str(part) for part in first["loc"][1:]) or None
        is_broken = first["type"] == "json_invalid"
        message = f"the body is not JSON: {first['ctx']['error']}" if is_broken else f"{place or 'body'}: {first['msg']}"
        return ApiError(400, message, param=None if is_broken else place, code="invalid_json" if is_broken else None).response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, code=_CODES.get(error.status_code), headers=error.headers).response

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed on this request; its log says how", code="internal_error").response
