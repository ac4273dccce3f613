"""The stages of the language model: what trains, what stays, what comes out, and where a run may start."""

import dataclasses
import io
import json
import logging
import re
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from omnimamba.config import Task, preset
from omnimamba.data.prepare import ImageSet, tokenize_images
from omnimamba.data.text import Conversation
from omnimamba.engine.omnimamba import GenerationDefaults, OmniMamba
from omnimamba.model import hub
from omnimamba.model.omnimamba import OmniMambaModel
from omnimamba.processor.image import load_image
from omnimamba.train import loop
from omnimamba.train.omnimamba import OmniMambaObjective, load_backbone
from omnimamba.train.run import make_objective
from omnimamba.train.stages import BACKBONE_GROUPS, LORA_STAGES, STAGES, group_of
from omnimamba.train.task_data import joined, padded_length

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)  # for batches without anything random


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def answers(batch):
    """Per row of an understanding batch, the ids of what is learned."""
    rows = batch.places // (batch.ids.shape[1] - 4)
    return [batch.labels[(rows == row) & (batch.shares > 0)].tolist() for row in range(len(batch.ids))]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(recipe):
    objective = make_objective(recipe, CPU)
    before = state_of(objective.model)
    return objective, before, loop.run(objective, recipe, CPU)


@pytest.mark.parametrize("train_backbone", [False, True])
@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in LORA_STAGES])
def test_what_trains_and_what_comes_out(recipe, log_lines, encoders, stage, train_backbone):
    r = recipe(stage, train_backbone=train_backbone, val_every=4, sample_every=4)
    _, before, folder = run(r)
    lines, tasks = log_lines(r.out), STAGES[stage].tasks
    assert len(lines) == 4 and all(set(tasks) <= line.keys() for line in lines)
    figures = {name for name in log_lines(r.out, "val")[0] if name not in ("step", "kind", "time")}
    assert {name for name in figures if not name.startswith("mmu_exact")} == set(tasks)
    assert ("mmu_exact" in figures) == ("mmu" in tasks)

    after = load_file(folder / "model.safetensors")
    trains = {*STAGES[stage].trains, *(BACKBONE_GROUPS if train_backbone else ())}
    for name, tensor in after.items():
        if group_of(name) in trains:
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name
    for part in ("vision", "vq"):
        frozen, saved = load_file(encoders / f"{part}.safetensors"), load_file(folder / f"{part}.safetensors")
        assert all(torch.equal(tensor, frozen[name]) for name, tensor in saved.items()) and saved.keys() == frozen.keys()

    samples = {path.name for path in (folder.parent / "samples" / "step-00000004").iterdir()}
    assert samples == {file for task, file in (("mmu", "described.txt"), ("t2i", "painted.png")) if task in tasks}
    if "t2i" in tasks:
        assert load_image(folder.parent / "samples/step-00000004/painted.png").size == (2 * 32 + 4, 2 * 32 + 4)
    if "mmu" in tasks:
        described = (folder.parent / "samples/step-00000004/described.txt").read_text().splitlines()
        assert described[0].startswith("val-0\t")

    omni = OmniMamba.from_pretrained(folder, device="cpu")
    assert omni.defaults == GenerationDefaults(guidance_scale=2.0)
    assert omni.generate_image("red circle", seed=0)[0].size == (32, 32)
    assert isinstance(omni.describe(Image.new("RGB", (40, 30), "red"), max_new_tokens=4), str)


def test_an_average_with_the_model_it_started_from(recipe, change, tmp_path):
    _, _, start = run(recipe("stage2"))
    started, found = load_file(start / "model.safetensors"), {}
    for share in (0.0, 0.25, 1.0):
        r = change(dataclasses.replace(recipe("stage2"), out=str(tmp_path / str(share))), "init", model=str(start))
        r = change(r, "train", keep_start=share)
        found[share] = load_file(run(r)[2] / "model.safetensors")
    assert not torch.equal(found[0.0]["text_embedding.weight"], started["text_embedding.weight"])
    for name, tensor in found[0.25].items():
        torch.testing.assert_close(found[1.0][name], started[name])
        torch.testing.assert_close(tensor, 0.25 * started[name] + 0.75 * found[0.0][name])


