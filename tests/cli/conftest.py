"""A tiny random model in a folder, and command lines run in this process."""

import dataclasses
import io
import sys

import pytest
from PIL import Image

from omnimamba.cli import main
from omnimamba.config import preset
from omnimamba.engine.omnimamba import OmniMamba


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs `omnimamba ARGS` with the bytes of stdin and returns its exit code and output."""
    monkeypatch.delenv("OMNIMAMBA_DEBUG", raising=False)

    def run(*args: object, stdin: bytes = b"", typed: bool = False) -> Result:
        source = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        source.isatty = lambda: typed
        monkeypatch.setattr(sys, "stdin", source)
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer_file):
    """A saved tiny model of random weights."""
    config = dataclasses.replace(preset("tiny"), base_vocab_size=257, text_vocab_size=272, max_caption_tokens=24, mmu_positions=240)
    path = tmp_path_factory.mktemp("model") / "tiny"
    OmniMamba.from_config(config, tokenizer_file=tokenizer_file).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def omni(folder):
    return OmniMamba.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """The path of a small PNG file."""
    path = tmp_path_factory.mktemp("images") / "picture.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)
    return path
