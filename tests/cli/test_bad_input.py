"""Every kind of bad input: exit code 2 and one line on stderr that names the value and what to do."""

import shutil
import struct
import zlib

import pytest
import torch
from PIL import Image


def is_one_line(result) -> bool:
    return result.code == 2 and result.out == "" and result.err.count("\n") == 1 and result.err.startswith("omnimamba: ")


def png_header(width: int, height: int) -> bytes:
    """A PNG file that declares a size and holds no pixels."""
    chunks = b""
    for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, picture):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder.png").mkdir()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no image")
    (folder / "cut.png").write_bytes(picture.read_bytes()[:-40])
    Image.effect_noise((64, 64), 50).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-300])
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "large.png").write_bytes(png_header(20_000, 6_000))
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.png", "no such file"),
        ("folder.png", "is a directory; pass an image file"),
        ("empty.png", "not a whole image"),
        ("text.png", "not a whole image in a format that Pillow reads"),
        ("cut.png", "damaged or cut off"),
        ("cut.jpg", "damaged or cut off"),
        ("bomb.png", "too many pixels, the limit is 100000000; scale it down first"),
        ("large.png", "20000x6000 = 120000000 pixels, the limit is 100000000; scale it down first"),
    ],
)
def test_images(cli, folder, bad_files, picture, name, says):
    for command in (["describe", bad_files / name], ["describe", picture, bad_files / name], ["chat", "--image", bad_files / name]):
        result = cli(*command, "--model", folder)
        assert is_one_line(result), result
        assert name in result.err and says in result.err


def test_stdin_that_is_no_image(cli, folder):
    result = cli("describe", "-", "--model", folder, stdin=b"nothing")
    assert is_one_line(result) and "the image data is not a whole image" in result.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", ""], "caption '' is empty; describe the image"),
        (["serve", "--port", "0", "--cors-origin", "a.example"], "'a.example' is no origin; pass one such as https://example.org"),
        (["generate", "  "], "caption '  ' is empty; describe the image"),
        (["generate", "word " * 40], "caption has 200 tokens, the limit is 24; shorten it by 176"),
        (["generate", "caf\udce9"], "lone surrogate '\\udce9'"),
        (["generate", "a", "--temperature", "-1"], "temperature=-1.0 is not a finite number from 0"),
        (["generate", "a", "--temperature", "nan"], "temperature=nan is not a finite number"),
        (["generate", "a", "--top-k", "-1"], "top_k=-1 is below 0; pass 0 or more"),
        (["generate", "a", "--top-p", "0"], "top_p=0.0 is outside (0, 1]"),
        (["generate", "a", "--top-p", "1.5"], "top_p=1.5 is outside (0, 1]"),
        (["generate", "a", "--guidance-scale", "-2"], "guidance_scale=-2.0 is not a finite number from 0"),
        (["generate", "a", "--num-images", "0"], "num_images=0 is below 1; pass 1 or more"),
        (["generate", "a", "--seed", "-1"], "seed=-1 is below 0; pass 0 or more"),
        (["generate", "a", "--seed", str(2**64)], "does not fit 64 bits; pass one below 2**64"),
        (["generate", "a", "--seed", "red"], "'--seed'"),
        (["generate", "a", "--device", "gpu"], "unknown device 'gpu'; this computer has"),
        (["generate", "a", "--dtype", "int8"], "unknown dtype 'int8'; pass auto, float32"),
        (["describe", "PICTURE", "--question", " "], "question ' ' is empty; ask something"),
        (["describe", "PICTURE", "--max-new-tokens", "0"], "max_new_tokens=0 is below 1; pass 1 or more"),
        (["describe", "PICTURE", "--max-new-tokens", "5000"], "max_new_tokens=5000 exceeds the"),
        (["describe", "PICTURE", "--top-p", "-1"], "top_p=-1"),
        (["describe", "PICTURE", "--past-last-position", "wrap"], "past_last_position='wrap' is unknown; pass one of error, clamp"),
        (["chat", "--temperature", "-1"], "temperature=-1.0"),
    ],
)
def test_values(cli, folder, picture, tmp_path, args, says):
    args = [picture if arg == "PICTURE" else arg for arg in args]
    out = ["--out", tmp_path / "image.png"] if args[0] == "generate" else []
    result = cli(*args, *out, "--model", folder, stdin=b"what?\n")
    assert is_one_line(result), result
    assert says in result.err
    assert not (tmp_path / "image.png").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["paint"], "No such command 'paint'"),
        (["generate"], "see `omnimamba generate --help`"),
        (["generate", "a", "--sed", "1"], "No such option: --sed"),
        (["generate", "a", "b"], "see `omnimamba generate --help`"),
        (["describe"], "see `omnimamba describe --help`"),
        (["describe", "a.png", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["info", "--preset", "nanoo"], "unknown preset 'nanoo'; did you mean 'nano'?"),
        (["chat", "--image", "a.png", "--load-state", "b.safetensors"], "brings its own image; drop --image a.png"),
        (["train", "missing.toml"], "missing.toml: no such recipe"),
        (["convert", "missing.pth", "out"], "missing.pth"),
        (["convert", "no model", "out"], "no model"),
        (["convert", "nano", "out", "--to", "onnx"], "unknown format 'onnx'; valid: official, safetensors"),
        (["convert", "nano", "out", "--dtype", "int3"], "unknown dtype 'int3'"),
        (["convert", "nano", "out", "--without", "text"], "cannot leave out text; vision and vq can be left out"),
        (["convert", "nano", "out", "--tower", "siglip"], "--tower siglip: expected NAME=FILE"),
        (["tokenize", "folder"], "--out"),
        (["tokenize", "folder", "-o", "out", "--vq", "missing.safetensors"], "missing.safetensors"),
        (["tokenize", "folder", "-o", "out", "--batch", "0"], "--batch"),
        (["eval", "imagenet"], "No such command 'imagenet'"),
        (["eval", "emoji"], "--data"),
    ],
)
def test_command_lines(cli, args, says):
    result = cli(*args)
    assert is_one_line(result), result
    assert says in result.err