def test_bfloat16(recipe, log_lines):
    r = recipe("stage2", precision="bf16", val_every=4, sample_every=4)
    objective, _, _ = run(r)
    assert all(parameter.dtype == torch.float32 for parameter in objective.model.parameters())
    exact = dataclasses.replace(r, train=dataclasses.replace(r.train, precision="fp32"), out=r.out + "-fp32")
    run(exact)
    assert log_lines(r.out)[-1]["loss"] == pytest.approx(log_lines(exact.out)[-1]["loss"], rel=0.02)


def test_it_learns_by_heart(recipe, change, log_lines):
    """The captions' images; guessing gives log(64) = 4.2 per token."""
    r = recipe("stage1_t2i", steps=60, lr=5e-3, t2i_batch=12, train_backbone=True, caption_dropout=0.0)
    run(r)
    assert log_lines(r.out)[-1]["t2i"] < 0.6 * log_lines(r.out)[0]["t2i"]


# ---- batches


def test_understanding_batch(recipe):
    """Markers, text and labels in the layout of the prompts; pixels of the rows that have an image."""
    objective = make_objective(recipe("stage1_mmu", mmu_batch=4), CPU)
    data, tok = objective.mmu, objective.mmu.tok
    with_image = next(i for i, sample in enumerate(data.samples) if sample.image == "train-3")
    text_only = next(i for i, sample in enumerate(data.samples) if sample.image is None)
    batch = data.batch([text_only, with_image, with_image], RNG)
    assert batch.ids.shape[1] % 16 == 0
    assert batch.ids[:, :4].tolist() == [[tok.mmu_id, tok.soi_id, tok.eoi_id, tok.sot_id]] * 3
    assert batch.image_rows.tolist() == [1, 2] and torch.equal(batch.pixels[0], batch.pixels[1])
    position = data.images.position["train-3"]
    assert torch.equal(batch.pixels[0], data.images.get([position])[0])
    text = tok.decode(batch.ids[1, 4:])
    assert text.startswith("In: What is this?\nOut: black circle")
    learned = answers(batch)
    assert tok.decode(learned[1]) == "black circle" and learned[1][-1] == tok.eos_id and learned[1] == learned[2]
    assert len(learned[0]) > 10 and batch.ids[:, 4:].flatten()[batch.places[:9]].tolist() == learned[0][:9]
    assert batch.num_labels == sum(map(len, learned))
    assert data.batch([text_only, text_only], RNG).pixels is None
    losses = objective.loss("model", {Task.MMU: data.batch([text_only], RNG)}, 0, torch.Generator())
    assert losses["loss"].isfinite()


@pytest.mark.parametrize("by_sample", [False, True])
def test_mean_by_sample(recipe, by_sample):
    """By sample, a long answer counts as much as a short one."""
    objective = make_objective(recipe("stage1_mmu", mean_by_sample=by_sample), CPU)
    objective.model.eval()
    data = objective.mmu
    short, long = (f(range(len(data.samples)), key=lambda i: len(data.samples[i].labels)) for f in (min, max))

    def mean_loss(idx):
        batch = data.batch(idx, RNG)
        return (objective.losses({Task.MMU: objective.mmu_inputs(batch, None)})[Task.MMU] / batch.num_labels).item()

    mean_of_samples = (mean_loss([short]) + mean_loss([long])) / 2
    assert (mean_loss([short, long]) == pytest.approx(mean_of_samples, rel=1e-5)) == by_sample


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("by_sample", [False, True])
def test_padding_changes_nothing(recipe, by_sample, parts):
    """Loss and gradients of a batch are those of its rows by themselves, without any padding; rows without an image among them."""
    objective = make_objective(recipe("stage1_mmu", mean_by_sample=by_sample, accumulate=parts, mmu_batch=6), CPU)
    model, data = objective.model.eval(), objective.mmu
    text_only = [i for i, sample in enumerate(data.samples) if sample.image is None]
    with_image = [i for i, sample in enumerate(data.samples) if sample.image is not None]
    idx = [with_image[0], text_only[0], with_image[1], with_image[2], text_only[1], with_image[5]]
    batch = data.batch(idx, RNG)
    assert len(batch.pixels) == 4 and batch.image_rows.tolist() == [0, 2, 3, 5]
    more_idx = [*idx[:4], with_image[4], idx[5]]
    more = data.batch(more_idx, RNG)
    assert len(more.pixels) == 6 and more.image_rows.tolist() == [0, 2, 3, 4, 5, 6]  # parts of 2
    assert len(batch.places) < batch.ids[:, 4:].numel() and (batch.shares == 0).any()

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for padded, rows in ((batch, idx), (more, more_idx)):
        losses = [objective.losses({Task.MMU: objective.mmu_inputs(part, None)})[Task.MMU] for part in padded.split(parts)]
        found = sum(losses) / padded.num_labels
        expected, num_labels = [], []
        for sample in (data.samples[i] for i in rows):
            ids, labels = torch.cat([padded.ids[0, :4], torch.tensor(sample.ids)])[None], torch.tensor(sample.labels)[None]
            pixels = None if sample.image is None else data.images.get([data.images.position[sample.image]])
            features = None if pixels is None else objective.features(padded._replace(pixels=pixels), None)
            num_labels.append((labels >= 0).sum())
            expected.append(model.mmu_loss(ids, labels, features) * (1 if by_sample else num_labels[-1]))
        wanted = sum(expected) / (len(rows) if by_sample else sum(num_labels))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(gradients(found), gradients(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("options", "keeps"), [({}, False), ({"accumulate": 2}, True), ({"accumulate": 2, "parallel": "fsdp"}, False)])
def test_weights_are_ready_for_the_parts_of_one_step(recipe, options, keeps):
    objective = make_objective(recipe("stage2", **{"mmu_batch": 4, "t2i_batch": 4} | options), CPU)
    ready = objective.losses.options["saving"].ready
    assert (ready is not None) == keeps and ready is objective.ready
    if ready is not None:
        ready.get(objective.model.backbone.layers[0].mixer.block_weights(torch.ones(1), None), lambda: "ready")
        assert ready.found
        objective.updated()
        assert not ready.found


def test_few_lengths():
    lengths = [padded_length(length, 453) for length in range(5, 454)]
    assert all(padded >= length for length, padded in enumerate(lengths, 5))
    assert sorted(set(lengths)) == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 453]
    assert padded_length(204, 204) == 204  # never past the longest, for which the positions may just suffice


