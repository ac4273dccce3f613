"""The released shape: names and sizes of the published checkpoint, there and back bitwise, within twice its size in memory."""

import json
import math
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping

import pytest
import torch

from omnimamba.config import preset
from omnimamba.model import weights
from omnimamba.model.convert import convert
from omnimamba.model.files import TensorFile

PUBLISHED = preset("1.3b")
FILE = "full_size_keys.json"


@pytest.fixture(scope="module")
def published_shapes(golden):
    if not (golden / FILE).is_file():
        pytest.skip(f"{golden} has no {FILE}")
    return json.loads((golden / FILE).read_text())


def shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def test_names_and_shapes_are_those_of_the_published_checkpoint(published_shapes):
    outlines = {component: weights.outline(component, PUBLISHED).state_dict() for component in weights.COMPONENTS}
    official = weights.to_official(outlines)
    assert shapes({name: t for name, t in official.items() if not name.startswith("vision_backbone.")}) == published_shapes["shapes"]
    assert [[copy, original] for copy, original in weights.TIED.items()] == published_shapes["tied"]
    numbers = {part: sum(tensor.numel() for tensor in outlines[part].values()) for part in outlines}
    assert numbers["model"] + numbers["vq"] == published_shapes["parameters_without_vision_towers"]
    back = weights.from_official(official)
    assert {part: shapes(back[part]) for part in back} == {part: shapes(outlines[part]) for part in outlines}


MEMORY = """
import sys, torch
from omnimamba.model import weights

def peak():  # not getrusage, which a child inherits from its parent
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))

before = peak()
bundle = weights.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
size = sum(tensor.nbytes for part in (bundle.model, bundle.vision, bundle.vq) if part for tensor in part.state_dict().values())
print(size, peak() - before)
"""


def memory_to_load(source, dtype):
    """(bytes of the model, growth of the peak memory of a process that loads it)."""
    result = subprocess.run([sys.executable, "-c", MEMORY, str(source), dtype], check=True, capture_output=True, text=True)
    return tuple(map(int, result.stdout.split()))


class RandomCheckpoint(Mapping):
    """A checkpoint of these shapes in fp16, drawn from one pool of random values where a tensor is asked for."""

    def __init__(self, shapes):
        self.shapes = shapes
        self.pool = torch.randint(0, 0x7C00, (2**24 + 43,), dtype=torch.int16).view(torch.float16)  # all finite values

    def __getitem__(self, name):
        shape = self.shapes[name]
        start, num = zlib.crc32(weights.TIED.get(name, name).encode()) % 2**20, math.prod(shape)
        values = self.pool[start:]
        return torch.cat([values] * (num // len(values)) + [values[: num % len(values)]]).reshape(shape)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory")
def test_full_size_there_and_back(published_shapes, tmp_path):
    """Language model and VQ tokenizer in fp16, as released: official to folder to official, and loaded from both.

    The towers stay out: they have timm's names in both, and 1.5 GB more to write.
    """
    released = RandomCheckpoint(published_shapes["shapes"])
    folder = tmp_path / "model"
    weights.write(weights.Stored("random", PUBLISHED, weights.from_official(released), None), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "vq.safetensors"]
    done = convert(folder, tmp_path / "official.pth", to="official")
    assert done.config == PUBLISHED and done.missing == ("vision", "tokenizer.json")

    official = TensorFile(done.path)
    assert official.keys() == released.keys()
    for name in official:
        if name != "llm_backbone.vqvae.quantize.codebook_used":
            assert torch.equal(official[name].view(torch.int16), released[name].view(torch.int16)), name
    assert weights.open_official(done.path).config == PUBLISHED
    del official, released

    for source, dtype in ((done.path, "bfloat16"), (folder, "bfloat16"), (folder, "float16")):
        size, growth = memory_to_load(source, dtype)
        print(f"{source.name} as {dtype}: {size / 1e9:.2f} GB, peak memory + {growth / 1e9:.2f} GB")
        assert growth < 1.5 * size
    shutil.rmtree(tmp_path)
