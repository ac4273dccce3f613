"""The web page: talk about an image, watch one being painted. It calls the same service as the API, in the same process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import html
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Default
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from omnimamba.engine.request import SamplingParams
from omnimamba.server.errors import ApiError, bad_request
from omnimamba.server.service import Service

API_PATHS = ("/v1/", "/health", "/metrics", "/chat/completions", "/images/generations", "/models")
"""The last three are of clients whose base URL lacks /v1: the API tells them."""
USER = "omnimamba"
"""Who logs in where the server has an API key; the password is the key."""
EXAMPLE = Path(__file__).parents[1] / "assets/nano/example.png"
CAPTIONS = ("red apple", "smiling face with sunglasses", "yellow star", "green frog")
MAX_ANSWER = 64
"""Tokens, so that one answer leaves room for the next."""
UPLOADS_SECONDS = 3600
"""Uploaded and painted files are deleted after this long."""
STATUS_SECONDS = 2.0

Turns = list[tuple[str, str]]

_FONTS = ["system-ui", "sans-serif"]  # no font is fetched from elsewhere
_CSS = """
.gradio-container, .gradio-container > main { width: 100% !important; max-width: 1080px !important; margin: 0 auto !important; }
#status, #painted { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
#canvas img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, 112px) !important; grid-auto-rows: 112px !important; }
#gallery .gallery-item, #gallery .thumbnail-item { width: 112px; height: 112px; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""


class WithPage:
    """ASGI application: `api` on its own paths, the page on all others."""

    def __init__(self, api: FastAPI, service: Service, model_id: str) -> None:
        self.api = api
        key, config = service.config.api_key, service.config

        @contextlib.asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            async with api.router.lifespan_context(api):
                yield

        outer = FastAPI(lifespan=lifespan, openapi_url=None)
        self.page: ASGIApp = gr.mount_gradio_app(
            outer,
            page(service, model_id),
            "/",
            auth=None if key is None else (USER, key),
            auth_message=f"User {USER}, password: the API key.",
            max_file_size=config.max_body_bytes,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            theme=Default(font=_FONTS, font_mono=["monospace"]),
            css=_CSS,
        )
        self._heartbeats: set[asyncio.Task] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(API_PATHS):
            await self.api(scope, receive, send)
        elif scope["type"] == "http" and "/heartbeat/" in scope["path"]:
            await self._until_closed(scope, receive, send)
        else:
            await self.page(scope, receive, send)

    def close(self) -> None:
        """Ends what an open page holds open for ever, so that the server can drain."""
        for task in self._heartbeats:
            task.cancel()

    async def _until_closed(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self.page(scope, receive, send))
        self._heartbeats.add(task)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self._heartbeats.discard(task)


def page(service: Service, model_id: str) -> gr.Blocks:
    """The page's parts and what they do."""
    defaults = service.omni.defaults
    has_vision, has_vq = service.omni.bundle.vision is not None, service.omni.bundle.vq is not None
    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title=f"OmniMamba · {model_id}", analytics_enabled=False, delete_cache=(UPLOADS_SECONDS, UPLOADS_SECONDS)) as blocks:
        gr.Markdown("# OmniMamba\nOne Mamba-2 model that answers questions about images and paints images from text.")
        status = gr.HTML(status_line(service, model_id), elem_id="status", padding=False)
        gr.Timer(STATUS_SECONDS).tick(lambda: status_line(service, model_id), outputs=status, queue=False, **hidden)
        with gr.Tab("Paint", id="paint", visible=has_vq):
            with gr.Row():
                with gr.Column():
                    prompt = gr.Textbox(label="What to paint", placeholder=CAPTIONS[0], lines=2, elem_id="prompt")
                    gr.Examples([[caption] for caption in CAPTIONS], prompt, label="For example")
                    guidance_scale = gr.Slider(
                        0, 10, defaults.guidance_scale, step=0.5, label="Guidance", info="How closely to follow the text; 1 is off."
                    )
                    temperature = gr.Slider(
                        0, 2, defaults.temperature, step=0.05, label="Temperature", info="0 paints the most probable image."
                    )
                    seed = gr.Textbox(label="Seed", placeholder="drawn", info="The same seed paints the same image.", elem_id="seed")
                    paint_button = gr.Button("Paint", variant="primary", elem_id="paint-button")
                with gr.Column():
                    canvas = gr.Image(label="Painting", interactive=False, format="png", height=400, elem_id="canvas", buttons=["download"])
                    painted = gr.HTML(elem_id="painted", padding=False)
            gallery = gr.Gallery(label="Painted so far", columns=6, height=240, format="png", object_fit="contain", elem_id="gallery")
            kept = gr.State([])
            gr.on(
                [paint_button.click, prompt.submit],
                functools.partial(paint, service),
                [prompt, guidance_scale, temperature, seed, kept],
                [canvas, painted, gallery, kept, paint_button],
                trigger_mode="once",
                **hidden,
            ).then(lambda: gr.Button(interactive=True), outputs=paint_button, queue=False, **hidden)
        with gr.Tab("Ask", id="ask"):
            with gr.Row():
                with gr.Column():
                    image = gr.Image(
                        label="Image",
                        type="filepath",
                        image_mode=None,
                        sources=["upload", "clipboard"],
                        height=320,
                        elem_id="image",
                        visible=has_vision,
                    )
                    gr.Examples([[str(EXAMPLE)]], image, label="For example")
                with gr.Column():
                    chat = gr.Chatbot(
                        label="Conversation", height=360, elem_id="chat", render_markdown=False, feedback_options=None, buttons=[]
                    )
                    question = gr.Textbox(label="Question", placeholder="What is this?", elem_id="question")
                    with gr.Row():
                        ask_button = gr.Button("Ask", variant="primary", elem_id="ask-button")
                        clear = gr.Button("Start over")
            turns = gr.State([])
            gr.on(
                [ask_button.click, question.submit],
                functools.partial(ask, service),
                [question, image, turns],
                [question, chat, turns, ask_button],
                trigger_mode="once",
                **hidden,
            ).then(lambda: gr.Button(interactive=True), outputs=ask_button, queue=False, **hidden)
            gr.on([clear.click, chat.clear, image.change], lambda: ([], []), None, [chat, turns], **hidden)
    blocks.queue(default_concurrency_limit=None, max_size=service.config.max_waiting)
    return blocks


