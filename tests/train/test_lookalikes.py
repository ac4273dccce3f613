import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimamba.config import Task
from omnimamba.data.augment import Augmentation, normalise, unit_range
from omnimamba.train import loop
from omnimamba.train.config import LookalikeTraining, Recipe
from omnimamba.train.lookalikes import Lookalikes, _blend
from omnimamba.train.omnimamba import OmniMambaObjective
from omnimamba.train.run import make_objective
from omnimamba.train.task_data import NUM_MARKERS

CPU = torch.device("cpu")
VERSIONS = 5


@pytest.fixture
def taught(recipe, tmp_path) -> Recipe:
    """Understanding by what a tower takes images for, the tower from one step of training."""
    tower = dataclasses.replace(recipe("tower", steps=1), out=str(tmp_path / "tower"))
    folder = loop.run(make_objective(tower, CPU), tower, CPU)
    r = recipe("stage2", mmu_batch=5)
    return dataclasses.replace(
        r,
        init=dataclasses.replace(r.init, vision=str(folder / "vision.safetensors")),
        data=dataclasses.replace(r.data, in_memory=True),
        lookalikes=LookalikeTraining(VERSIONS, labels={"name": "caption"}),
    )


def made(recipe: Recipe) -> OmniMambaObjective:
    objective = make_objective(recipe, CPU)
    assert isinstance(objective, OmniMambaObjective)
    return objective


def test_a_question_comes_with_an_image_that_was_taken_for_its_own():
    position = {"apple": 0, "pear": 1, "fig": 2}
    drawn = np.array([0, 0, 1, 0, 1, 1])  # in two versions; the pear was taken for an apple once, the fig for a pear twice
    found = Lookalikes(torch.arange(6.0).view(6, 1, 1), position, {"name": "caption"}, {"caption": [0, 1, 2]}, {"caption": drawn})
    rng = np.random.default_rng(0)
    assert {found.draw("apple", "name", rng) for _ in range(100)} == {0, 1, 3}
    assert {found.draw("pear", "name", rng) for _ in range(100)} == {2, 4, 5}
    assert {found.draw("fig", "name", rng) for _ in range(100)} == {2, 5}  # nothing was taken for a fig: its own versions
    assert {found.draw("pear", "style", rng) for _ in range(100)} == {1, 4}  # a kind without a column


@pytest.mark.parametrize("all_are_plain", [False, True])
def test_features_are_the_towers_and_texts_follow_its_probabilities(taught, all_are_plain):
    first, again = (made(taught).mmu for _ in range(2))
    found = first.lookalikes
    assert len(found.features) == VERSIONS * len(first.images) and torch.equal(found.features, again.lookalikes.features)
    rows = np.concatenate(found.rows["caption"])
    assert sorted(rows) == list(range(len(found.features)))  # each was taken for one text
    if all_are_plain:
        plain = dataclasses.replace(taught, lookalikes=dataclasses.replace(taught.lookalikes, plain=1.0))
    else:
        plain = dataclasses.replace(taught, augment=Augmentation(), lookalikes=dataclasses.replace(taught.lookalikes, blend=0.0))
    objective = made(plain)
    own = objective.features(objective.batch(0)[Task.MMU], None)
    names = list(objective.mmu.images.names)
    images = unit_range(objective.mmu.images.get(range(len(names))))
    with torch.autocast("cpu", torch.bfloat16):
        expected = objective.vision({name: normalise(images, tower.mean, tower.std) for name, tower in objective.config.towers.items()})
    versions = objective.mmu.lookalikes.features.view(VERSIONS, len(names), *expected.shape[1:])
    assert all(torch.equal(version, expected.bfloat16()) for version in versions)  # nothing is changed or blended
    assert own.dtype == torch.float32 and all((row == versions.float()).flatten(2).all(2).any() for row in own)


def test_training_uses_them_and_validation_does_not(taught):
    objective = made(taught)
    batch = objective.batch(0)[Task.MMU]
    assert batch.pixels is None or batch.pixels.dtype == torch.bfloat16
    same = made(taught).batch(0)[Task.MMU]
    assert torch.equal(batch.ids, same.ids) and (batch.pixels is None or torch.equal(batch.pixels, same.pixels))
    assert objective.val_mmu.lookalikes is None and np.isfinite(objective.validate()["mmu"])
    loop.run(objective, taught, CPU)


def test_soft_labels_are_what_the_tower_gives_other_texts(taught):
    soft = dataclasses.replace(taught, lookalikes=dataclasses.replace(taught.lookalikes, soft=True))
    hard_batch, objective = made(taught).batch(0)[Task.MMU], made(soft)
    batch, data = objective.batch(0)[Task.MMU], objective.mmu
    assert torch.equal(batch.ids, hard_batch.ids) and torch.equal(batch.places, hard_batch.places)
    labels, is_label = hard_batch.labels, hard_batch.shares > 0
    torch.testing.assert_close(batch.labels[is_label].sum(1), torch.ones(int(is_label.sum())))
    idx = objective.mmu_sampler.indices(0)
    rows = batch.places // (batch.ids.shape[1] - NUM_MARKERS)
    kinds = [data.samples[i].kind for i in idx]
    is_name = torch.tensor([kinds[row] == "name" for row in rows.tolist()]) & is_label
    certain = torch.nn.functional.one_hot(labels, objective.config.text_vocab_size).float()
    assert is_name.any() and not torch.equal(batch.labels[is_name], certain[is_name])
    assert torch.equal(batch.labels[is_label & ~is_name], certain[is_label & ~is_name])
    assert (batch.labels[is_name] * certain[is_name]).sum(1).min() > 0  # what is said may be said
    loop.run(objective, soft, CPU)


def test_blends_weigh_at_least_so_much(taught):
    settings = dataclasses.replace(taught.lookalikes, blend=1.0, least_weight=0.5)
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)] * 8)
    blended = _blend(images, settings, torch.Generator().manual_seed(0)).flatten(1)
    assert set(blended.unique().tolist()) == {0.0, 0.5, 1.0}  # like with like, and halves


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": 2}, "belong together"),
        ({"labels": {"name": "caption"}}, "belong together"),
        ({"versions": -1, "labels": {"name": "caption"}}, "lookalikes.versions=-1"),
        ({"versions": 2, "labels": {"name": "caption"}, "blend": 1.5}, "lookalikes.blend=1.5"),
        ({"versions": 2, "labels": {"name": "caption"}, "least_weight": 0.6}, "lookalikes.least_weight=0.6"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        LookalikeTraining(**changes)


def test_needs_images_in_memory(taught):
    with pytest.raises(ValueError, match="data.in_memory=true"):
        dataclasses.replace(taught, data=dataclasses.replace(taught.data, in_memory=False))


def test_a_tower_without_heads_is_one_line(taught, encoders):
    lone = dataclasses.replace(taught.init, vision=str(Path(encoders) / "vision.safetensors"))
    with pytest.raises(ValueError, match="judge"):
        made(dataclasses.replace(taught, init=lone))
