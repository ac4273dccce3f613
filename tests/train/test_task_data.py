"""What runs of one process share of their data gives the same batches, and is made anew where it would differ."""

import dataclasses
import io
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from omnimamba.config import Task
from omnimamba.data.kept import Kept
from omnimamba.train import task_data
from omnimamba.train.run import make_objective

CPU = torch.device("cpu")


@pytest.fixture
def stage2(recipe, change):
    return change(recipe("stage2"), "data", in_memory=True, joined=0.5)


def assert_same_batches(one, other):
    for step in range(3):
        batches = [objective.batch(step) for objective in (one, other)]
        for task in Task:
            for tensors in zip(*(batch[task] for batch in batches), strict=True):
                torch.testing.assert_close(*tensors, rtol=0, atol=0)


def test_a_second_run_makes_nothing_again(stage2, monkeypatch):
    kept = Kept()
    first, plain = make_objective(stage2, CPU, kept=kept), make_objective(stage2, CPU)
    for name in ("image_ids", "InMemoryImages", "read_task_captions", "read_task_conversations"):
        monkeypatch.delattr(task_data, name)
    monkeypatch.setattr(task_data.layout, "conversation_sample", None)
    again = make_objective(dataclasses.replace(stage2, data=dataclasses.replace(stage2.data, joined=0)), CPU, kept=kept)
    assert again.mmu.images is first.mmu.images and len(again.mmu.samples) < len(first.mmu.samples)
    monkeypatch.undo()
    again = make_objective(stage2, CPU, kept=kept)
    assert again.mmu.samples == plain.mmu.samples
    assert_same_batches(first, plain)
    assert_same_batches(again, plain)


def test_what_would_differ_is_made_anew(stage2, change, tmp_path):
    kept = Kept()
    first = make_objective(stage2, CPU, kept=kept)
    tensors = load_file(stage2.init.vq)
    save_file({name: tensor.flip(0) for name, tensor in tensors.items()}, tmp_path / "vq.safetensors")
    changes = {
        "VQ weights": change(stage2, "init", vq=str(tmp_path / "vq.safetensors")),
        "seed": change(stage2, "train", seed=1),
        "limit": change(stage2, "train", max_text_tokens=20),
        "alignment": change(stage2, "data", alignment=True, joined=0),
        "repeat": change(stage2, "data", repeat={"name": 2}),
        "split": change(stage2, "data", train_split="val"),
    }
    for name, changed in changes.items():
        objective, plain = make_objective(changed, CPU, kept=kept), make_objective(changed, CPU)
        assert objective.mmu.samples == plain.mmu.samples and torch.equal(objective.t2i.image_ids, plain.t2i.image_ids), name
        assert_same_batches(objective, plain)
    ids = make_objective(changes["VQ weights"], CPU, kept=kept).t2i.image_ids
    assert not torch.equal(ids, first.t2i.image_ids)


def test_versions_are_told_apart(recipe, change):
    r = change(change(recipe("stage1_t2i"), "data", versions=2), "augment_painting", shift=0.3)
    kept = Kept()
    runs = [r, change(r, "train", seed=1), change(r, "augment_painting", shift=0.1), r]
    ids = [make_objective(run, CPU, kept=kept).t2i.image_ids for run in runs]
    assert torch.equal(ids[0], ids[3]) and all(torch.equal(ids[0][:, 0], other[:, 0]) for other in ids)
    assert not any(torch.equal(ids[0], other) for other in ids[1:3])
    assert torch.equal(ids[1], make_objective(runs[1], CPU).t2i.image_ids)


@pytest.mark.parametrize("size", [32, 40])
def test_both_tasks_share_images_that_are_not_resized(size, recipe, change, tmp_path):
    """The tiny model's encoders see 32 pixels, the tower all of an image and the VQ tokenizer its central square."""
    for name, colour in (("a", "red"), ("b", "blue")):
        content = io.BytesIO()
        Image.new("RGB", (size, 32), colour).save(content, "png")
        (tmp_path / f"{name}.png").write_bytes(content.getvalue())
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"image": f"{name}.png", "conversations": talk} for name in "ab"]))
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps({"image": f"{name}.png", "captions": ["red"]}) + "\n" for name in "ab"))
    files = {"folder": str(tmp_path), "images": "folder", "conversations": "talk.json", "captions": "captions.jsonl", "val_split": ""}
    kept = Kept()
    make_objective(change(recipe("stage2"), "data", in_memory=True, **files), CPU, kept=kept)
    assert len([key for key in kept.values if key[0] == "images"]) == (1 if size == 32 else 2)


def test_a_set_with_broken_images_is_opened_by_each_run(recipe, change, tmp_path):
    """So that each reports them, and none has more than it may."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "talk.json").write_text(json.dumps([{"image": f"{name}.png", "conversations": talk} for name in "ab"]))
    files = {"folder": str(tmp_path), "images": "folder", "conversations": "talk.json", "val_split": "", "in_memory": True}
    r, kept = change(recipe("stage1_mmu"), "data", max_broken=1, **files), Kept()
    assert len(make_objective(r, CPU, kept=kept).mmu.samples) == 1
    with pytest.raises(ValueError, match="image 'b.png'"):
        make_objective(change(r, "data", max_broken=0), CPU, kept=kept)
