"""The API as an ASGI application."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

import omnimamba
from omnimamba.server import errors, states
from omnimamba.server.chat import Chat
from omnimamba.server.errors import ApiError, bad_request
from omnimamba.server.guard import Guard
from omnimamba.server.images import Paintings
from omnimamba.server.schema import ChatRequest, ImageRequest
from omnimamba.server.service import Service
from omnimamba.server.stream import EventStream, begun


def create_api(service: Service, model_id: str) -> FastAPI:
    """The API for one model, which clients name `model_id`. Its lifespan starts and stops the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

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

    def check(model: str | None, n: int | None) -> None:
        if model is not None and model != model_id:
            raise ApiError(404, f"the model {model!r} is not here; this server has {model_id!r}", param="model", code="model_not_found")
        if n is not None and n > service.config.max_samples:
            raise ApiError(400, f"n={n} is too many; pass at most {service.config.max_samples}", param="n")

    @api.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest) -> Response | dict[str, Any]:
        """Answers to a question; a conversation may begin with an image."""
        check(body.model, body.n)
        chat = await Chat.of(service, body)
        return EventStream(await begun(chat.events())) if body.stream else await chat.completion()

    @api.post("/v1/images/generations", response_model=None)
    async def images_generations(body: ImageRequest) -> Response | dict[str, Any]:
        """Images of a caption."""
        check(body.model, body.n)
        paintings = Paintings(service, body)
        return EventStream(await begun(paintings.events())) if body.stream else await paintings.response()

    model = {"id": model_id, "object": "model", "created": started, "owned_by": "omnimamba"}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @api.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check(name, None)
        return model

    @api.get("/health")
    async def health() -> Response:
        """200 while the server answers requests, else 503."""
        trouble = service.trouble
        scheduler = service.engine.scheduler
        figures = {
            "status": trouble or "ok",
            "model": model_id,
            "device": str(service.omni.device),
            "slots": scheduler.num_slots,
            "slots_in_use": scheduler.num_slots - len(scheduler.free),
            "waiting_requests": len(scheduler.waiting),
        }
        return JSONResponse(figures, 503 if trouble else 200)

    @api.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if service.config.state_bytes:
        add_state_routes(api, service)
    paths = frozenset(getattr(route, "path", "") for route in api.routes)
    api.add_middleware(Guard, service=service, paths=paths)
    return api


def add_state_routes(api: FastAPI, service: Service) -> None:
    """Kept conversations as files."""

    @api.post("/v1/states")
    async def upload(request: Request) -> dict[str, str]:
        """Takes in a file that `GET /v1/states/ID` or `omnimamba chat --save-state` wrote."""
        data = await request.body()
        with bad_request():
            conversation = await service.thread.call(lambda: states.from_file(service.omni, data))
        return {"id": service.states.add(conversation), "object": "state"}

    @api.get("/v1/states/{state_id}")
    async def download(state_id: str) -> Response:
        """The file."""
        conversation = service.states.get(state_id)
        if conversation is None:
            raise _no_state()
        data = await service.thread.call(lambda: states.to_file(conversation))
        return Response(data, media_type="application/octet-stream")

    @api.delete("/v1/states/{state_id}")
    async def delete(state_id: str) -> dict[str, Any]:
        if not service.states.remove(state_id):
            raise _no_state()
        return {"id": state_id, "object": "state", "deleted": True}


def _no_state() -> ApiError:
    return ApiError(404, "there is no such state, or no longer", code="state_not_found")
