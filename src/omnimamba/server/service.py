"""What the API and the web page have in common: questions and captions in, pieces of answers and images out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from omnimamba.config import Task
from omnimamba.engine.engine import Engine
from omnimamba.engine.omnimamba import Conversation, OmniMamba, unread_ids
from omnimamba.engine.request import Event, FinishReason, Request, Sample, SamplingParams, UnreadImage
from omnimamba.engine.scheduler import QueueFull
from omnimamba.engine.text import AnswerText
from omnimamba.model.state import MambaState
from omnimamba.processor.image import load_image, resize_naive, tower_pixels
from omnimamba.processor.prompt import mmu_after_image, mmu_before_image, next_turn_ids
from omnimamba.server.config import ServerConfig
from omnimamba.server.engine_thread import EngineThread, Generation, Together, aside
from omnimamba.server.errors import ApiError, bad_request
from omnimamba.server.metrics import Metrics
from omnimamba.server.sources import check_image
from omnimamba.server.states import StateStore

NUM_DECODERS = 2
"""Image files that are decoded at once; each may take three bytes a pixel, and more while it is resized."""
WARM_UP_TOKENS = 17
"""One from the prompt and a whole block of the decoder's steps."""
STALLED_SECONDS = 120.0
"""A step that takes this long never ends."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image to talk about, known to be whole."""

    key: str
    pixels: Callable[[], dict[str, Tensor]]
    """What the towers read, [1, 3, s, s] for each. To be called in the engine's thread."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What the tokens of a step add to one answer."""

    sample_idx: int
    text: str
    num_tokens: int
    finish_reason: str | None
    """`stop` or `length` with the last piece."""
    num_cached: int
    """Positions of the prompt that were not read again."""
    state_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Painting:
    """An image whose first `num_rows` rows of tokens are painted."""

    image_idx: int
    image: Image.Image
    num_rows: int
    is_complete: bool


