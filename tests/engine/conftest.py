"""A tiny model whose greedy answers vary, and a small byte-level BPE tokenizer that fits it."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer

from omnimamba.config import SPECIAL_TOKENS, OmniMambaConfig, preset
from omnimamba.data.prepare import train_text_tokenizer
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.processor.tokenizer import TextTokenizer

TEXT = ["a red apple on a table", "what is shown in the image? an apple.", "In: what is this?\nOut: a zoo ", "USER: hello ASSISTANT: good"]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_text_tokenizer(TEXT, 300).save(str(path))
    return path


@pytest.fixture(scope="session")
def config(tokenizer_file) -> OmniMambaConfig:
    base = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    rows = -(-(base + len(SPECIAL_TOKENS)) // 16) * 16
    return dataclasses.replace(preset("tiny"), base_vocab_size=base, text_vocab_size=rows, max_caption_tokens=12, mmu_positions=100)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file, config) -> TextTokenizer:
    return TextTokenizer.from_file(tokenizer_file, config)


@torch.no_grad()
def _liven(model: OmniMambaModel) -> None:
    """Redraws what initialisation leaves small or zero, in place: else greedy decoding repeats one token for ever."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "out_proj" in name:  # the tied head would pick the token just read, if the blocks added little to it
            torch.nn.init.normal_(parameter, std=3 * parameter.shape[1] ** -0.5)
        elif "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.4)
        elif "positions" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif name.startswith(("image_mlp", "caption_mlp")) and name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=3 * parameter.shape[1] ** -0.5)


@pytest.fixture(scope="session")
def liven():
    return _liven


@pytest.fixture(scope="session")
def model(config) -> OmniMambaModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OmniMambaModel(config)
        _liven(model)
    return model.eval()
