"""Bodies of requests and answers, as OpenAI's API names them. What this server does not do is refused, not ignored.

Parameters without effect on an answer (`user`, `metadata`, `store`, ...) are taken and dropped; those that would change it are
taken at the value that changes nothing (`presence_penalty: 0`). A parameter of null is one that is not given, whatever its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypedDict  # pydantic reads that of typing only from Python 3.12

MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=0, le=2**31)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Zero = Annotated[float, Field(ge=0, le=0)]


# ---- requests


class Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        strict=True,
        use_attribute_docstrings=True,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Clients send back messages that the `openai` package dumped, with all that it knows at null."""
        return {k: v for k, v in values.items() if v is not None or k in cls.model_fields} if isinstance(values, dict) else values


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
    role: Literal["user", "assistant", "system", "developer"]
    """The model was trained on the first two; texts of the others, which come first, are put in front of the first question."""
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
    """Extension: only the k most probable tokens; 0 is off."""
    keep_state: bool = False
    """Extension: keep each answer's state; the choice says its `state_id`."""
    state_id: str | None = None
    """Extension: go on from a state that was kept, with one user message."""

    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


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
    moderation: Literal["auto", "low"] | None = None
    style: None = None
    user: str | None = None


# ---- answers


class PromptDetails(TypedDict):
    cached_tokens: int


class ChatUsage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Answer(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(TypedDict):
    index: int
    message: Answer
    logprobs: None
    finish_reason: str
    state_id: NotRequired[str]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: None
    finish_reason: str | None
    state_id: NotRequired[str]


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[ChatUsage | None]


class InputDetails(TypedDict):
    text_tokens: int
    image_tokens: int


class ImageUsage(TypedDict):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails


class ImageData(TypedDict):
    b64_json: str


class ImageSettings(TypedDict):
    size: str
    quality: str
    background: str
    output_format: str


class Images(ImageSettings):
    created: int
    data: list[ImageData]
    seed: int
    usage: ImageUsage


class PartialImage(ImageSettings):
    type: Literal["image_generation.partial_image"]
    b64_json: str
    created_at: int
    partial_image_index: int


class CompletedImage(ImageSettings):
    type: Literal["image_generation.completed"]
    b64_json: str
    created_at: int
    seed: int
    usage: ImageUsage


class ServedModel(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ServedModel]


class Health(TypedDict):
    status: str
    """`ok`, or what is wrong."""
    model: str
    device: str
    slots: int
    slots_in_use: int
    waiting_requests: int


class KeptState(TypedDict):
    id: str
    object: Literal["state"]


class DeletedState(KeptState):
    deleted: bool


class Error(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    error: Error