def test_alignment_learns_the_answer_alone(recipe, change):
    data = make_objective(change(recipe("stage1_mmu"), "data", alignment=True), CPU).mmu
    ids, labels, image, _ = data.samples[0]
    assert image == "train-0" and ids == labels and data.tok.decode(ids) == "red circle"


def test_conversations_that_do_not_fit_are_counted(recipe, caplog):
    with caplog.at_level(logging.WARNING):
        data = make_objective(recipe("stage1_mmu", max_text_tokens=20), CPU).mmu
    num = 2 * 12 + 40
    assert f"{num - len(data.samples)} of {num} conversations left out: no answer within train.max_text_tokens=20" in caplog.text
    assert 12 <= len(data.samples) < num
    with pytest.raises(ValueError, match="no sample has an answer within train.max_text_tokens=3; raise it"):
        make_objective(recipe("stage1_mmu", max_text_tokens=3), CPU)
    with pytest.raises(ValueError, match="train.max_text_tokens=1000 exceeds the 236 positions left after the image; lower it"):
        make_objective(recipe("stage1_mmu", max_text_tokens=1000), CPU)


def test_repeated_kinds(recipe, change):
    plain, repeated = (make_objective(change(recipe("stage1_mmu"), "data", repeat=repeat), CPU) for repeat in ({}, {"name": 3}))
    once, more = plain.mmu.samples, repeated.mmu.samples
    assert len({sample.kind for sample in once}) == 2
    for sample in once:
        assert more.count(sample) == once.count(sample) * (3 if sample.kind == "name" else 1)
    assert repeated.val_mmu.samples == plain.val_mmu.samples


def test_joined_conversations():
    rows = [Conversation(image, (("human", f"q{i}"), ("gpt", f"a{i}"))) for i, image in enumerate(["a", "b", "a", None, "a"])]
    more = joined(rows, 1.0, 0)
    assert [row.image for row in more] == ["a", "b"] and sorted(more[0].turns[1::2]) == [("gpt", "a0"), ("gpt", "a2"), ("gpt", "a4")]
    assert all(answer[1] == question[1].replace("q", "a") for question, answer in zip(more[0].turns[::2], more[0].turns[1::2], strict=True))
    assert joined(rows, 1.0, 0) == more and joined(rows, 0.0, 0) == []
    many = [Conversation(str(i), (("human", "q"), ("gpt", "a"))) for i in range(200)]
    assert 30 < len(joined(many, 0.3, 0)) < 90


