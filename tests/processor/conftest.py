"""The recorded tokenizer and prompts of the golden folder, with a config of the same ids."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from omnimamba.config import OmniMambaConfig, VQConfig, preset
from omnimamba.processor.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def prompts(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def config(golden: Path, prompts: dict[str, Any]) -> OmniMambaConfig:
    """The released prompt layout with the vocabulary and image grid of the golden folder."""
    num_tokens = json.loads((golden / "config.json").read_text(encoding="utf-8"))["num_tokens"]
    grid_size = round(num_tokens**0.5)
    assert grid_size**2 == num_tokens
    return dataclasses.replace(
        preset("1.3b"),
        vq=VQConfig(image_size=16 * grid_size),
        base_vocab_size=prompts["base_tokenizer_length"],
        text_vocab_size=prompts["embedding_rows"],
        eos_id=prompts["eos_id"],
    )


@pytest.fixture(scope="session")
def tok(golden: Path, config: OmniMambaConfig) -> TextTokenizer:
    return TextTokenizer.from_file(golden / "tokenizer.json", config)
