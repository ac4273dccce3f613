"""Bodies of requests, as OpenAI's API names them. What this server does not do is refused, not ignored.

Parameters without effect on an answer (`user`, `metadata`, `store`, ...) are taken and dropped; those that would change it are
taken at the value that changes nothing (`presence_penalty: 0`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=2**31)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Zero = Annotated[float, Field(ge=0, le=0)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Without effect: every image is read at the size of the model's towers."""


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Body):
    role: Literal["user", "assistant"]
    """The model was trained on these two; put a system text in front of the first question."""
    content: str | list[Part]
    name: str | None = None
    refusal: None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Body):
    """`POST /v1/chat/completions`"""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    """0, the most probable token each time, unless given."""
    top_p: TopP | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: TopK | None = None
    """Extension."""
    keep_state: bool = False
    """Extension: keep each answer's state; the choice says its `state_id`."""
    state_id: str | None = None
    """Extension: go on from a state that was kept, with one user message."""

    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ImageRequest(Body):
    """`POST /v1/images/generations`"""

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    """`auto`, or the one size that the model paints."""
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0)] | None = None
    """Images sent on the way when streaming, at most one for each row of tokens but the last."""

    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE)] | None = None
    """Extension, like the next four: the model's defaults unless given."""
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    seed: Seed | None = None

    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    style: None = None
    user: str | None = None
