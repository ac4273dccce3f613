"""`POST /v1/chat/completions`: questions about an image, in OpenAI's format."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from omnimamba.engine.request import Request, SamplingParams
from omnimamba.server.errors import ApiError, bad_request
from omnimamba.server.schema import ChatMessage, ChatRequest, ImagePart, TextPart
from omnimamba.server.service import Piece, Service
from omnimamba.server.sources import read_image

DONE = "[DONE]"


class Chat:
    """One call: its request to the engine and what the answers' envelopes say."""

    def __init__(self, service: Service, body: ChatRequest, request: Request, turns: list[tuple[str, str]]) -> None:
        self._service, self._body, self._request, self._turns = service, body, request, turns
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        has_image_place = request.state is None
        self._num_prompt = len(request.ids) + (service.omni.config.num_vision_tokens if has_image_place else 0)

    @classmethod
    async def of(cls, service: Service, body: ChatRequest) -> Chat:
        """ApiError for what the model or this server cannot do."""
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens is the old name of max_completion_tokens; pass one of them", param="max_tokens")
        if body.keep_state and not service.config.state_bytes:
            raise ApiError(400, "this server keeps no states; it was started without --states", param="keep_state")
        if body.keep_state and body.stop:
            raise ApiError(400, "keep_state needs an answer that the model ends; drop stop", param="stop")
        with bad_request():
            sampling = SamplingParams(
                temperature=body.temperature or 0.0,
                top_k=body.top_k or 0,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=body.seed,
                max_new_tokens=body.max_completion_tokens or body.max_tokens,
            )
        num_samples = body.n or 1
        turns = [(message.role, text_of(message)) for message in body.messages]
        num_chars = sum(len(text) for _, text in turns)
        if num_chars > service.config.max_text_chars:
            message = f"the messages have {num_chars} characters, the limit is {service.config.max_text_chars}"
            raise ApiError(400, message, param="messages", code="string_above_max_length")
        urls = [part.image_url.url for message in body.messages for part in parts_of(message) if isinstance(part, ImagePart)]
        if body.state_id is not None:
            return cls._going_on(service, body, turns, urls, sampling, num_samples)
        if len(urls) > 1 or (urls and not any(isinstance(part, ImagePart) for part in parts_of(body.messages[0]))):
            raise ApiError(400, "a conversation is about one image, which belongs to its first message", param="messages")
        picture = await service.picture(await read_image(urls[0], service.config)) if urls else None
        request = service.question(turns, picture, sampling, num_samples, keep_state=body.keep_state)
        return cls(service, body, request, turns)

    @classmethod
    def _going_on(
        cls, service: Service, body: ChatRequest, turns: list[tuple[str, str]], urls: list[str], sampling: SamplingParams, num_samples: int
    ) -> Chat:
        past = service.states.get(body.state_id or "")
        if past is None:
            raise ApiError(404, "there is no such state, or no longer", param="state_id", code="state_not_found")
        if len(turns) != 1 or turns[0][0] != "user" or urls:
            raise ApiError(400, "with state_id, pass the next question alone: one user message without an image", param="messages")
        request = service.next_question(past, turns[0][1], sampling, num_samples, keep_state=body.keep_state)
        return cls(service, body, request, [*past.messages, *turns])

    def pieces(self) -> AsyncGenerator[Piece, None]:
        stop = [self._body.stop] if isinstance(self._body.stop, str) else self._body.stop or []
        return self._service.answer(self._request, stop=stop, messages=self._turns)

    async def completion(self) -> dict[str, Any]:
        """The whole answer."""
        num_samples = self._request.num_samples
        texts, reasons, extensions = [""] * num_samples, [""] * num_samples, [{} for _ in range(num_samples)]
        num_tokens = num_cached = 0
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.sample_idx] += piece.text
                num_tokens, num_cached = num_tokens + 1, piece.num_cached
                if piece.finish_reason is not None:
                    reasons[piece.sample_idx] = piece.finish_reason
                    extensions[piece.sample_idx] = _state_of(piece)
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": texts[i], "refusal": None},
                "logprobs": None,
                "finish_reason": reasons[i],
                **extensions[i],
            }
            for i in range(num_samples)
        ]
        return self._envelope("chat.completion", choices) | {"usage": self._usage(num_tokens, num_cached)}

    async def events(self) -> AsyncGenerator[tuple[None, dict[str, Any] | str], None]:
        """Chunks of a streamed answer."""
        include_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        num_tokens = num_cached = 0
        has_begun: set[int] = set()
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                num_tokens, num_cached = num_tokens + 1, piece.num_cached
                if piece.sample_idx not in has_begun:
                    has_begun.add(piece.sample_idx)
                    yield None, self._chunk(piece.sample_idx, {"role": "assistant", "content": "", "refusal": None})
                if piece.text:
                    yield None, self._chunk(piece.sample_idx, {"content": piece.text})
                if piece.finish_reason is not None:
                    yield None, self._chunk(piece.sample_idx, {}, piece.finish_reason, **_state_of(piece))
        if include_usage:
            yield None, self._envelope("chat.completion.chunk", []) | {"usage": self._usage(num_tokens, num_cached)}
        yield None, DONE

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None, **extensions: str) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason, **extensions}
        return self._envelope("chat.completion.chunk", [choice])

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._body.model, "choices": choices}

    def _usage(self, num_tokens: int, num_cached: int) -> dict[str, Any]:
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": self._num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }


def _state_of(piece: Piece) -> dict[str, str]:
    return {} if piece.state_id is None else {"state_id": piece.state_id}


def parts_of(message: ChatMessage) -> list[TextPart | ImagePart]:
    return [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def text_of(message: ChatMessage) -> str:
    """Its parts of text, a line each."""
    return "\n".join(part.text for part in parts_of(message) if isinstance(part, TextPart))
