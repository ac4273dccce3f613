"""What a server allows."""

from __future__ import annotations

import dataclasses
import math
import re

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Limits and switches; the defaults suit a server that strangers can reach."""

    api_key: str | None = None
    """What clients must send as `Authorization: Bearer KEY`; None lets everybody in."""
    max_waiting: int = 64
    """Requests that may wait for slots; more get status 429."""
    max_samples: int = 8
    """Largest `n`."""
    max_body_bytes: int = 20 * MIB
    """Of a request, images included."""
    max_image_pixels: int = 25_000_000
    """Of an image sent for a question; counted before it is decoded."""
    max_text_chars: int = 20_000
    """Of all messages of a conversation together, or of a caption."""
    body_seconds: float = 30.0
    """In which the whole request must have come in."""
    request_seconds: float = 600.0
    """From a request to the end of its answer."""
    send_seconds: float = 60.0
    """In which a client must take in a piece of its answer."""
    cors_origins: tuple[str, ...] = ()
    """Web pages whose scripts may call the API, as `https://example.org`, or `*` for all."""
    prefix_cache_bytes: int = 256 * MIB
    """Room for snapshots of images and conversations that were read before."""
    fetch_remote: bool = False
    """Whether `image_url` may be an http or https address; only addresses on the public internet are fetched."""
    fetch_seconds: float = 10.0
    """In which a remote image must have come in."""
    state_bytes: int = 0
    """Room for the states of conversations that clients asked to keep (`POST /v1/states`); 0 switches states off."""

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not key.strip():
            raise ValueError("the API key is empty; give one, or none to let everybody in")
        if key is not None and (key != key.strip() or not key.isascii() or not key.isprintable()):
            raise ValueError("the API key has white space around it, or characters that no header can carry; pass printable ASCII")
        for name in ("max_waiting", "max_samples", "max_body_bytes", "max_image_pixels", "max_text_chars"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} lets nothing through; pass at least 1")
        for name in ("prefix_cache_bytes", "state_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; 0 is off")
        for origin in self.cors_origins:
            if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is no origin; pass one such as https://example.org, without a path, or *")
        for name in ("body_seconds", "request_seconds", "send_seconds", "fetch_seconds"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)} is not a time; pass seconds above 0")