class Service:
    """One model at work. `start`, `warm_up` and `stop` in the event loop that calls the rest.

    on_failure: called in that loop if the engine has come to an end by itself.
    """

    def __init__(self, omni: OmniMamba, config: ServerConfig, *, on_failure: Callable[[], None] | None = None) -> None:
        self.omni, self.config = omni, config
        options = {"max_waiting": config.max_waiting, "prefix_cache_bytes": config.prefix_cache_bytes}
        self.thread = EngineThread(aside(lambda: omni.new_engine(**options)), on_failure=on_failure)
        self.metrics = Metrics(self.thread)
        self.states = StateStore(config.state_bytes)
        self.bytes_per_state = MambaState.zeros(omni.config.backbone, 1, device="meta").bytes_per_slot
        if 0 < config.state_bytes < self.bytes_per_state:
            raise ValueError(
                f"state_bytes={config.state_bytes} has no room for one state, which takes {self.bytes_per_state}; 0 keeps none"
            )
        self._decoders = ThreadPoolExecutor(NUM_DECODERS, thread_name_prefix="images")
        self._paint = Together(omni.paint)
        self._mean_seconds = 1.0

    @property
    def engine(self) -> Engine:
        return self.thread.engine

    def start(self) -> None:
        self.thread.start()

    async def warm_up(self) -> None:
        """Reads an image, answers and paints, so that no client waits for what is compiled, captured or allocated on first use."""
        await self.thread.call(self._first_work)

    def _first_work(self) -> None:
        omni, has_vision, has_vq = self.omni, self.omni.bundle.vision is not None, self.omni.bundle.vq is not None
        features = omni.encode_image([Image.new("RGB", (64, 64))])[0] if has_vision else None
        answer = SamplingParams(temperature=0, max_new_tokens=WARM_UP_TOKENS, past_last_position="clamp")
        requests = [Request(Task.MMU, omni.first_turns([("user", "Hello")]), features, sampling=answer)]
        if has_vq:
            num_tokens = omni.config.num_image_tokens
            settings = omni.defaults if self.engine.scheduler.num_slots > 1 else dataclasses.replace(omni.defaults, guidance_scale=1.0)
            painting = SamplingParams(**dataclasses.asdict(settings), max_new_tokens=min(WARM_UP_TOKENS, num_tokens))
            requests.append(omni.paint_request("apple", painting, 1))
            omni.paint([[0] * num_tokens])
        self.engine.run(requests)
        self.engine.capture_steps()
        if self.config.state_bytes:
            _ = omni.fingerprint  # which their files bear

    async def stop(self) -> None:
        await self.thread.stop()
        self._decoders.shutdown(cancel_futures=True)

    @property
    def trouble(self) -> str | None:
        """Why this server will not answer any more; None while it will."""
        began = self.thread.step_began
        if not self.thread.is_alive:
            return "the engine has stopped"
        if began is not None and time.monotonic() - began > STALLED_SECONDS:
            return f"a step of the engine takes longer than {STALLED_SECONDS:g} s"
        return None

    @property
    def max_in_flight(self) -> int:
        """Requests that are taken in at once: those that may run and those that may wait."""
        return self.config.max_waiting + self.engine.scheduler.num_slots

    def overloaded(self) -> ApiError:
        """Status 429, with a guess at when it is worth trying again."""
        scheduler = self.engine.scheduler
        seconds = math.ceil(self._mean_seconds * (1 + len(scheduler.waiting) / scheduler.num_slots))
        headers = {"Retry-After": str(min(max(seconds, 1), 60))}
        return ApiError(429, "too many requests wait already; try again later", code="queue_full", headers=headers)

    # ---- questions

    async def picture(self, data: bytes) -> Picture:
        """ApiError for what is not an image within the limits."""
        if self.omni.bundle.vision is None:
            raise ApiError(400, "this model was saved without its vision towers, so it sees no image", param="messages")
        opening = (*mmu_before_image(self.omni.tokenizer), *mmu_after_image(self.omni.tokenizer))
        towers = self.omni.config.towers

        def squares() -> dict[str, Image.Image]:
            image = load_image(data)
            return {name: resize_naive(image, tower.image_size) for name, tower in towers.items()}

        def pixels(squares: dict[str, Image.Image]) -> dict[str, Tensor]:
            """In the engine's thread: no other may work on tensors (see `aside`)."""
            return {name: tower_pixels(square, towers[name])[None] for name, square in squares.items()}

        def decode() -> Picture:
            check_image(data, self.config.max_image_pixels)
            key = hashlib.sha256(data).hexdigest()
            if self.engine.prefix_cache.has(key, opening):  # decoded before, and not needed again unless that snapshot goes just now
                return Picture(key, lambda: pixels(squares()))
            with bad_request("messages", code="invalid_image"):
                decoded = squares()
            return Picture(key, lambda: pixels(decoded))

        return await asyncio.get_running_loop().run_in_executor(self._decoders, decode)

    def question(
        self, messages: Sequence[tuple[str, str]], picture: Picture | None, sampling: SamplingParams, num_samples: int, *, keep_state: bool
    ) -> Request:
        """The request for an answer to ("user" | "assistant", text) messages, the image in front of them."""
        self._check_length("messages", *(text for _, text in messages))
        with bad_request("messages"):
            ids = self.omni.first_turns(messages)
        features = None if picture is None else UnreadImage(picture.pixels, self._encode)
        key = "no image" if picture is None else picture.key
        request = Request(Task.MMU, ids, features, sampling=sampling, num_samples=num_samples, keep_state=keep_state, prefix_key=key)
        return self._with_room(request)

    def _encode(self, pixels: Sequence[dict[str, Tensor]]) -> Tensor:
        """Features [b, k, vision_dim] of the pixels of b pictures."""
        return self.omni.encode_pixels({name: torch.cat([of_picture[name] for of_picture in pixels]) for name in pixels[0]})

    def next_question(self, past: Conversation, text: str, sampling: SamplingParams, num_samples: int, *, keep_state: bool) -> Request:
        """The request for an answer to the next question of a conversation that was kept."""
        self._check_length("messages", text)
        with bad_request("messages"):
            ids = (*past.unread_ids, *next_turn_ids(self.omni.tokenizer, text))
        request = Request(Task.MMU, ids, sampling=sampling, num_samples=num_samples, state=past.state, keep_state=keep_state)
        return self._with_room(request)

    def num_prompt_tokens(self, request: Request) -> int:
        """Positions that a question takes, its image's included; those that its state has read are not counted."""
        return len(request.ids) + (self.omni.config.num_vision_tokens if request.state is None else 0)

    def _check_length(self, param: str, *texts: str) -> None:
        """ApiError for more text than may be tokenised: that is done in the event loop, where all others wait meanwhile."""
        num, limit = sum(map(len, texts)), self.config.max_text_chars
        if num > limit:
            raise ApiError(400, f"{num} characters in the {param}, the limit is {limit}", param=param, code="string_above_max_length")

    def _with_room(self, request: Request) -> Request:
        """The request. ApiError if the position table is too short for it, in the words of the API."""
        rows, num = self.omni.config.mmu_positions, request.sampling.max_new_tokens
        length = self.num_prompt_tokens(request) + (0 if request.state is None else int(request.state.position[0]))
        room = rows - length + 1  # the last token is not read
        # the first words are those that clients look for to tell this error from others
        message = f"this model's maximum context length is {rows} tokens, of which the conversation takes {length}; "
        if room < 1:
            raise ApiError(400, f"{message}shorten it", param="messages", code="context_length_exceeded")
        if num is not None and num > room:
            raise ApiError(
                400, f"{message}max_tokens={num} is too many, pass at most {room}", param="max_tokens", code="context_length_exceeded"
            )
        return request

    async def answer(
        self, request: Request, *, stop: Sequence[str] = (), messages: Sequence[tuple[str, str]] = ()
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of the answers, as many tokens each as a step of the engine brings.

        If the request keeps states, they are stored as conversations after `messages`.
        """
        tok = self.omni.tokenizer
        texts = [AnswerText(tok, stop) for _ in range(request.num_samples)]
        samples = [Sample() for _ in texts]
        async with self._run(request, every=1) as generation:
            async for batch in generation:
                pieces: dict[int, Piece] = {}
                for sample_idx, event in batch:
                    text, sample = texts[sample_idx], samples[sample_idx]
                    if text.is_stopped:  # what came before the engine heard of it
                        continue
                    sample.add(event)
                    added = text.push(event.token, is_last=event.finish_reason is not None)
                    reason = event.finish_reason
                    if text.is_stopped:
                        reason = FinishReason.STOP
                        generation.cancel_sample(sample_idx)
                    state_id = None
                    if sample.state is not None:
                        conversation = Conversation(self.omni, None)
                        conversation.messages = [*messages, ("assistant", tok.decode(sample.tokens).strip())]
                        conversation.state, conversation.unread_ids = sample.state, unread_ids(sample, tok)
                        state_id = self.states.add(conversation)
                    before = pieces.get(sample_idx, Piece(sample_idx, "", 0, None, 0))
                    finish_reason = None if reason is None else str(reason)
                    pieces[sample_idx] = Piece(
                        sample_idx, before.text + added, before.num_tokens + 1, finish_reason, event.num_cached, state_id
                    )
                for piece in pieces.values():
                    yield piece

    # ---- captions

    def caption(self, text: str, sampling: SamplingParams, num_images: int) -> Request:
        """The request for images of a caption."""
        self._check_length("prompt", text)
        with bad_request("prompt"):
            return self.omni.paint_request(text, sampling, num_images)

    async def paint(self, request: Request, *, at_rows: Sequence[int] = ()) -> AsyncGenerator[Painting, None]:
        """The images as they are completed; before that, each as it stands after `at_rows` rows of tokens."""
        grid_size = self.omni.vq.config.grid_size
        tokens: list[list[int]] = [[] for _ in range(request.num_samples)]
        async with self._run(request, every=grid_size if at_rows else self.omni.config.num_image_tokens) as generation:
            async for batch in generation:
                for image_idx, event in batch:
                    tokens[image_idx] += [] if event.token is None else [event.token]
                    num_rows, rest = divmod(len(tokens[image_idx]), grid_size)
                    if rest == 0 and num_rows in at_rows and event.finish_reason is None:
                        ids = list(tokens[image_idx])
                        yield Painting(image_idx, await generation.call(lambda ids=ids: self.omni.paint_so_far(ids)), num_rows, False)
                complete = [image_idx for image_idx, event in batch if event.finish_reason is not None]
                ids = [tokens[image_idx] for image_idx in complete]
                images = await self._paint(generation.call, ids) if complete else []
                self.metrics.images.inc(len(images))
                for image_idx, image in zip(complete, images, strict=True):
                    yield Painting(image_idx, image, grid_size, True)

    # ---- both

    @contextlib.asynccontextmanager
    async def _run(self, request: Request, *, every: int) -> AsyncIterator[_Batches]:
        """The request under way, its figures counted and its failures turned into ApiErrors."""
        task = str(request.task)
        with bad_request():
            requests = self.omni.split_samples(request)
        generation = Generation(self.thread, requests, every=every, seconds=self.config.request_seconds)
        try:
            with bad_request(code="invalid_value"):
                await generation.start()
            yield _Batches(generation, self.metrics, task)
            seconds = time.monotonic() - generation.began
            self.metrics.request_seconds.labels(task).observe(seconds)
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        except QueueFull:
            raise self.overloaded() from None
        except TimeoutError:
            message = f"the answer was not complete within {self.config.request_seconds:g} s"
            raise ApiError(504, message, code="timeout") from None
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.cancelled.inc()
            raise
        finally:
            generation.close()


class _Batches:
    """The batches of a generation, counted. ApiError if the engine failed."""

    def __init__(self, generation: Generation, metrics: Metrics, task: str) -> None:
        self._generation, self._metrics, self._task = generation, metrics, task
        self._has_token = False
        self.call, self.cancel_sample = generation.call, generation.cancel_sample

    def __aiter__(self) -> _Batches:
        return self

    async def __anext__(self) -> list[tuple[int, Event]]:
        batch = await anext(self._generation)
        if any(event.error is not None for _, event in batch):
            self._metrics.failures.inc()
            message = "the engine failed on this request, and on those computed with it; its log says how"
            raise ApiError(500, message, code="engine_failed")
        self._metrics.tokens.labels(self._task).inc(sum(event.token is not None for _, event in batch))
        if self._generation.first_token_at is not None and not self._has_token:
            self._has_token = True
            self._metrics.first_token.labels(self._task).observe(self._generation.first_token_at - self._generation.began)
        return batch
