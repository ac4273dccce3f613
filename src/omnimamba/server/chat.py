"""`POST /v1/chat/completions`: questions about an image, in OpenAI's format."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence

from omnimamba.engine.request import Request, SamplingParams
from omnimamba.server.errors import ApiError, bad_request
from omnimamba.server.schema import ChatChunk, ChatCompletion, ChatMessage, ChatRequest, ChatUsage, Choice, Delta, ImagePart, TextPart
from omnimamba.server.service import Piece, Service
from omnimamba.server.sources import read_image

DONE = "[DONE]"
INSTRUCTIONS = ("system", "developer")
"""Roles of messages that a conversation may begin with."""


class Chat:
    """One call: its request to the engine and what the answers' envelopes say."""

    def __init__(self, service: Service, body: ChatRequest, request: Request, turns: list[tuple[str, str]]) -> None:
        self._service, self._body, self._request, self._turns = service, body, request, turns
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._num_prompt = service.num_prompt_tokens(request)

    @classmethod
    async def of(cls, service: Service, body: ChatRequest) -> Chat:
        """ApiError for what the model or this server cannot do."""
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, "max_tokens is the old name of max_completion_tokens; pass one of them", param="max_tokens")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options come with stream=true only", param="stream_options")
        if body.keep_state and not service.config.state_bytes:
            raise ApiError(400, "this server keeps no states; it was started without --states-mib", param="keep_state")
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
        turns, urls = turns_of(body.messages)
        if body.state_id is not None:
            return cls._going_on(service, body, turns, urls, sampling, num_samples)
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

    async def completion(self) -> ChatCompletion:
        """The whole answer."""
        choices: list[Choice] = [
            {"index": i, "message": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None, "finish_reason": ""}
            for i in range(self._request.num_samples)
        ]
        num_tokens = num_cached = 0
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                choice = choices[piece.sample_idx]
                choice["message"]["content"] += piece.text
                num_tokens, num_cached = num_tokens + piece.num_tokens, piece.num_cached
                if piece.finish_reason is not None:
                    choice["finish_reason"] = piece.finish_reason
                if piece.state_id is not None:
                    choice["state_id"] = piece.state_id
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._body.model,
            "choices": choices,
            "usage": self._usage(num_tokens, num_cached),
        }

    async def events(self) -> AsyncGenerator[tuple[None, ChatChunk | str], None]:
        """Chunks of a streamed answer."""
        num_tokens = num_cached = 0
        has_begun: set[int] = set()
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                num_tokens, num_cached = num_tokens + piece.num_tokens, piece.num_cached
                if piece.sample_idx not in has_begun:
                    has_begun.add(piece.sample_idx)
                    yield None, self._chunk(piece, {"role": "assistant", "content": "", "refusal": None})
                if piece.text:
                    yield None, self._chunk(piece, {"content": piece.text})
                if piece.finish_reason is not None:
                    yield None, self._chunk(piece, {}, is_last=True)
        if self._includes_usage:
            last = self._envelope()
            last["usage"] = self._usage(num_tokens, num_cached)
            yield None, last
        yield None, DONE

    @property
    def _includes_usage(self) -> bool:
        return self._body.stream_options is not None and self._body.stream_options.include_usage

    def _chunk(self, piece: Piece, delta: Delta, *, is_last: bool = False) -> ChatChunk:
        chunk = self._envelope()
        chunk["choices"] = [
            {"index": piece.sample_idx, "delta": delta, "logprobs": None, "finish_reason": piece.finish_reason if is_last else None}
        ]
        if is_last and piece.state_id is not None:
            chunk["choices"][0]["state_id"] = piece.state_id
        return chunk

    def _envelope(self) -> ChatChunk:
        """A chunk without choices."""
        chunk: ChatChunk = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._body.model,
            "choices": [],
        }
        if self._includes_usage:
            chunk["usage"] = None  # the last chunk tells it
        return chunk

    def _usage(self, num_tokens: int, num_cached: int) -> ChatUsage:
        return {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": self._num_prompt + num_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }


def turns_of(messages: Sequence[ChatMessage]) -> tuple[list[tuple[str, str]], list[str]]:
    """(role, text) of a conversation, and the URLs of its image. ApiError for what the model was not trained on.

    It knows no instructions: those at the start are put in front of the first question, on lines of their own.
    """
    instructions = list(itertools.takewhile(lambda message: message.role in INSTRUCTIONS, messages))
    rest = messages[len(instructions) :]
    if any(message.role in INSTRUCTIONS for message in rest):
        raise ApiError(400, "system and developer messages belong in front of the first question", param="messages")
    pictured = [message for message in messages if urls_of(message)]
    urls = [url for message in pictured for url in urls_of(message)]
    if len(urls) > 1 or (pictured and pictured[0] is not next(iter(rest), None)):
        raise ApiError(400, "a conversation is about one image, which belongs to its first question", param="messages")
    turns = [(message.role, text_of(message)) for message in rest]
    if turns and instructions:
        role, text = turns[0]
        turns[0] = role, "\n".join([*map(text_of, instructions), text])
    return turns, urls


def parts_of(message: ChatMessage) -> list[TextPart | ImagePart]:
    return [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def text_of(message: ChatMessage) -> str:
    """Its parts of text, a line each."""
    return "\n".join(part.text for part in parts_of(message) if isinstance(part, TextPart))


def urls_of(message: ChatMessage) -> list[str]:
    return [part.image_url.url for part in parts_of(message) if isinstance(part, ImagePart)]
