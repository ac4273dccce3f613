"""`POST /v1/images/generations`: images from a caption, in OpenAI's format."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import time
from collections.abc import AsyncGenerator

from PIL.Image import Image

from omnimamba.engine.request import Request, SamplingParams
from omnimamba.server.errors import ApiError, bad_request
from omnimamba.server.schema import CompletedImage, ImageRequest, Images, ImageSettings, ImageUsage, PartialImage
from omnimamba.server.service import Service

PNG_LEVEL = 1
"""Of zlib: a quarter of the usual level's time for files 15 % larger."""


class Paintings:
    """One call: its request to the engine and what the answer's envelope says."""

    def __init__(self, service: Service, body: ImageRequest) -> None:
        """ApiError for what the model or this server cannot do."""
        with bad_request():
            size = service.omni.vq.config.image_size
        self._size = f"{size}x{size}"
        self._service = service
        self._created = int(time.time())
        self._grid_size = service.omni.vq.config.grid_size
        self._num_partial = body.partial_images or 0
        if body.size not in (None, "auto", self._size):
            raise ApiError(400, f"this model paints {self._size}, not {body.size!r}", param="size")
        if self._num_partial and not body.stream:
            raise ApiError(400, "partial_images come with stream=true only", param="partial_images")
        if self._num_partial >= self._grid_size:
            message = f"partial_images={self._num_partial} is too many; an image has {self._grid_size} rows of tokens, so pass at most "
            raise ApiError(400, f"{message}{self._grid_size - 1}", param="partial_images")
        if body.stream and (body.n or 1) > 1:
            raise ApiError(400, "one image is streamed at a time; pass n=1", param="n")
        given = {name: getattr(body, name) for name in ("guidance_scale", "temperature", "top_k", "top_p", "seed")}
        settings = dataclasses.asdict(service.omni.defaults) | {name: value for name, value in given.items() if value is not None}
        with bad_request():
            sampling = SamplingParams(**settings)
        self._request: Request = service.caption(body.prompt, sampling, body.n or 1)

    async def response(self) -> Images:
        """All images."""
        images: dict[int, str] = {}
        async with contextlib.aclosing(self._service.paint(self._request)) as paintings:
            async for painting in paintings:
                images[painting.image_idx] = await b64_png(painting.image)
        return {
            "created": self._created,
            "data": [{"b64_json": images[i]} for i in range(self._request.num_samples)],
            **self._settings(),
            "seed": self._request.seed,
            "usage": self._usage(),
        }

    async def events(self) -> AsyncGenerator[tuple[str, PartialImage | CompletedImage], None]:
        """Events of one streamed image."""
        parts = self._num_partial + 1
        at_rows = sorted({max(1, self._grid_size * i // parts) for i in range(1, parts)})
        num_sent = 0
        async with contextlib.aclosing(self._service.paint(self._request, at_rows=at_rows)) as paintings:
            async for painting in paintings:
                image = await b64_png(painting.image)
                event: PartialImage | CompletedImage
                if painting.is_complete:
                    event = {
                        "type": "image_generation.completed",
                        "b64_json": image,
                        "created_at": self._created,
                        **self._settings(),
                        "seed": self._request.seed,
                        "usage": self._usage(),
                    }
                else:
                    event = {
                        "type": "image_generation.partial_image",
                        "b64_json": image,
                        "created_at": self._created,
                        **self._settings(),
                        "partial_image_index": num_sent,
                    }
                    num_sent += 1
                yield event["type"], event

    def _settings(self) -> ImageSettings:
        return {"size": self._size, "quality": "auto", "background": "opaque", "output_format": "png"}

    def _usage(self) -> ImageUsage:
        num_in = len(self._request.ids)
        num_out = self._request.num_samples * self._service.omni.config.num_image_tokens
        return {
            "input_tokens": num_in,
            "output_tokens": num_out,
            "total_tokens": num_in + num_out,
            "input_tokens_details": {"text_tokens": num_in, "image_tokens": 0},
        }


async def b64_png(image: Image) -> str:
    """Made in another thread, for it takes long. Least compression: most of that time no other thread runs, the engine's neither."""

    def encoded() -> str:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=PNG_LEVEL)
        return base64.b64encode(file.getvalue()).decode()

    return await asyncio.to_thread(encoded)
