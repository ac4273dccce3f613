"""Odd but valid images look right, damaged ones are one clear line, pixels are those of the authors' transforms."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence, features
from torchvision.transforms import InterpolationMode, v2

from omnimamba.config import DINO, SIGLIP, TowerConfig
from omnimamba.processor import image as image_module
from omnimamba.processor.image import MAX_PIXELS, load_image, resize_naive, to_pil, tower_pixels, vq_pixels

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
TOWER = TowerConfig("any", dim=8, image_size=24, num_tokens=9, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def corners() -> Image.Image:
    """24x16 with a different colour in every quarter: red, green / blue, white."""
    image = Image.new("RGB", (24, 16))
    for colour, place in zip((RED, GREEN, BLUE, WHITE), ((0, 0), (12, 0), (0, 8), (12, 8)), strict=True):
        image.paste(colour, (*place, place[0] + 12, place[1] + 8))
    return image


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def quarters(image: Image.Image) -> list[tuple[int, ...]]:
    """Colours at the middle of the four quarters, row by row."""
    w, h = image.size
    return [image.getpixel((x, y)) for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]  # type: ignore[misc]


def assert_near(image: Image.Image, expected: list[tuple[int, int, int]], tolerance: int = 0) -> None:
    assert image.mode == "RGB"
    assert np.abs(np.array(quarters(image)) - np.array(expected)).max() <= tolerance


# Sources


def test_path_bytes_image_and_array_give_the_same(tmp_path: Path) -> None:
    array = noise(9, 7)
    path = tmp_path / "noise.png"
    Image.fromarray(array).save(path)
    for source in (path, str(path), path.read_bytes(), Image.open(path), Image.fromarray(array), array):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.array(loaded), array)


def test_loaded_image_is_a_new_one() -> None:
    source = corners()
    load_image(source).paste(BLUE, (0, 0, 24, 16))
    assert quarters(source) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((4, 4), 128, np.uint8), (128, 128, 128)),
        (np.full((4, 4, 1), 128, np.uint8), (128, 128, 128)),
        (np.full((4, 4, 2), (100, 0), np.uint8), WHITE),
        (np.full((4, 4, 3), RED, np.uint8), RED),
        (np.full((4, 4, 4), (*BLUE, 255), np.uint8), BLUE),
        (np.full((4, 4), 40000, np.uint16), (156, 156, 156)),
        (np.full((4, 4, 3), (0, 32768, 65535), np.uint16), (0, 128, 255)),
        (np.full((4, 4), True), WHITE),
        (np.full((4, 4, 3), (0, 0.5, 1), np.float64), (0, 128, 255)),
        (np.full((8, 8), 7, np.uint8)[::2, ::-2], (7, 7, 7)),
    ],
)
def test_array_of_any_common_kind(array: np.ndarray, expected: tuple[int, int, int]) -> None:
    assert_near(load_image(array), [expected] * 4)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4,), np.uint8), r"shape \(4,\)"),
        (np.zeros((4, 4, 5), np.uint8), r"shape \(4, 4, 5\)"),
        (np.zeros((0, 4, 3), np.uint8), "4x0"),
        (np.zeros((4, 4), np.int64), "int64"),
        (np.full((4, 4), 1.5), "1.5"),
        (np.full((4, 4), np.nan), "nan"),
        (np.full((4, 4), -0.1), "-0.1"),
    ],
)
def test_array_that_is_no_image_is_one_line(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_image(array)
    assert "\n" not in str(raised.value)


# Odd but valid


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("GIF", {}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 4),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 4),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 30),
        pytest.param("AVIF", {"quality": 95}, 30, marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
    ],
)
def test_file_formats(format: str, options: dict[str, Any], tolerance: int) -> None:
    loaded = load_image(encoded(corners(), format, **options))
    assert loaded.size == (24, 16)
    assert_near(loaded, [RED, GREEN, BLUE, WHITE], tolerance)


def test_grey_and_black_and_white() -> None:
    assert_near(load_image(encoded(Image.new("L", (4, 4), 77), "PNG")), [(77, 77, 77)] * 4)
    assert_near(load_image(encoded(Image.new("1", (4, 4), 1), "PNG")), [WHITE] * 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa", "La", "PA"])
def test_transparency_is_put_on_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (4, 0, 8, 8))
    if mode == "P":
        image = image.convert("P")
    elif mode == "PA":
        image = image.convert("RGB").convert("PA")
        image.putalpha(Image.fromarray(np.repeat(np.array([[255] * 4 + [0] * 4], np.uint8), 8, axis=0)))
    elif mode == "La":
        image = image.convert("LA").convert("La")
    else:
        image = image.convert(mode)
    assert image.mode == mode
    assert_near(load_image(image), [(0, 0, 0), WHITE] * 2)


def test_half_transparent_is_blended() -> None:
    loaded = load_image(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "PNG"))
    assert_near(loaded, [(255, 127, 127)] * 4, tolerance=1)


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_with_a_transparent_entry(transparency: int | bytes) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.paste(1, (4, 0, 8, 8))
    assert_near(load_image(encoded(image, "PNG", transparency=transparency)), [RED, WHITE] * 2)


def test_palette_without_transparency() -> None:
    assert_near(load_image(encoded(corners().convert("P", palette=Image.Palette.ADAPTIVE), "PNG")), [RED, GREEN, BLUE, WHITE])


def test_colour_key_of_rgb_is_put_on_white() -> None:
    assert_near(load_image(encoded(corners(), "PNG", transparency=RED)), [WHITE, GREEN, BLUE, WHITE])


def sixteen_bit() -> np.ndarray:
    """Two rows from black to white."""
    return np.tile(np.arange(0, 65536, 257, dtype=np.uint16), (2, 1))


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(sixteen_bit()), "PNG"),
        encoded(Image.fromarray(sixteen_bit()), "TIFF"),
        b"P5 256 2 65535\n" + sixteen_bit().astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "pgm"],
)
def test_sixteen_bit_grey_is_scaled_not_clipped(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode.startswith("I")
    expected = np.tile(np.arange(256, dtype=np.uint8)[:, None], (2, 1, 3))
    assert np.array_equal(np.array(load_image(data)), expected)


def test_dark_sixteen_bit_image_stays_dark() -> None:
    assert_near(load_image(Image.fromarray(np.full((4, 4), 200, np.uint16))), [(1, 1, 1)] * 4)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 51, 102, 255]], np.int32), [0, 51, 102, 255]),
        (np.array([[0, 257, 2570, 65535]], np.int32), [0, 1, 10, 255]),
        (np.array([[-(2**31), 0, 2**31 - 1]], np.int32), [0, 128, 255]),
        (np.array([[100_000, 100_000]], np.int32), [0, 0]),
        (np.array([[0, 0.2, 1]], np.float32), [0, 51, 255]),
        (np.array([[0, 51, 255]], np.float32), [0, 51, 255]),
        (np.array([[0, 2570, 65535]], np.float32), [0, 10, 255]),
        (np.array([[-3.4e38, 0, 3.4e38]], np.float32), [0, 128, 255]),
    ],
)
def test_wide_grey_modes_find_their_white(values: np.ndarray, expected: list[int]) -> None:
    image = Image.fromarray(values)
    assert image.mode in ("I", "F")
    loaded = np.array(load_image(image))
    assert loaded[0, :, 0].tolist() == expected
    assert np.array_equal(loaded[..., 0], loaded[..., 2])


def test_float_image_with_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a number"):
        load_image(Image.fromarray(np.array([[0, np.nan]], np.float32)))


def test_cmyk_jpeg() -> None:
    data = encoded(corners().convert("CMYK"), "JPEG", quality=95, subsampling=0)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
    assert_near(load_image(data), [RED, GREEN, BLUE, WHITE], tolerance=8)


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "RGBX"])
def test_other_colour_modes(mode: str) -> None:
    assert_near(load_image(corners().convert(mode)), [RED, GREEN, BLUE, WHITE], tolerance=3)


def test_lab() -> None:
    # CIE: L* = 53.2, a* = 80.1, b* = 67.2 is the red of sRGB (D65); profiles connect in D50, so only about
    lab = Image.new("LAB", (4, 4), (round(53.2 * 2.55), 128 + 80, 128 + 67))
    assert_near(load_image(lab), [RED] * 4, tolerance=25)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    # how a camera held that way stores the scene: the inverse of what a viewer does (EXIF 2.32, section 4.6.4.A)
    turns = Image.Transpose
    stored_by = {
        1: [],
        2: [turns.FLIP_LEFT_RIGHT],
        3: [turns.ROTATE_180],
        4: [turns.FLIP_TOP_BOTTOM],
        5: [turns.TRANSPOSE],
        6: [turns.ROTATE_90],
        7: [turns.TRANSVERSE],
        8: [turns.ROTATE_270],
    }
    stored = corners()
    for turn in stored_by[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(encoded(stored, format, exif=exif, **({"quality": 95} if format in ("JPEG", "WEBP") else {})))
    assert loaded.size == (24, 16)
    assert_near(loaded, [RED, GREEN, BLUE, WHITE], tolerance=30 if format in ("JPEG", "WEBP") else 0)


def test_garbage_in_exif_does_not_matter() -> None:
    data = encoded(corners(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage", quality=95, subsampling=0)
    assert_near(load_image(data), [RED, GREEN, BLUE, WHITE], tolerance=4)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as image:
        assert len(list(ImageSequence.Iterator(image))) == 3
    assert_near(load_image(data), [RED] * 4, tolerance=4)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (400, 40), (40, 400), (5000, 4000)])
def test_every_shape_becomes_model_input(size: tuple[int, int]) -> None:
    image = load_image(Image.new("RGB", size, (255, 0, 51)))
    tower = tower_pixels(image, TOWER)
    assert tower.shape == (3, 24, 24) and tower.dtype == torch.float32
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(TOWER.mean)) / torch.tensor(TOWER.std)
    torch.testing.assert_close(tower, expected.view(3, 1, 1).expand(3, 24, 24))
    vq = vq_pixels(image, 32)
    assert vq.shape == (3, 32, 32) and vq.dtype == torch.float32
    torch.testing.assert_close(vq, torch.tensor([1.0, -1.0, -0.6]).view(3, 1, 1).expand(3, 32, 32))


# Damaged


def bomb_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    body = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def flipped_byte(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]


WHOLE_PNG = encoded(Image.fromarray(noise(40, 30)), "PNG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a whole image"),
        (b"just some text\n" * 20, "is not a whole image"),
        (WHOLE_PNG[:9], "is not a whole image|damaged"),
        (flipped_byte(WHOLE_PNG, len(WHOLE_PNG) // 2), "damaged"),
        (bomb_header(10_001, 10_000), "10001x10000 = 100010000 pixels, the limit is 100000000"),
        (bomb_header(60_000, 60_000), "too many pixels, the limit is 100000000"),
        (bomb_header(0, 5), "0x5|is not a whole image|damaged"),
    ],
    ids=["empty", "text", "cut-header", "flipped-bits", "bomb", "big-bomb", "zero-width"],
)
def test_bad_data_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ValueError, match=message) as raised:
            load_image(source)
        assert "\n" not in str(raised.value)
        assert str(raised.value).startswith(str(path) if source is path else "the image data")


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        pytest.param("AVIF", {}, marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
    ],
)
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.99])
def test_cut_file_is_never_accepted(format: str, options: dict[str, Any], share: float) -> None:
    whole = encoded(Image.fromarray(noise(40, 30)), format, **options)
    load_image(whole)
    with pytest.raises(ValueError, match="damaged|is not a whole image") as raised:
        load_image(whole[: int(len(whole) * share)])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", [12, 13, 20])
def test_png_without_its_end_is_not_accepted(missing: int) -> None:
    with pytest.raises(ValueError, match="damaged"):
        load_image(WHOLE_PNG[:-missing])


def test_bomb_is_refused_before_decoding_whatever_pillow_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_decoding(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(image_module, "_decoded", no_decoding)
    with pytest.raises(ValueError, match="the limit is"):
        load_image(bomb_header(60_000, 60_000))


def test_size_just_below_the_limit_passes_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(image_module, "_decoded", lambda image, _: seen.append(image.size))
    side = round(MAX_PIXELS**0.5)
    load_image(bomb_header(side, side))  # Pillow warns above 89 megapixels, and warnings are errors here
    assert seen == [(side, side)]


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_image_without_pixels_is_an_error(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        load_image(Image.new("RGB", size))


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^no such file: .*absent.png$"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is a directory"):
        load_image(tmp_path)


@pytest.mark.parametrize("source", [None, 3, [1, 2]])
def test_source_of_another_type_is_an_error(source: Any) -> None:
    with pytest.raises(ValueError, match=f"cannot read an image from {type(source).__name__}"):
        load_image(source)


# Pixels


@pytest.mark.parametrize("tower", [DINO, SIGLIP, TOWER], ids=["dino", "siglip", "small"])
@pytest.mark.parametrize("size", [(64, 64), (500, 120), (7, 31)])
def test_tower_pixels_are_those_of_torchvision(tower: TowerConfig, size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    transform = v2.Compose(
        [
            v2.Resize((tower.image_size, tower.image_size), interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(tower.mean, tower.std),
        ]
    )
    torch.testing.assert_close(tower_pixels(image, tower), transform(image), rtol=0, atol=1e-6)


def test_resize_naive_keeps_all_of_the_image() -> None:
    wide = Image.new("RGB", (100, 10), RED)
    wide.paste(BLUE, (50, 0, 100, 10))
    assert_near(resize_naive(wide, 16), [RED, BLUE] * 2)


@pytest.mark.parametrize("size", [(30, 10), (10, 30)])
def test_vq_pixels_are_the_central_square(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, RED)
    left, top = (size[0] - 10) // 2, (size[1] - 10) // 2
    centre = noise(10, 10)
    image.paste(Image.fromarray(centre), (left, top))
    expected = torch.from_numpy(centre).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(vq_pixels(image, 10), expected)
    # nothing from outside the square leaks in when it is resized, too
    flat = Image.new("RGB", size, RED)
    flat.paste(BLUE, (left, top, left + 10, top + 10))
    torch.testing.assert_close(vq_pixels(flat, 7), torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 7, 7))


def test_vq_pixels_are_resized_with_lanczos() -> None:
    image = Image.fromarray(noise(50, 50))
    expected = torch.from_numpy(np.array(image.resize((16, 16), Image.Resampling.LANCZOS))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(vq_pixels(image, 16), expected)


@pytest.mark.parametrize("to_pixels", [lambda image: tower_pixels(image, TOWER), lambda image: vq_pixels(image, 8)])
def test_pixels_of_an_unconverted_image_are_an_error(to_pixels: Callable[[Image.Image], torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="mode is L, not RGB"):
        to_pixels(Image.new("L", (8, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_pil_undoes_vq_pixels(dtype: torch.dtype) -> None:
    arrays = [noise(8, 8), np.tile(np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4, 3)]
    pixels = torch.stack([vq_pixels(Image.fromarray(array), 8) for array in arrays]).to(dtype).requires_grad_()
    for image, array in zip(to_pil(pixels), arrays, strict=True):
        assert image.mode == "RGB"
        assert np.array_equal(np.array(image), array)


def test_to_pil_clamps_and_takes_half_precision() -> None:
    pixels = torch.tensor([-7.0, 0.0, 7.0], dtype=torch.bfloat16).view(1, 3, 1, 1).expand(1, 3, 2, 5)
    (image,) = to_pil(pixels)
    assert image.size == (5, 2)
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_to_pil_of_no_images_is_empty() -> None:
    assert to_pil(torch.zeros(0, 3, 8, 8)) == []


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8)])
def test_to_pil_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are not \\[b, 3, h, w\\]"):
        to_pil(torch.zeros(shape))


def test_to_pil_of_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a number"):
        to_pil(torch.full((1, 3, 2, 2), float("nan")))
