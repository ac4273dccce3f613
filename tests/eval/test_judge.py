"""The retrieval judge: what it needs, and what it makes of pictures and captions."""

import shutil

import numpy as np
import pytest
import torch

from omnimamba.data.augment import normalise
from omnimamba.eval.judge import FILES, Judge


def test_similarities_are_those_of_tower_training(judge_folder, omni, noise):
    """The composition of train/tower.py: features of normalised pixels, heads, raw captions by the tokenizer, one at a time."""
    judge = Judge.load(judge_folder)
    images, captions = [noise(i) for i in range(40)], ["red apple", "keycap: #", "hand: dark skin tone"]
    found = judge.similarities(images, captions)
    assert found.shape == (40, 3)
    (name, tower), *_ = omni.config.towers.items()
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]) / 255
    with torch.no_grad():
        image = judge.heads.embed_features(omni.vision({name: normalise(pixels, tower.mean, tower.std)}))
        ids = [omni.tokenizer.encode(caption) for caption in captions]
        text = torch.cat([judge.heads.text(torch.tensor([row]), torch.tensor([len(row)])) for row in ids])
    torch.testing.assert_close(found, image @ text.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(judge_folder, tmp_path, name):
    for file in FILES:
        if file != name:
            shutil.copy(judge_folder / file, tmp_path)
    with pytest.raises(ValueError, match=f"no {name}.*num_prompts=0"):
        Judge.load(tmp_path)


def test_other_weights_are_refused(judge_folder, tmp_path):
    for file in FILES:
        shutil.copy(judge_folder / file, tmp_path)
    shutil.copy(judge_folder / "vision.safetensors", tmp_path / "judge.safetensors")
    with pytest.raises(ValueError, match="not contrastive heads"):
        Judge.load(tmp_path)
    shutil.copy(judge_folder / "judge.safetensors", tmp_path)
    shutil.copy(judge_folder / "judge.safetensors", tmp_path / "vision.safetensors")
    with pytest.raises(ValueError, match=r"vision\.safetensors: tensors do not fit"):
        Judge.load(tmp_path)


def test_a_caption_that_it_cannot_read(judge_folder, noise):
    judge = Judge.load(judge_folder)
    for caption in ("", "zoo " * 65):
        with pytest.raises(ValueError, match="the judge reads 1 to 64"):
            judge.similarities([noise(0)], [caption])
