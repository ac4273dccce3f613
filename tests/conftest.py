"""Fixtures shared by all tests: the golden folder and how to compare with it."""

import functools
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

from omnimamba.config import BackboneConfig, LoraConfig, OmniMambaConfig, TowerConfig, VQConfig
from omnimamba.data.prepare import train_text_tokenizer
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.model.vq import VQModel
from omnimamba.model.weights import from_official

# Ray would send figures of its use, from a thread that outlives its cluster and logs a traceback every ten seconds when it reaches nobody.
# Python 3.11.7 and older fail to parse (`AST constructor recursion depth mismatch`) while another thread formats one.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -k golden` selects every test that reads the golden folder. The longest file comes first, so that no process waits for it."""
    items.sort(key=lambda item: item.path.stem != "test_triton_interpreter")
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.extra_keyword_matches.add("golden")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of tensors recorded from the authors' code; another one can be named by OMNIMAMBA_GOLDEN."""
    return Path(os.environ.get("OMNIMAMBA_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def recorded(golden: Path) -> "GoldenFolder":
    return GoldenFolder(golden)


class GoldenFolder:
    """The golden folder: its sizes, the models with its weights, and the recorded tensors of each case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes = self.json("config.json")
        self.tolerances = self.sizes["tolerances"]
        self.config = golden_config(self.sizes)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def case(self, name: str) -> "Case":
        return Case(load_file(self.folder / f"{name}.safetensors"), self.tolerances)

    @functools.cached_property
    def weights(self) -> dict[str, dict[str, Tensor]]:
        return from_official(load_file(self.folder / "weights.safetensors"))

    @functools.cached_property
    def model(self) -> OmniMambaModel:
        model = OmniMambaModel(self.config).eval()
        model.load_state_dict(self.weights["model"])
        return model

    @functools.cached_property
    def vq(self) -> VQModel:
        model = VQModel(self.config.vq).eval()
        model.load_state_dict(self.weights["vq"])
        return model


class Case:
    """Recorded tensors of one case. A folder may hold a part of them; `check` compares what is there and counts it."""

    def __init__(self, tensors: dict[str, Tensor], tolerances: dict[str, Any]) -> None:
        self.tensors, self.tolerances, self.num_checked = tensors, tolerances, 0

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def check(self, name: str, actual: Tensor, tolerance: str = "hidden_maxabs") -> None:
        """Asserts that `actual` is the recorded tensor within `tolerance`, a key of the folder's tolerances or `exact`."""
        if name not in self:
            return
        self.num_checked += 1
        expected = self[name]
        if tolerance == "exact":
            assert torch.equal(actual, expected), name
            return
        actual = leading_part(actual, expected)
        error = (actual.double() - expected.double()).abs().max().item()
        if tolerance.endswith("_over_absmax"):
            error /= expected.abs().max().item()
        assert error <= self.tolerances[tolerance], f"{name}: {error}"


def leading_part(actual: Tensor, expected: Tensor) -> Tensor:
    """The leading slices of `actual` that were recorded (tests/golden/README.md); both have the same number of axes."""
    assert actual.dim() == expected.dim() and all(n >= m for n, m in zip(actual.shape, expected.shape, strict=True)), (
        f"shape {list(actual.shape)} does not hold the recorded {list(expected.shape)}"
    )
    return actual[tuple(slice(n) for n in expected.shape)]


def golden_config(sizes: dict[str, Any]) -> OmniMambaConfig:
    vq, text = sizes["vq"], sizes["text_vocab"]
    towers = {
        name: TowerConfig("recorded", dim=dim, image_size=1, num_tokens=sizes["n_vision_tokens"])
        for name, dim in sizes["vision_dims"].items()
        if name != "fused"
    }
    return OmniMambaConfig(
        name="golden",
        backbone=BackboneConfig(
            **{key: sizes[key] for key in ("d_model", "n_layer", "d_state", "headdim", "expand", "d_conv", "ngroups", "chunk_size")},
            norm_eps=sizes["rmsnorm_eps"],
        ),
        lora=LoraConfig(sizes["lora"]["rank"], sizes["lora"]["alpha"], sizes["lora"]["dropout"]),
        vq=VQConfig(
            image_size=vq["grid"][0] * vq["downsample"],
            codebook_dim=vq["embed_dim"],
            ch_mult=tuple(vq["ch_mult"]),
            **{key: vq[key] for key in ("ch", "z_channels", "codebook_size", "num_res_blocks")},
        ),
        towers=towers,
        text_vocab_size=text["embedding_rows"],
        base_vocab_size=text["base_tokenizer_length"],
        eos_id=sizes["eos_id"],
        max_caption_tokens=sizes["pos_embed_rows"] - sizes["num_tokens"] - 5,
        mmu_positions=sizes["mmu_pos_embed_rows"],
    )


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges: 257 ids, one for the end and one for each byte."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_text_tokenizer((), 257).save(str(path))
    return path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set in the format of the emoji data set: 12 drawings to train, 6 to validate. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("data")
    write_split(folder, "train", 12)
    write_split(folder, "val", 6)
    return folder


COLOURS = ("red", "blue", "green", "black")
SHAPES = ("circle", "square", "line")


def write_split(folder: Path, split: str, num: int) -> None:
    """Drawings in one or two Parquet files, captions as JSON lines, questions packed; some of these are about no image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, captions, conversations = [], [], []
    for i in range(num):
        colour, shape = COLOURS[i % 4], SHAPES[i % 3]
        name, caption = f"{split}-{i}", f"{colour} {shape}"
        row = {"image": {"bytes": drawing(colour, shape), "path": name}, "id": name, "caption": caption, "base_caption": shape}
        rows.append(row | {"group": "Shapes", "subgroup": f"shape-{shape}", "style": ("thick", "thin")[i % 2]})
        captions.append({"image": name, "captions": [caption, f"a {caption}, drawn"]})
        for question, answer in (("What is this?", caption), ("Is it a circle?", "Yes" if shape == "circle" else "No")):
            conversations.append({"image": name, "conversations": turns(f"<image>\n{question}", answer), "type": "name"})
    # made-up words, of which a tokenizer of 2038 tokens can be made
    words = ["".join(word) for word in np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (600, 7))]
    for start in range(0, len(words), 15):
        conversations.append({"conversations": turns("Say some words.", " ".join(words[start : start + 15]))})
    for part, start in enumerate(range(0, num, 8)):
        pq.write_table(pa.Table.from_pylist(rows[start : start + 8]), folder / f"{split}-0000{part}-of-0000{-(-num // 8)}.parquet")
    (folder / f"t2i-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captions))
    lines = "".join(json.dumps(row) + "\n" for row in conversations)
    (folder / f"understanding-{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def drawing(colour: str, shape: str) -> bytes:
    """A PNG file of 40 pixels."""
    image = Image.new("RGB", (40, 40), "white")
    draw = ImageDraw.Draw(image)
    {"circle": draw.ellipse, "square": draw.rectangle, "line": draw.line}[shape]((8, 8, 32, 32), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
