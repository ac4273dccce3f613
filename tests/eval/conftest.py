"""A tiny random model in a folder with a judge, and a tiny data set in the format of the emoji data set."""

import dataclasses
import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from omnimamba.config import EOS_TOKEN, SPECIAL_TOKENS, preset
from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.model.contrastive import ContrastiveHeads

DRAWINGS = [
    # name, base name, keywords, colour
    ("red apple", "red apple", ["fruit", "red"], "red"),
    ("hand: dark skin tone", "hand", ["palm", "five fingers"], "brown"),
    ("hand: light skin tone", "hand", ["palm", "five fingers"], "tan"),
    ("keycap: #", "keycap: #", [], "blue"),
    ("keycap: *", "keycap: *", ["star key"], "navy"),
]
QUESTIONS = {"name": "What is this?", "style": "Which style?", "group": "Which group?", "subgroup": "Which subgroup?"}


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[AddedToken(EOS_TOKEN, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*(row[0] for row in DRAWINGS), *QUESTIONS.values()] * 2, trainer)
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def omni(tokenizer_file):
    base = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    rows = -(-(base + len(SPECIAL_TOKENS)) // 16) * 16
    config = dataclasses.replace(preset("tiny"), base_vocab_size=base, text_vocab_size=rows, max_caption_tokens=24, mmu_positions=250)
    return OmniMamba.from_config(config, tokenizer_file=tokenizer_file)


@pytest.fixture(scope="session")
def judge_folder(omni, tokenizer_file):
    """The model's folder, with what a judge needs."""
    folder = tokenizer_file.parent
    (folder / "config.json").write_text(json.dumps(omni.config.to_dict()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = ContrastiveHeads(omni.config.vision_dim, omni.config.text_vocab_size, dim=16, text_width=32)
    save_file({key: value.contiguous() for key, value in omni.vision.state_dict().items()}, folder / "vision.safetensors")
    save_file(heads.state_dict(), folder / "judge.safetensors")
    return folder


def webp(colour: str) -> bytes:
    image = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 32, 32), fill=colour)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True)
    return file.getvalue()


def line(image: str, kind: str, question: str, answer: str, **more: str) -> str:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": f"{image}#{kind}", "image": image, "conversations": turns, "type": kind, **more}) + "\n"


def write_split(folder, split: str) -> None:
    """Drawings in two Parquet files, questions as .jsonl.gz, captions as .jsonl."""
    rows, questions, captions = [], "", ""
    for i, (caption, base, keywords, colour) in enumerate(DRAWINGS):
        name = f"{i}_noto"
        image = {"bytes": webp(colour), "path": f"{name}.webp"}
        more = {"style": "noto", "group": "Food & Drink", "subgroup": "food-fruit", "skin_tone_variant": base != caption}
        rows.append({"image": image, "id": name, "caption": caption, "base_caption": base, "keywords": keywords, "split": split, **more})
        captions += json.dumps({"image": name, "captions": [caption, f"a {caption}, noto style"]}) + "\n"
        for kind, answer in (("name", caption), ("style", "noto"), ("group", "Food & Drink"), ("subgroup", "food-fruit")):
            questions += line(name, kind, QUESTIONS[kind], answer)
        for sampling in ("random", "adversarial"):
            questions += line(name, "presence", f"Is it a {caption}?", "Yes", sampling=sampling)
            questions += line(name, "presence", "Is it a zoo?", "No", sampling=sampling)
        questions += line(name, "description", "Describe it.", f"A {caption}. Keywords: {', '.join(keywords)}.")
    for part, some in enumerate((rows[:3], rows[3:])):
        schema = None if part == 0 else pq.read_schema(folder / f"{split}-00000-of-00002.parquet")
        pq.write_table(pa.Table.from_pylist(some, schema), folder / f"{split}-0000{part}-of-00002.parquet")
    (folder / f"understanding-{split}.jsonl.gz").write_bytes(gzip.compress(questions.encode()))
    (folder / f"t2i-{split}.jsonl").write_text(captions)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_split(folder, "hidden")
    return folder


@pytest.fixture
def noise():
    """Pictures of noise, one a seed."""
    return lambda seed: Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))
