"""Image files to pixels of the two encoders, and painted pixels back to images.

The encoders see an image differently, as in the authors' code: the understanding towers get all of it, squeezed to a
square (`resize-naive`), the VQ tokenizer its central square.
"""

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from omnimamba.config import TowerConfig

MAX_PIXELS = 100_000_000
"""Largest image that is decoded: 300 MB as RGB. A small file can declare far more (decompression bomb)."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF orientation tag (EXIF 2.32, section 4.6.4.A)."""


def load_image(source: ImageSource) -> Image.Image:
    """A new upright RGB image of a path, the bytes of a file, a Pillow image or an array.

    First frame of an animation; transparency is put on white; 16-bit and float values are scaled, never clipped.
    Arrays: [h, w] or [h, w, 1 | 2 | 3 | 4] (grey, grey and alpha, RGB, RGBA) of bool, uint8, uint16, or floats in [0, 1].
    Raises FileNotFoundError, or ValueError for what is not a whole image of 1 to MAX_PIXELS pixels.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_image_of_array(source), "the array")
    if isinstance(source, Image.Image):
        _check_size(source.size, "the image")
        return _decoded(source, "the image")
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), "the image data")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"cannot read an image from {type(source).__name__}; pass a path, bytes, a Pillow image or a NumPy array")
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{path} is a directory; pass an image file")
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    with file:
        return _open(file, str(path))


def _open(file: IO[bytes], name: str) -> Image.Image:
    with _pillow_warnings_ignored():
        image = _identified(file, name)
        _check_size(image.size, name)
        if image.format == "PNG":  # the one common format with checksums; decoding does not look at them
            try:
                image.verify()
            except Exception as error:  # see _identified
                raise _damaged(name, error) from error
            file.seek(0)
            image = _identified(file, name)  # a verified image cannot be decoded
        return _decoded(image, name)


@contextlib.contextmanager
def _pillow_warnings_ignored() -> Iterator[None]:
    """Pillow warns about odd metadata, and of sizes near its own limit; ours is checked.

    Filters belong to the process, not to a thread: a worker that set and restored them would undo what another thread set in
    between. So workers leave them alone, and may show such a warning once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _identified(file: IO[bytes], name: str) -> Image.Image:
    """An image whose header is read and nothing more."""
    try:
        return Image.open(file)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a whole image in a format that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} declares too many pixels, the limit is {MAX_PIXELS}; scale it down first") from error
    except Exception as error:  # Pillow's readers raise errors of many kinds for damaged files
        raise _damaged(name, error) from error


def _decoded(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        # After load: some formats keep EXIF behind the pixels, and TIFF turns itself upright while loading.
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # see _identified
        raise _damaged(name, error) from error
    rgb = _to_rgb(image, name)
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _damaged(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{name} is damaged or cut off: {reason}")


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height == 0:
        raise ValueError(f"{name} is {width}x{height}, it has no pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} is {width}x{height} = {width * height} pixels, the limit is {MAX_PIXELS}; scale it down first")


def _image_of_array(array: np.ndarray) -> Image.Image:
    """A Pillow image of mode L, LA, RGB or RGBA."""
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in (1, 2, 3, 4):
        raise ValueError(f"array of shape {array.shape} is not an image; pass [h, w] or [h, w, channels] with 1 to 4 channels")
    _check_size((array.shape[1], array.shape[0]), "the array")
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = _scaled(array, 0, 65535)
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # also refuses NaN
            raise ValueError(f"array values {array.min()} to {array.max()} are outside [0, 1]; scale them, or pass uint8")
        array = _scaled(array, 0, 1)
    elif array.dtype != np.uint8:
        raise ValueError(f"array of {array.dtype} is not an image; pass bool, uint8, uint16, or floats in [0, 1]")
    if channels == 1:
        array = array.reshape(array.shape[:2])
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A new RGB image; alpha is composited on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bit(image, name).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")  # La -> RGBA is not in Pillow
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Mode L of a grey image of 16 or 32 bits or floats; Pillow's own conversion clips all that is above 255.

    Modes I and F do not say what white is. It is taken to be the first of 1 (floats only), 255 and 65535 that no value
    exceeds; values beyond that, or below 0, are stretched from the least to the greatest.
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has pixels that are infinite or not a number; replace them first")
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        whites = [65535]
    else:
        whites = [1, 255, 65535] if image.mode == "F" else [255, 65535]
    white = next((white for white in whites if high <= white), None)
    if low < 0 or white is None:
        return Image.fromarray(_scaled(values, float(low), float(high)))
    return Image.fromarray(_scaled(values, 0, white))


def _scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """uint8 values with `black` at 0 and `white` at 255, rounded."""
    scaled = values.astype(np.float64)  # float32 cannot hold every 32-bit integer, and a value past 255 would wrap around
    scaled -= black
    scaled *= 255 / (white - black or 1)
    return np.rint(scaled, out=scaled).astype(np.uint8)


def resize_naive(image: Image.Image, size: int) -> Image.Image:
    """A square of `size` pixels with all of the image in it; the aspect ratio is not kept."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The central square of the image, as wide as its shorter side, resized to `size` pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # crop first: `resize(box=...)` would let pixels from outside the box leak in
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def tower_pixels(image: Image.Image, tower: TowerConfig) -> Tensor:
    """Input of one understanding tower, normalised with its mean and standard deviation: [3, s, s], s = tower.image_size."""
    pixels = _chw(resize_naive(image, tower.image_size)) / 255
    return (pixels - torch.tensor(tower.mean).view(3, 1, 1)) / torch.tensor(tower.std).view(3, 1, 1)


def vq_pixels(image: Image.Image, size: int) -> Tensor:
    """Input of the VQ encoder in [-1, 1]: [3, size, size]."""
    return _chw(center_square(image, size)) / 127.5 - 1


def _chw(image: Image.Image) -> Tensor:
    """float32 values 0..255: [3, h, w]."""
    if image.mode != "RGB":
        raise ValueError(f"image mode is {image.mode}, not RGB; open it with load_image")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB images of the VQ decoder's output. images: [b, 3, h, w], nominally in [-1, 1]; what lies outside is clamped."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {tuple(images.shape)} are not [b, 3, h, w]")
    pixels = images.detach().float().cpu()
    if not pixels.isfinite().all():
        raise ValueError("the painted image has values that are infinite or not a number; try dtype=float32")
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]
