"""Contrastive training of the understanding tower."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from omnimamba.config import OmniMambaConfig, preset
from omnimamba.eval.judge import Judge
from omnimamba.train import loop, tower
from omnimamba.train.run import make_objective

CPU = torch.device("cpu")


def test_four_steps(recipe, log_lines, tokenizer_file):
    r = recipe("tower", val_every=4, sample_every=4)
    objective = make_objective(r, CPU)
    before = {name: tensor.clone() for name, tensor in objective.tower.state_dict().items()}
    folder = loop.run(objective, r, CPU)
    unchanged = {name for name, tensor in objective.tower.state_dict().items() if torch.equal(tensor, before[name])}
    # the features come from the second-to-last block; what stands behind it has no part in them
    assert all("blocks.2." in name or ".vit.norm." in name or name.endswith("cls_token") for name in unchanged), unchanged
    assert len(log_lines(r.out)) == 4 and {"caption", "style"} <= log_lines(r.out)[0].keys()
    (line,) = log_lines(r.out, "val")
    assert 0 <= line["caption_accuracy"] <= 1 and 0 <= line["style_accuracy"] <= 1

    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "vision.safetensors", "judge.safetensors"}
    assert OmniMambaConfig.from_dict(json.loads((folder / "config.json").read_text())) == preset("tiny")
    assert (folder / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    scores = Judge.load(folder).similarities([Image.new("RGB", (50, 40), "red")], ["red circle", "blue line"])
    assert scores.shape == (1, 2) and scores.abs().max() <= 1


def test_it_learns(recipe, log_lines, change):
    r = change(
        recipe("tower", steps=60, lr=3e-3, batch=12, val_every=60),
        "tower",
        mixup=0.0,
        plain_share=1.0,
        collage_share=0.0,
        collage_labels=(),
    )
    loop.run(make_objective(r, CPU), r, CPU)
    assert log_lines(r.out, "val")[0]["caption_accuracy"] == 1  # the drawings of val are those of train


def test_start_from_a_finished_tower(recipe, change, tmp_path):
    first = recipe("tower")
    folder = loop.run(make_objective(first, CPU), first, CPU)
    tower = make_objective(change(first, "init", model=str(folder)), CPU).tower
    for module, file in ((tower.vision, "vision"), (tower.heads, "judge")):
        tensors = load_file(folder / f"{file}.safetensors")
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())


def test_an_average_with_the_tower_it_started_from(recipe, change, tmp_path):
    first = recipe("tower")
    start = loop.run(make_objective(first, CPU), first, CPU)
    again = change(dataclasses.replace(recipe("tower"), out=str(tmp_path / "again")), "init", model=str(start))
    found = {}
    for share in (0.0, 0.25, 1.0):
        r = change(dataclasses.replace(again, out=str(tmp_path / str(share))), "train", keep_start=share)
        folder = loop.run(make_objective(r, CPU), r, CPU)
        found[share] = load_file(folder / "vision.safetensors") | load_file(folder / "judge.safetensors")
    learned = [name for name, tensor in found[0.0].items() if not torch.equal(tensor, found[1.0][name])]
    assert len(learned) > 10
    started = load_file(start / "vision.safetensors") | load_file(start / "judge.safetensors")
    for name, tensor in found[0.25].items():
        torch.testing.assert_close(found[1.0][name], started[name])
        torch.testing.assert_close(tensor, 0.25 * started[name] + 0.75 * found[0.0][name])


def test_statistics_of_an_average_are_those_of_its_own_weights(recipe, change):
    """Not averages of statistics: they come from the training images."""
    first = recipe("tower")
    folder = loop.run(make_objective(first, CPU), first, CPU)
    objective = make_objective(change(change(first, "init", model=str(folder)), "train", keep_start=0.5), CPU)
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(7.0)
    seen = []

    class WithNorm(type(objective.tower)):
        def embed(self, images):
            seen.append(images.mean((2, 3)))
            self.norm(seen[-1])
            return super().embed(images)

    objective.tower.norm = norm
    objective.start["norm.weight"], objective.start["norm.bias"] = norm.weight.detach().clone(), norm.bias.detach().clone()
    objective.start |= {f"norm.{name}": tensor.clone() for name, tensor in norm.named_buffers()}
    objective.tower.__class__ = WithNorm
    averaged = objective.averaged()
    means = torch.stack([colours.mean(0) for colours in seen]).mean(0)
    torch.testing.assert_close(averaged.norm.running_mean, means)
    assert averaged.norm.momentum == 0.1 and (norm.running_mean == 7.0).all()


@pytest.mark.parametrize("shares", [(0.0, 0.0, ()), (1.0, 0.0, ()), (0.0, 1.0, ("style",)), (0.5, 0.5, ("style",))])
def test_shares_of_a_batch(recipe, change, log_lines, shares):
    plain, collages, labels = shares
    r = change(recipe("tower", steps=2), "tower", plain_share=plain, collage_share=collages, collage_labels=labels)
    r = change(r, "augment_plain", shift=0.1)
    if collages + plain == 1:
        r = change(r, "tower", labels={"style": 1.0} if collages == 1 else {"caption": 1.0} | dict.fromkeys(labels, 1.0))
    loop.run(make_objective(r, CPU), r, CPU)
    assert len(log_lines(r.out)) == 2


def test_only_collages_are_turned(recipe, change, monkeypatch):
    turned = []
    monkeypatch.setattr(tower, "turn", lambda images, generator: turned.append(len(images)) or images)
    r = change(recipe("tower"), "tower", plain_share=0.5, collage_share=1 / 3)
    objective = make_objective(r, CPU)
    objective.loss("tower", objective.batch(0), 0, torch.Generator().manual_seed(0))
    assert turned == [2]  # of a batch of 6


def test_more_than_one_tower(recipe):
    with pytest.raises(ValueError, match="preset 1.3b has 2 towers; only a single one can be trained"):
        make_objective(dataclasses.replace(recipe("tower"), preset="1.3b"), CPU)