def test_painting_batch(recipe, data_folder, tmp_path, change):
    r = recipe("stage1_t2i")
    objective = make_objective(r, CPU)
    data, tok = objective.t2i, objective.t2i.tok
    rng = np.random.default_rng(0)
    batch = data.batch([3] * 200, rng, 0.3)
    texts = [tok.decode(row[row != tok.pad_id]) for row in batch.caption_ids]
    assert set(texts) == {"", "black circle", "a black circle, drawn"} and 40 < texts.count("") < 80
    assert batch.caption_ids[0, -1] == tok.eoi_id and batch.image_ids.dtype == torch.int64 and (batch.image_ids == batch.image_ids[0]).all()
    assert "" not in [tok.decode(row) for row in data.batch([0, 1], rng, 0.0).caption_ids]

    # ids made beforehand are the same
    for split in ("train", "val"):
        tokenize_images(ImageSet(str(data_folder), split=split), tmp_path / f"{split}.parquet", make_vq=lambda: objective.vq)
    other = make_objective(change(change(r, "data", tokens=str(tmp_path / "{split}.parquet")), "init", vq=""), CPU)
    assert torch.equal(other.t2i.image_ids, data.image_ids) and other.vq is None
    (tmp_path / "train.parquet").unlink()
    tokenize_images(ImageSet(str(data_folder), split="val"), tmp_path / "train.parquet", make_vq=lambda: objective.vq)
    with pytest.raises(ValueError, match="12 captioned images have no VQ ids; tokenize them, e.g. train-0"):
        make_objective(change(r, "data", tokens=str(tmp_path / "{split}.parquet")), CPU)


