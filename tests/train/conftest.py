"""Recipes of every kind for the tiny preset, on the tiny data folder."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimamba.config import preset
from omnimamba.data.augment import Augmentation
from omnimamba.data.prepare import train_text_tokenizer
from omnimamba.data.text import read_captions, read_conversations
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel
from omnimamba.train.config import Data, Init, Recipe, Samples, TowerTraining, Train, VQTraining


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory, data_folder) -> Path:
    texts = [text for row in read_captions(data_folder / "t2i-train.jsonl") for text in row.captions]
    texts += [text for row in read_conversations(data_folder / "understanding-train.jsonl") for _, text in row.turns]
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_text_tokenizer(texts, preset("tiny").base_vocab_size).save(str(path))
    return path


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> Path:
    """A folder with `vision.safetensors` and `vq.safetensors` of random weights."""
    folder = tmp_path_factory.mktemp("encoders")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"vision": VisionTowers(preset("tiny").towers), "vq": VQModel(preset("tiny").vq)}
    for name, module in parts.items():
        save_file(module.state_dict(), folder / f"{name}.safetensors")
    return folder


KINDS = ("vq", "vq_adversarial", "tower", "stage1_mmu", "stage1_t2i", "stage2")


@pytest.fixture
def recipe(tmp_path, data_folder, tokenizer_file, encoders):
    """recipe("tower", steps=3): a recipe of one of KINDS that reports at every step; keywords change its [train]."""

    def make(name: str, **train) -> Recipe:
        data = Data(
            str(data_folder), captions="t2i-{split}.jsonl", conversations="understanding-{split}.jsonl", val_split="val", num_threads=2
        )
        init = Init(tokenizer=str(tokenizer_file), vision=str(encoders / "vision.safetensors"), vq=str(encoders / "vq.safetensors"))
        values = {"steps": 4, "lr": 1e-3, "precision": "fp32", "log_every": 1}
        more = {}
        if name.startswith("vq"):
            values["batch"] = 3
            more["vq"] = VQTraining(entropy=0.01, discriminator=0.5 * (name == "vq_adversarial"), discriminator_start=1)
        elif name == "tower":
            values |= {"batch": 6, "weight_decay": 0.1}
            more["tower"] = TowerTraining(
                labels={"caption": 1.0, "style": 0.5},
                plain_share=0.3,
                collage_share=0.2,
                collage_labels=("style",),
                mixup=0.2,
                text_width=32,
            )
        else:
            values |= {"stage": name, "max_text_tokens": 60, "caption_dropout": 0.3}
            values |= {"mmu_batch": 3} if name != "stage1_t2i" else {}
            values |= {"t2i_batch": 2} if name != "stage1_mmu" else {}
            more["samples"] = Samples(("red circle", "blue line"), num_images=2, guidance_scale=2.0)
        kind = name if name == "tower" else "vq" if name.startswith("vq") else "omnimamba"
        augmentation = Augmentation(scale=0.2, rotate=5, brightness=0.2)
        return Recipe(kind, "tiny", Train(**values | train), init, data, augmentation, out=str(tmp_path / "run"), **more)

    return make


@pytest.fixture(scope="session")
def plain_stage2(tmp_path_factory, data_folder, tokenizer_file, encoders) -> Path:
    """Stage 2 of the tiny model without dropout and augmentation, whose randomness each process has of its own."""
    path = tmp_path_factory.mktemp("recipes") / "stage2.toml"
    path.write_text(f"""
kind = "omnimamba"
preset = "tiny"
model.lora.dropout = 0.0
[train]
stage = "stage2"
mmu_batch = 4
t2i_batch = 4
steps = 8
lr = 1e-3
warmup = 2
precision = "fp32"
weight_decay = 0.1
caption_dropout = 0.3
max_text_tokens = 60
ema = 0.9
log_every = 1
val_every = 4
sample_every = 8
save_every = 4
keep_checkpoints = 9
[samples]
prompts = ["red circle"]
num_images = 1
[init]
tokenizer = "{tokenizer_file}"
vision = "{encoders}/vision.safetensors"
vq = "{encoders}/vq.safetensors"
[data]
folder = "{data_folder}"
captions = "t2i-{{split}}.jsonl"
conversations = "understanding-{{split}}.jsonl"
val_split = "val"
num_threads = 1
""")
    return path


@pytest.fixture(scope="session")
def log_lines():
    """The lines of a run's log.jsonl of one kind."""
    return lambda out, kind="train": [
        line for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if line["kind"] == kind
    ]


@pytest.fixture(scope="session")
def folder_tensors():
    """All tensors of a folder's safetensors files by `file/name`."""
    return lambda folder: {
        f"{file.name}/{name}": tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def changed(recipe: Recipe, section: str, **values) -> Recipe:
    return dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **values)})


@pytest.fixture(scope="session")
def change():
    """change(recipe, "train", lr=1): the recipe with other values in a section."""
    return changed