def status_line(service: Service, model_id: str) -> str:
    """Which model runs where, and how fast."""
    scheduler, model = service.engine.scheduler, service.omni.bundle.model
    dtype = str(model.dtype).removeprefix("torch.")
    busy = scheduler.num_slots - len(scheduler.free)
    parts = [f"<b>{html.escape(model_id)}</b> on {service.omni.device} in {dtype}", f"{busy} of {scheduler.num_slots} slots busy"]
    parts += [f"{len(scheduler.waiting)} waiting"] if scheduler.waiting else []
    return " · ".join([*parts, f"{service.thread.tokens_per_second():.0f} tokens/s"])


async def ask(
    service: Service, question: str, image: str | None, turns: Turns
) -> AsyncGenerator[tuple[Any, list[dict], Turns, gr.Button], None]:
    """(the question, the conversation to show, its turns, the button) as the answer grows. `image` is a file that Gradio keeps.

    The question is emptied once: what is typed while the answer comes stays. A click in that time would be lost, so the button is off.
    """
    turns = [*turns, ("user", question)]
    answer, emptied = "", ""
    with shown():
        picture = None if image is None else await service.picture(await asyncio.to_thread(Path(image).read_bytes))
        sampling = SamplingParams(temperature=0, max_new_tokens=MAX_ANSWER)
        request = service.question(turns, picture, sampling, 1, keep_state=False)
        async with contextlib.aclosing(service.answer(request)) as pieces:
            async for piece in pieces:
                answer += piece.text
                so_far = [*turns, ("assistant", answer)]
                yield emptied, [{"role": role, "content": text} for role, text in so_far], so_far, gr.Button(interactive=False)
                emptied = gr.skip()


async def paint(
    service: Service, prompt: str, guidance_scale: float, temperature: float, seed: str, kept: list[tuple[Image.Image, str]]
) -> AsyncGenerator[tuple[Any, str, Any, Any, gr.Button], None]:
    """(the image so far, what is said of it, gallery, its images, the button that is off) as it is painted row by row."""
    grid_size, began, off = service.omni.vq.config.grid_size, time.monotonic(), gr.Button(interactive=False)
    with shown():
        with bad_request():
            if seed.strip() and not seed.strip().isdecimal():
                raise ValueError(f"seed {seed.strip()!r} is not a whole number from 0; leave it empty to draw one")
            given = {"guidance_scale": guidance_scale, "temperature": temperature, "seed": int(seed) if seed.strip() else None}
            sampling = SamplingParams(**{**dataclasses.asdict(service.omni.defaults), **given})
        request = service.caption(prompt, sampling, 1)
        async with contextlib.aclosing(service.paint(request, at_rows=range(1, grid_size))) as paintings:
            async for painting in paintings:
                said = f"seed {request.seed} · row {painting.num_rows} of {grid_size} · {time.monotonic() - began:.1f} s"
                if painting.is_complete:
                    kept = [(painting.image, f"{prompt} · seed {request.seed}"), *kept][:24]
                    yield painting.image, said, kept, kept, off
                else:
                    yield painting.image, said, gr.skip(), gr.skip(), off


@contextlib.contextmanager
def shown():
    """What goes wrong is shown on the page."""
    try:
        yield
    except ApiError as error:
        raise gr.Error(error.message, print_exception=False) from error