def test_unwritable_outputs_are_found_before_the_model_is_loaded(cli, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for out, says in (
        (tmp_path / "image.gif", "end it in one of .png, .jpg"),
        (tmp_path / "image", "end it in one of .png, .jpg"),
        (tmp_path / "folder.png", "is a directory; name a file in it"),
        (tmp_path / "file/image.png", "choose another place"),
        (tmp_path / "file/deep/image.png", "choose another place"),
    ):
        result = cli("generate", "a", "--out", out, "--model", "no such model")
        assert is_one_line(result) and str(out) in result.err and says in result.err
    below = tmp_path / "file/new"
    for command in (["chat", "--save-state", below], ["tokenize", "a", "--out", below], ["eval", "emoji", "--data", "a", "--json", below]):
        result = cli(*command, "--model", "no such model")
        assert is_one_line(result) and "choose another place" in result.err


def test_models(cli, folder, tmp_path):
    def result_of(model):
        result = cli("generate", "a", "--out", tmp_path / "image.png", "--model", model)
        assert is_one_line(result), result
        return result.err

    assert "nanoo" in result_of("nanoo")
    (tmp_path / "empty").mkdir()
    assert "config.json" in result_of(tmp_path / "empty")
    for name, damage in (
        ("cut", lambda data: data[: len(data) // 2]),
        ("garbage", lambda data: b"\x07" * 100),
        ("nothing", lambda data: b""),
    ):
        shutil.copytree(folder, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        assert "model.safetensors" in result_of(tmp_path / name)
    (tmp_path / "text.pth").write_text("this is no checkpoint")
    assert "text.pth" in result_of(tmp_path / "text.pth")
    (tmp_path / "missing").mkdir()
    assert "missing.pth" in result_of(tmp_path / "missing.pth")


def test_state_files(cli, folder, picture, tmp_path):
    (tmp_path / "text").write_text("this is no state")
    for file, says in (
        (tmp_path / "missing", "no such state file"),
        (tmp_path / "text", "not a state file"),
        (picture, "not a state file"),
    ):
        result = cli("chat", "--load-state", file, "--model", folder)
        assert is_one_line(result) and str(file) in result.err and says in result.err


def test_a_traceback_on_request(cli, folder, monkeypatch):
    assert cli("describe", "missing.png", "--model", folder).code == 2
    monkeypatch.setenv("OMNIMAMBA_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="missing.png"):
        cli("describe", "missing.png", "--model", folder)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"), "2.00 GiB"),
        (MemoryError(), "on the host"),
    ],
)
def test_out_of_memory(cli, folder, monkeypatch, error, said):
    def load(*_, **__):
        raise error

    monkeypatch.setattr("omnimamba.engine.omnimamba.OmniMamba.from_pretrained", load)
    result = cli("generate", "a zoo", "--model", folder)
    assert (result.code, result.out) == (1, "")
    assert "out of memory" in result.err and said in result.err and "--quantize int4" in result.err
    assert "total capacity" not in result.err