def test_versions_of_painted_images(recipe, change):
    r = change(change(recipe("stage1_t2i"), "data", versions=3), "augment_painting", scale=0.3, rotate=20)
    objective = make_objective(r, CPU)
    ids = objective.t2i.image_ids
    assert ids.shape == (12, 3, 64) and torch.equal(make_objective(r, CPU).t2i.image_ids, ids)
    assert torch.equal(ids[:, :1], make_objective(recipe("stage1_t2i"), CPU).t2i.image_ids)
    assert all((ids[:, i] != ids[:, j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    drawn = objective.t2i.batch([5] * 50, np.random.default_rng(0), 0.0).image_ids
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in ids[5].tolist()}
    assert objective.val_t2i.image_ids.shape[1] == 1


def test_noise_is_read_and_not_learned(recipe):
    objective = make_objective(recipe("stage1_t2i", image_token_noise=0.25, t2i_batch=12), CPU)
    batch = objective.batch(0)[Task.T2I]
    _, ids, read = objective.t2i_inputs(batch, torch.Generator().manual_seed(0))
    assert torch.equal(ids, batch.image_ids) and 0.15 < (read != ids).float().mean() < 0.3
    assert torch.equal(objective.t2i_inputs(batch, None)[2], ids)


def test_images_of_a_folder(recipe, change, tmp_path):
    """Image files by relative path, decoded beforehand or on demand: the same losses."""
    Image.new("RGB", (20, 50), "red").save(tmp_path / "a.png")
    Image.new("L", (60, 20), 99).save(tmp_path / "b.jpg")
    (tmp_path / "talk.json").write_text(
        '[{"image": "a.png", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]},'
        ' {"image": "b.jpg", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "grey"}]}]'
    )
    r = change(recipe("stage1_mmu"), "data", folder=str(tmp_path), images="folder", conversations="talk.json", val_split="")
    pixels = [make_objective(change(r, "data", in_memory=in_memory), CPU).batch(0)[Task.MMU].pixels for in_memory in (False, True)]
    assert torch.equal(*pixels) and pixels[0].shape == (3, 3, 32, 32)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(ValueError, match="1 of 2 images are missing, e.g. b.jpg"):
        make_objective(r, CPU)


def test_broken_images_are_skipped_up_to_a_limit(recipe, change, tmp_path, caplog):
    """Never a text-only sample in their place."""
    rows = []
    for i in range(6):
        rows.append({"image": f"{i}.png", "conversations": turns("What?", f"answer {i}")})
        if i < 4:
            Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes(b"no image")  # and 5.png is missing
    (tmp_path / "talk.json").write_text(json.dumps(rows))
    r = change(recipe("stage1_mmu", mmu_batch=5), "data", folder=str(tmp_path), images="folder", conversations="talk.json", val_split="")
    with pytest.raises(ValueError, match="1 of 6 images are missing, e.g. 5.png"):
        make_objective(r, CPU)
    one = make_objective(change(r, "data", max_broken=1), CPU)
    with pytest.raises(ValueError, match="image '4.png': .*; more than data.max_broken=1 are broken"):
        one.batch(0)
    for in_memory in (False, True):
        objective = make_objective(change(r, "data", max_broken=2, in_memory=in_memory), CPU)
        batches = [objective.batch(step)[Task.MMU] for step in range(4)]
        assert all(len(batch.pixels) == len(batch.image_rows) == 5 for batch in batches)
        said = [objective.mmu.tok.decode(row) for batch in batches for row in answers(batch)]
        assert set(said) == {f"answer {i}" for i in range(4)}
        assert [f"answer {int(pixels[0, 0, 0]) // 40}" for batch in batches for pixels in batch.pixels] == said
        objective.sample(tmp_path)
        assert re.findall(r"\d\.png(?=\t)", (tmp_path / "described.txt").read_text()) == [f"{i}.png" for i in range(4)]
    assert (
        "1 of 6 images are missing, e.g. 5.png; they are left out" in caplog.text
        and "image '4.png' is left out, 2 of at most 2" in caplog.text
    )


def test_a_dataset_of_hugging_face(recipe, change, data_folder, tmp_path):
    """Columns in place of files; the Parquet files of the tiny data set and WebDataset shards of the same drawings."""
    rows = pq.read_table(data_folder / "train-00000-of-00002.parquet").to_pylist()
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i, row in enumerate(rows):
            talk = json.dumps({"conversations": turns("What is this?", row["caption"])})
            for suffix, content in (("png", row["image"]["bytes"]), ("txt", row["caption"].encode()), ("json", talk.encode())):
                member = tarfile.TarInfo(f"drawing-{i}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    base = change(recipe("stage2"), "data", images="datasets", val_split="", captions="column:caption", conversations="column:talk")
    shards = change(base, "data", folder=str(tmp_path), image_column="png", captions="column:txt", conversations="column:json")
    objective = make_objective(shards, CPU)
    assert objective.t2i.captions == [(row["caption"],) for row in rows]
    batch = objective.mmu.batch([2], RNG)
    assert objective.mmu.tok.decode(answers(batch)[0]) == rows[2]["caption"]
    plain = make_objective(recipe("stage2"), CPU)
    position = plain.mmu.images.position[rows[2]["id"]]
    assert torch.equal(batch.pixels, plain.mmu.images.get([position]))
    assert torch.equal(objective.t2i.image_ids, plain.t2i.image_ids[: len(rows)])

    (tmp_path / "parquet").mkdir()
    for file in data_folder.glob("*.parquet"):
        shutil.copy(file, tmp_path / "parquet")
    files = change(
        recipe("stage1_t2i"), "data", folder=str(tmp_path / "parquet"), images="datasets", captions="column:caption", val_split=""
    )
    painting = make_objective(files, CPU).t2i
    assert len(painting.captions) == 12 and torch.equal(painting.image_ids, plain.t2i.image_ids)
    for values, message in (
        ({"captions": "column:captions"}, "no column captions in the data set; it has "),
        ({"image_column": "picture"}, "no column picture; name one of .* as data.image_column"),
        ({"train_split": "test"}, "split test: `datasets` cannot read it"),
        ({"captions": "column:id", "images": "parquet"}, "data.captions=column:id names a column, which only data.images='datasets' has"),
    ):
        with pytest.raises(ValueError, match=message):
            make_objective(change(files, "data", **values), CPU)


# ---- starts


def test_stage2_starts_from_both_stage1_results(recipe, change):
    r = {stage: recipe(stage, train_backbone=True) for stage in ("stage1_mmu", "stage1_t2i")}
    folders = {
        stage: str(loop.run(make_objective(one, CPU), dataclasses.replace(one, out=f"{one.out}-{stage}"), CPU)) for stage, one in r.items()
    }
    start = change(recipe("stage2"), "init", mmu=folders["stage1_mmu"], t2i=folders["stage1_t2i"], shared="t2i")
    model = make_objective(start, CPU).model.state_dict()
    mmu, t2i = (load_file(f"{folder}/model.safetensors") for folder in folders.values())
    for name, tensor in model.items():
        assert torch.equal(tensor, (mmu if group_of(name) in STAGES["stage1_mmu"].trains else t2i)[name]), name
    with pytest.raises(ValueError, match="shared tensors differ .* init.shared=mmu or t2i"):
        make_objective(change(start, "init", shared=""), CPU)

    one = make_objective(change(recipe("stage2"), "init", model=folders["stage1_mmu"]), CPU).model.state_dict()
    assert all(torch.equal(tensor, mmu[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("init", {"vision": ""}, "stage2 reads images: name init.vision"),
        ("init", {"tokenizer": ""}, "stage2 reads text: name init.tokenizer"),
        ("init", {"vision": "none.safetensors"}, "none.safetensors: no such file; the recipe that makes it comes first"),
        ("init", {"model": "no/such/folder/"}, "there is no file or folder"),
        ("data", {"captions": "other.jsonl"}, "other.jsonl: no such file"),
        ("data", {"train_split": "hidden"}, "t2i-hidden.jsonl: no such file|understanding-hidden.jsonl: no such file"),
        ("data", {"folder": "/none"}, "no such file"),
        ("samples", {"temperature": -1.0}, "temperature"),
        ("samples", {"num_images": 0}, "samples.num_images=0 is below 1"),
        ("samples", {"prompts": ("cat", "")}, "caption '' is empty"),
        ("samples", {"prompts": ("word " * 99,)}, "the limit is 32"),
    ],
)
def test_what_cannot_run_is_said_before_it_starts(recipe, change, section, values, message):
    with pytest.raises(ValueError, match=message):
        make_objective(change(recipe("stage2"), section, **values), CPU)


@pytest.mark.parametrize(("stage", "batch"), [("lora_mmu", {"t2i_batch": 0}), ("lora_t2i", {"mmu_batch": 0})])
def test_lora_of_a_finished_model(recipe, change, tmp_path, stage, batch):
    """Only the LoRA of the task changes; the model's encoders are used; the adapter by itself makes the same model again."""
    first = recipe("stage2", steps=2)
    base = loop.run(make_objective(first, CPU), dataclasses.replace(first, out=str(tmp_path / "first")), CPU)
    start = {"model": str(base), "tokenizer": "", "vision": "", "vq": ""}
    values = {"mmu_batch": 2, "t2i_batch": 2, "stage": stage} | batch
    r = change(dataclasses.replace(first, init=dataclasses.replace(first.init, **start)), "train", **values)
    folder = loop.run(make_objective(r, CPU), r, CPU)
    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and {group_of(name) for name in changed} == set(STAGES[stage].trains)

    again = change(r, "init", adapter=str(folder / "adapter"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in make_objective(again, CPU).model.state_dict().items())
    assert OmniMamba.from_pretrained(folder, device="cpu").generate_image("red circle", seed=0)


@pytest.mark.parametrize("model", [{"lora": {"rank": 0}}, {"unified_vocabulary": True}], ids=["no task LoRA", "unified vocabulary"])
def test_ablated_models(recipe, model):
    """They train, are saved, and are used as any other; their config says what they are."""
    r = dataclasses.replace(recipe("stage2", steps=3, precision="fp32"), model=model)
    _, _, folder = run(r)
    names = set(load_file(folder / "model.safetensors"))
    assert not any("lora" in name for name in names) if "lora" in model else not any("image_mlp" in name for name in names)
    omni = OmniMamba.from_pretrained(folder, device="cpu")
    assert omni.config == r.config != preset("tiny")
    assert omni.generate_image("red circle", seed=0)[0].size == (32, 32)
    assert isinstance(omni.describe(Image.new("RGB", (40, 30), "red"), max_new_tokens=4), str)


def test_a_unified_vocabulary_scores_both(recipe):
    """Each loss is over the text tokens and the image tokens together."""
    r = dataclasses.replace(recipe("stage2"), model={"unified_vocabulary": True})
    model = make_objective(r, CPU).model.eval()
    hidden, labels = torch.randn(5, 64), torch.arange(5)
    both = torch.cat([model.text_embedding.weight, model.image_embedding.weight])
    for task, first in ((Task.MMU, 0), (Task.T2I, len(model.text_embedding.weight))):
        expected = torch.nn.functional.cross_entropy(hidden @ both.mT, labels + first, reduction="sum")
        torch.testing.assert_close(model.loss_sum(hidden, labels, task, 0), expected)
        torch.testing.assert_close(model.loss_sum(hidden, labels, task, 2), expected)


# ---- a language model to start from


@pytest.fixture
def mamba():
    """Tensors of a tiny Mamba-2 language model under the names of mamba_ssm."""
    torch.manual_seed(1)
    ours = state_of(OmniMambaModel(preset("tiny")))
    tensors = {name: tensor for name, tensor in ours.items() if group_of(name) == "backbone"}
    return tensors | {"backbone.embedding.weight": ours["text_embedding.weight"], "lm_head.weight": ours["text_embedding.weight"].clone()}


@pytest.fixture
def model():
    torch.manual_seed(2)
    return OmniMambaModel(preset("tiny"))


def write(folder, tensors, name):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name) if name.endswith("safetensors") else torch.save(tensors, folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("kind", ["file", "folder", "hub"])
def test_backbone(mamba, model, tmp_path, monkeypatch, name, kind):
    file = write(tmp_path / "lm", mamba, name)
    monkeypatch.setattr(hub, "fetch_file", lambda repo_id, filename: {("state-spaces/tiny", "pytorch_model.bin"): file}[repo_id, filename])
    before = state_of(model)
    load_backbone(model, {"file": str(file), "folder": str(file.parent), "hub": "state-spaces/tiny"}[kind])
    for name, tensor in model.state_dict().items():
        if name == "text_embedding.weight":
            assert torch.equal(tensor, mamba["backbone.embedding.weight"])
        else:
            assert torch.equal(tensor, mamba[name] if group_of(name) == "backbone" else before[name]), name


def test_a_run_starts_from_the_backbone(recipe, change, mamba, tmp_path):
    r = change(recipe("stage1_mmu"), "init", backbone=str(write(tmp_path / "lm", mamba, "pytorch_model.bin").parent))
    model = make_objective(r, CPU).model.state_dict()
    assert torch.equal(model["backbone.norm_f.weight"], mamba["backbone.norm_f.weight"])
    assert torch.equal(model["text_embedding.weight"], mamba["lm_head.weight"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("backbone.norm_f.weight"), "tensors do not fit the config: 1 missing: backbone.norm_f.weight"),
        (lambda t: t.update({"backbone.norm_f.weight": torch.ones(3)}), "1 wrongly shaped: backbone.norm_f.weight .3,. instead of .64,."),
        (
            lambda t: t.update({"model.layers.0": torch.ones(3)}),
            "not a Mamba-2 model in mamba_ssm's format .1 unexpected tensors: .*model.layers.0",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(2048, 64)}),
            "not a Mamba-2 model in mamba_ssm's format .*lm_head.weight differs",
        ),
        (lambda t: t.clear() or t.update({"backbone.x": torch.ones(1)}), "not a Mamba-2 model in mamba_ssm's format"),
        (lambda t: t.clear(), "missing"),
    ],
)
def test_backbone_that_does_not_fit(mamba, model, tmp_path, spoil, message):
    spoil(mamba)
    file = write(tmp_path / "lm", mamba, "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"^init.backbone={file}: .*{message}") as error:
        load_backbone(model, str(file))
    assert "\n" not in str(error.value)


def test_backbone_that_is_not_there(model, tmp_path):
    for source in (tmp_path, tmp_path / "none", "none.bin"):
        with pytest.raises(ValueError, match="no pytorch_model.bin or model.safetensors there"):
            load_backbone(model, str(source))
    (tmp_path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="pytorch_model.bin: damaged, or not a file of tensors"):
        load_backbone(model, str(tmp_path))


def test_projector_starts_with_standardised_features(recipe):
    plain = OmniMambaObjective(recipe("stage1_mmu"), torch.device("cpu"))
    scaled = OmniMambaObjective(recipe("stage1_mmu", standardise_features=True), torch.device("cpu"))
    features = plain.features(plain.mmu.batch(plain.mmu_sampler.indices(0), RNG), None)
    rows = features.flatten(0, 1)
    expected = plain.model.projector[0]((features - rows.mean(0)) / rows.std(0).clamp_min(0.1 * rows.std(0).mean()))
    torch.testing.assert_close(scaled.model.projector[0](features), expected, atol=1e-4, rtol=1e-4)
    same = {name for name, tensor in plain.model.state_dict().items() if torch.equal(tensor, scaled.model.state_dict()[name])}
    assert plain.model.state_dict().keys() - same == {"projector.0.weight", "projector.0.bias"}
