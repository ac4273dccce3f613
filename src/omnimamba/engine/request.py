"""What the engine is asked for and what it answers: requests, sampling settings, events."""

from __future__ import annotations

import dataclasses
import enum
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from omnimamba.config import OmniMambaConfig, Task
from omnimamba.model.state import MambaState

PAST_LAST_POSITION = ("error", "clamp")


class FinishReason(enum.StrEnum):
    """Why a sample got its last token."""

    STOP = "stop"
    """The model ended its text."""
    LENGTH = "length"
    """It has max_new_tokens tokens; so ends every complete image."""
    CANCELLED = "cancelled"
    ERROR = "error"
    """A pass of the engine failed; `Event.error` says how."""


def random_seed() -> int:
    """A seed from the operating system's entropy."""
    return secrets.randbits(32)


def require_int(name: str, value: Any, low: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not a whole number; pass an int from {low}")
    if value < low:
        raise ValueError(f"{name}={value} is below {low}; pass {low} or more{hint}")


def require_float(name: str, value: Any, low: float, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < low:
        raise ValueError(f"{name}={value!r} is not a finite number from {low:g}{hint}")


def require_sampling(temperature: Any, top_k: Any, top_p: Any, guidance_scale: Any) -> None:
    """ValueError for values that no distribution can be made of."""
    require_float("temperature", temperature, 0, "; 0 is greedy, 1 the model's own distribution")
    require_int("top_k", top_k, 0, " (0 is off)")
    require_float("top_p", top_p, 0, "; pass one in (0, 1], 1 is off")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is outside (0, 1]; 1 is off")
    require_float("guidance_scale", guidance_scale, 0, "; 1 is off")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    temperature: float = 1.0
    """0 is greedy, the same as top_k=1."""
    top_k: int = 0
    """Only the k most probable tokens; 0 is off."""
    top_p: float = 1.0
    """Only the most probable tokens that together hold this share; 1 is off."""
    seed: int | None = None
    """None draws one from the operating system when the request is made; `Request.seed` says which."""
    max_new_tokens: int | None = None
    """None: the tokens of one image, or all positions left for a text."""
    guidance_scale: float = 1.0
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598), T2I only; 1 is off."""
    past_last_position: str = "error"
    """A sequence longer than the task's position table: `error` refuses it, `clamp` repeats the table's last row."""

    def __post_init__(self) -> None:
        require_sampling(self.temperature, self.top_k, self.top_p, self.guidance_scale)
        if self.seed is not None:
            require_int("seed", self.seed, 0)
            if self.seed >= 2**64:
                raise ValueError(f"seed={self.seed} does not fit 64 bits; pass one below 2**64")
        if self.max_new_tokens is not None:
            require_int("max_new_tokens", self.max_new_tokens, 1)
        if self.past_last_position not in PAST_LAST_POSITION:
            raise ValueError(f"past_last_position={self.past_last_position!r} is unknown; pass one of {', '.join(PAST_LAST_POSITION)}")

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale != 1


@dataclasses.dataclass(frozen=True, eq=False)
class UnreadImage:
    """An image whose features are computed once its request starts, in one pass with those of other requests that start then."""

    pixels: Callable[[], Any]
    """What `encode` reads."""
    encode: Callable[[Sequence[Any]], Tensor]
    """[b, k, vision_dim] of the pixels of b images; the same function for all that may pass together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One prompt and `num_samples` continuations of it.

    A sequence starts with `ids` of a prompt: [t2i][sot] caption [eot][soi], or [mmu][soi][eoi][sot] text with the image of
    `features` in the middle. With a `state` it goes on instead: `ids` are image tokens (T2I) or text (MMU).
    Sample i draws from the random stream (seed, first_sample + i), whatever else runs beside it.
    """

    task: Task
    ids: tuple[int, ...]
    features: Tensor | UnreadImage | None = None
    """[k, vision_dim] of the image of an MMU prompt, or what they are computed from; None is the text-only layout."""
    null_ids: tuple[int, ...] | None = None
    """The prompt without a caption, as long as `ids`; needed when guidance_scale is not 1."""
    sampling: SamplingParams = SamplingParams()
    num_samples: int = 1
    first_sample: int = 0
    state: MambaState | None = None
    """One slot to continue from; it is copied, not changed."""
    keep_state: bool = False
    """Each sample's last event carries its state, which has consumed every token but the last one."""
    prefix_key: str | None = None
    """Names the image of an MMU prompt, or that it has none, for the engine's prefix snapshots; None neither takes nor uses any."""

    def __post_init__(self) -> None:
        require_int("num_samples", self.num_samples, 1)
        require_int("first_sample", self.first_sample, 0)
        object.__setattr__(self, "ids", tuple(self.ids))
        if self.sampling.seed is None:
            object.__setattr__(self, "sampling", dataclasses.replace(self.sampling, seed=random_seed()))

    @property
    def seed(self) -> int:
        assert self.sampling.seed is not None
        return self.sampling.seed

    @property
    def slots_per_sample(self) -> int:
        return 2 if self.sampling.is_guided else 1

    def check(self, config: OmniMambaConfig) -> int:
        """The number of tokens to generate. ValueError if the model cannot run this request."""
        continues_image = self.task is Task.T2I and self.state is not None
        vocab_size = config.image_vocab_size if continues_image else config.text_vocab_size
        for ids in (self.ids, self.null_ids or ()):
            wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
            if wrong is not None:
                raise ValueError(f"prompt id {wrong} is outside the vocabulary; ids are 0 to {vocab_size - 1}")
        if not self.ids:
            raise ValueError("the prompt is empty; pass at least one id")
        if self.sampling.is_guided:
            self._check_guidance()
        if self.features is not None or self.prefix_key is not None:
            self._check_image(config)
        if self.state is not None:
            expected = MambaState.zeros(config.backbone, 1, device="meta")
            if self.state.ssm.shape != expected.ssm.shape or self.state.conv.shape != expected.conv.shape:
                raise ValueError(
                    f"state of shape {tuple(self.state.ssm.shape)}; pass one sequence of this model, {tuple(expected.ssm.shape)}"
                )
        return self._check_positions(config)

    def _check_guidance(self) -> None:
        if self.task is not Task.T2I or self.state is not None:
            raise ValueError(f"guidance_scale={self.sampling.guidance_scale} needs a T2I prompt without a state; pass 1 here")
        if self.null_ids is None or len(self.null_ids) != len(self.ids):
            raise ValueError(f"guidance_scale={self.sampling.guidance_scale} needs null_ids as long as ids ({len(self.ids)})")

    def _check_image(self, config: OmniMambaConfig) -> None:
        expected = (config.num_vision_tokens, config.vision_dim)
        if self.task is not Task.MMU or self.state is not None:
            raise ValueError("features and prefix_key belong to an MMU prompt without a state; drop them here")
        if isinstance(self.features, Tensor) and tuple(self.features.shape) != expected:
            raise ValueError(f"features of shape {tuple(self.features.shape)} do not fit this model; pass {expected}")

    def _check_positions(self, config: OmniMambaConfig) -> int:
        start = 0 if self.state is None else int(self.state.position[0])
        if start < 0:
            raise ValueError(f"the state says that it has read {start} positions; pass one that this package saved")
        has_image = self.task is Task.MMU and self.state is None
        if has_image and len(self.ids) < 4:
            raise ValueError(f"an MMU prompt of {len(self.ids)} ids lacks its markers; start with [mmu][soi][eoi][sot]")
        length = start + len(self.ids) + (config.num_vision_tokens if has_image else 0)
        rows = config.t2i_positions if self.task is Task.T2I else config.mmu_positions
        room = rows - length + 1  # the last token is sampled, not read
        num = self.sampling.max_new_tokens
        if num is None:
            num = config.num_image_tokens if self.task is Task.T2I else max(room, 1)
        if num > room and self.sampling.past_last_position == "error":
            over = f"max_new_tokens={num} exceeds the {max(room, 0)} positions left after {length} of the {self.task} table's {rows}"
            remedy = f"pass at most {room}" if room > 0 else "shorten the prompt"
            raise ValueError(f"{over}; {remedy}, or past_last_position='clamp'")
        return num


@dataclasses.dataclass(frozen=True, eq=False)
class Event:
    """One new token of one sample, or the news that it was cancelled or failed (token None)."""

    request_id: int
    sample_idx: int
    token: int | None
    finish_reason: FinishReason | None = None
    state: MambaState | None = None
    num_cached: int = 0
    """Positions of the prompt that came from a prefix snapshot."""
    error: Exception | None = None


OnEvent = Callable[[Event], None]


@dataclasses.dataclass(eq=False)
class Sample:
    """One continuation, put together from its events."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    state: MambaState | None = None

    def add(self, event: Event) -> None:
        if event.token is not None:
            self.tokens.append(event.token)
        self.finish_reason, self.state = event.finish_reason, event.state
