"""The API as an ASGI application."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

import omnimamba
from omnimamba.server import errors, states
from omnimamba.server.chat import Chat
from omnimamba.server.config import MIB
from omnimamba.server.errors import ApiError, bad_request
from omnimamba.server.guard import Guard
from omnimamba.server.images import Paintings
from omnimamba.server.schema import (
    ChatCompletion,
    ChatRequest,
    DeletedState,
    ErrorBody,
    Health,
    ImageRequest,
    Images,
    KeptState,
    ModelList,
    ServedModel,
)
from omnimamba.server.service import Service
from omnimamba.server.stream import EventStream, begun

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = "/v1/states"
_FILE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused; the message says what to change."},
    "5XX": {"model": ErrorBody, "description": "The server failed, is overloaded or has stopped."},
}


def create_api(service: Service, model_id: str) -> FastAPI:
    """The API for one model, which clients name `model_id`. Its lifespan starts and stops the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            await service.warm_up()
            yield
        finally:
            await service.stop()

    config = service.config
    api = FastAPI(
        title="OmniMamba",
        version=omnimamba.__version__,
        lifespan=lifespan,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(api)
    started = int(time.time())
    # the guard checks the key, before it reads a body; here it is for the description only
    v1: dict[str, Any] = {"responses": _REFUSALS, "dependencies": [Depends(HTTPBearer(auto_error=False))] if config.api_key else []}

    def check(model: str | None, n: int | None) -> None:
        if model is not None and model != model_id:
            raise ApiError(404, f"the model {model!r} is not here; this server has {model_id!r}", param="model", code="model_not_found")
        if n is not None and n > config.max_samples:
            raise ApiError(400, f"n={n} is too many; pass at most {config.max_samples}", param="n")

    @api.post("/v1/chat/completions", response_model=None, **answers(v1, ChatCompletion, "chat.completion.chunk, then [DONE]"))
    async def chat_completions(body: ChatRequest) -> Response | ChatCompletion:
        """Answers to a question; a conversation may begin with an image."""
        check(body.model, body.n)
        chat = await Chat.of(service, body)
        return EventStream(await begun(chat.events())) if body.stream else await chat.completion()

    @api.post("/v1/images/generations", response_model=None, **answers(v1, Images, "image_generation.partial_image, then .completed"))
    async def images_generations(body: ImageRequest) -> Response | Images:
        """Images of a caption."""
        check(body.model, body.n)
        paintings = Paintings(service, body)
        return EventStream(await begun(paintings.events())) if body.stream else await paintings.response()

    model: ServedModel = {"id": model_id, "object": "model", "created": started, "owned_by": "omnimamba"}

    @api.get("/v1/models", **v1)
    async def models() -> ModelList:
        return {"object": "list", "data": [model]}

    @api.get("/v1/models/{name:path}", **v1)
    async def one_model(name: str) -> ServedModel:
        check(name, None)
        return model

    @api.get("/health", responses={200: {"model": Health}, 503: {"model": Health, "description": "It will answer no more."}})
    async def health() -> Response:
        """200 while the server answers requests, else 503."""
        trouble = service.trouble
        scheduler = service.engine.scheduler
        figures: Health = {
            "status": trouble or "ok",
            "model": model_id,
            "device": str(service.omni.device),
            "slots": scheduler.num_slots,
            "slots_in_use": scheduler.num_slots - len(scheduler.free),
            "waiting_requests": len(scheduler.waiting),
        }
        return JSONResponse(figures, 503 if trouble else 200)

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type=METRICS_TYPE)

    if config.state_bytes:
        add_state_routes(api, service, v1)
    paths = frozenset(getattr(route, "path", "") for route in api.routes)
    max_body_bytes = {STATES: max(config.max_body_bytes, service.bytes_per_state + MIB)}
    api.add_middleware(Guard, service=service, paths=paths, files=f"{STATES}/", max_body_bytes=max_body_bytes)
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["Retry-After"]
        )
    return api


def answers(of_route: dict[str, Any], model: type, events: str) -> dict[str, Any]:
    """What the description says of a route: the answer as a whole, or as events."""
    event = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}, "required": ["data"]}
    stream = {"text/event-stream": {"itemSchema": {**event, "description": f"With stream=true: {events}."}}}
    return {**of_route, "responses": {200: {"model": model, "content": stream}, **of_route["responses"]}}


def add_state_routes(api: FastAPI, service: Service, of_route: dict[str, Any]) -> None:
    """Kept conversations as files."""

    @api.post(STATES, openapi_extra={"requestBody": {"required": True, "content": _FILE}}, **of_route)
    async def upload(request: Request) -> KeptState:
        """Takes in a file that `GET /v1/states/ID` or `omnimamba chat --save-state` wrote."""
        data = await request.body()
        with bad_request():
            conversation = await service.thread.call(lambda: states.from_file(service.omni, data))
        return {"id": service.states.add(conversation), "object": "state"}

    @api.get(STATES + "/{state_id}", response_class=Response, **{**of_route, "responses": {200: {"content": _FILE}, **_REFUSALS}})
    async def download(state_id: str) -> Response:
        """The file."""
        conversation = service.states.get(state_id)
        if conversation is None:
            raise _no_state()
        data = await service.thread.call(lambda: states.to_file(conversation))
        return StreamingResponse(pieces(data), headers={"Content-Length": str(len(data))}, media_type="application/octet-stream")

    @api.delete(STATES + "/{state_id}", **of_route)
    async def delete(state_id: str) -> DeletedState:
        if not service.states.remove(state_id):
            raise _no_state()
        return {"id": state_id, "object": "state", "deleted": True}


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    """So that the request lasts until the client has taken in most of them."""
    for start in range(0, len(data), MIB):
        yield data[start : start + MIB]


def _no_state() -> ApiError:
    return ApiError(404, "there is no such state, or no longer", code="state_not_found")
