"""Model folders: what is written is what is read, in any type, and whatever is wrong with one is one line."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnimamba.config import preset
from omnimamba.model import files, weights
from omnimamba.model.omnimamba import FP32_PARAMETERS, OmniMambaModel
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel


@pytest.fixture(scope="module")
def bundle(redraw, tmp_path_factory):
    config = preset("tiny")
    tokenizer_file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer_file.write_text('{"a": "tokenizer"}')
    parts = OmniMambaModel(config), VisionTowers(config.towers), VQModel(config.vq)
    return weights.Bundle(config, *(redraw(part, seed) for seed, part in enumerate(parts)), tokenizer_file)


@pytest.fixture
def folder(bundle, tmp_path):
    weights.save(bundle, tmp_path / "model", texts={"generation.json": "{}"})
    return tmp_path / "model"


def tensors_of(bundle):
    parts = {"model": bundle.model, "vision": bundle.vision, "vq": bundle.vq}
    return {f"{part}.{name}": tensor for part, module in parts.items() if module for name, tensor in module.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def names(folder):
    return {path.name for path in folder.iterdir()}


def rewrite(path, change):
    """Changes the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---- there and back


def test_what_is_saved_is_loaded(bundle, folder):
    loaded = weights.load(folder)
    assert loaded.config == bundle.config
    assert_same(tensors_of(loaded), tensors_of(bundle))
    assert loaded.tokenizer_file is not None and loaded.tokenizer_file.read_text() == '{"a": "tokenizer"}'
    assert not any(module.training for part in (loaded.model, loaded.vision, loaded.vq) for module in part.modules())
    assert names(folder) == {
        "config.json",
        "tokenizer.json",
        "generation.json",
        "model.safetensors",
        "vision.safetensors",
        "vq.safetensors",
    }
    assert names(folder.parent) == {"model"}


def test_loaded_weights_do_not_hang_on_the_file(folder):
    loaded = weights.load(folder)
    before = {name: tensor.clone() for name, tensor in tensors_of(loaded).items()}
    for path in folder.glob("*.safetensors"):
        path.write_bytes(b"")
    assert_same(tensors_of(loaded), before)
    loaded.model.text_embedding.weight.data.zero_()


def test_weights_are_loaded_in_the_asked_type(bundle, folder):
    loaded = tensors_of(weights.load(folder, dtype=torch.bfloat16))
    for name, tensor in tensors_of(bundle).items():
        keeps = name.rsplit(".", 1)[-1] in FP32_PARAMETERS
        assert torch.equal(loaded[name], tensor if keeps else tensor.bfloat16()), name
        assert loaded[name].dtype is (torch.float32 if keeps else torch.bfloat16), name


def test_what_no_feature_depends_on_stays_on_the_cpu(folder):
    vision = weights.load(folder, device="meta").vision
    assert vision is not None
    on_cpu = {name for name, parameter in vision.named_parameters() if parameter.device.type == "cpu"}
    assert on_cpu == weights.outline("vision", weights.load(folder).config).unread() and on_cpu


def test_weights_are_stored_in_the_asked_type(bundle, tmp_path):
    weights.save(bundle, tmp_path / "half", dtype=torch.float16)
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["text_embedding.weight"].dtype is torch.float16
    assert stored["backbone.layers.0.mixer.A_log"].dtype is torch.float32
    loaded = tensors_of(weights.load(tmp_path / "half"))
    for name, tensor in tensors_of(bundle).items():
        keeps = name.rsplit(".", 1)[-1] in FP32_PARAMETERS
        assert torch.equal(loaded[name], tensor if keeps else tensor.half().float()), name
    assert sum(path.stat().st_size for path in (tmp_path / "half").glob("*.safetensors")) < 1.5e6


def test_values_too_large_for_fp16_are_refused(bundle, tmp_path):
    large = dataclasses.replace(bundle, model=OmniMambaModel(bundle.config))
    with torch.no_grad():
        large.model.projector[0].bias[3] = 70000.0
    with pytest.raises(ValueError, match="projector.0.bias has values up to 7e\\+04, too large for torch.float16; use bfloat16"):
        weights.save(large, tmp_path / "half", dtype=torch.float16)
    assert names(tmp_path) == set()


def test_encoders_may_be_absent(bundle, tmp_path):
    weights.save(dataclasses.replace(bundle, vision=None, vq=None, tokenizer_file=None), tmp_path / "bare")
    assert names(tmp_path / "bare") == {"config.json", "model.safetensors"}
    loaded = weights.load(tmp_path / "bare")
    assert loaded.vision is None and loaded.vq is None and loaded.tokenizer_file is None
    assert_same({f"model.{name}": tensor for name, tensor in loaded.model.state_dict().items()}, tensors_of(loaded))


def test_other_files_in_the_folder_are_left_alone(bundle, folder):
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    (folder / "README.md").write_text("mine")
    (folder / "model_old.safetensors").write_text("mine")
    assert_same(tensors_of(weights.load(folder)), tensors_of(bundle))
    weights.save(dataclasses.replace(bundle, vq=None), folder)
    assert {"other.safetensors", "README.md", "model_old.safetensors"} < names(folder)
    assert names(folder).isdisjoint({"vq.safetensors", "generation.json"})
    assert weights.load(folder).vq is None


def test_shards(bundle, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 400_000)
    weights.save(bundle, tmp_path / "sharded")
    assert {"model-00001-of-00003.safetensors", "model.safetensors.index.json"} < names(tmp_path / "sharded")
    assert_same(tensors_of(weights.load(tmp_path / "sharded")), tensors_of(bundle))
    monkeypatch.undo()
    weights.save(bundle, tmp_path / "sharded")  # over it, whole again
    assert "model.safetensors" in names(tmp_path / "sharded")
    assert not [name for name in names(tmp_path / "sharded") if "-of-" in name or "index" in name]


def test_a_lost_shard_is_named(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 400_000)
    weights.save(bundle, tmp_path / "sharded")
    (tmp_path / "sharded" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="names model-00002-of-00003.safetensors, which .* lacks"):
        weights.load(tmp_path / "sharded")


def test_a_save_that_fails_leaves_everything_as_it_was(bundle, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(tensors, folder, stem):
        (folder / f"{stem}.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "write_safetensors", disk_full)
    for target in (folder, folder.parent / "new"):
        with pytest.raises(OSError, match="No space left"):
            weights.save(bundle, target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(folder.parent) == {"model"}


def test_a_folder_caught_between_old_and_new_files_is_no_model(bundle, folder, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.save(bundle, folder)
    with pytest.raises(ValueError, match="no config.json"):
        weights.load(folder)


def test_saving_to_a_file_is_refused(bundle, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is a file; pass a folder"):
        weights.save(bundle, tmp_path / "taken")


def test_files_are_mapped_anew_while_they_are_read(folder, monkeypatch):
    monkeypatch.setattr(files, "REMAP_BYTES", 0)
    tensors = files.TensorFile(folder / "model.safetensors")
    first = tensors["text_embedding.weight"]
    assert torch.equal(first, tensors["text_embedding.weight"])
    assert first.data_ptr() != tensors["text_embedding.weight"].data_ptr()


# ---- what is wrong with a source is said in one line


def test_all_tensors_that_do_not_fit_are_listed(folder):
    def change(tensors):
        tensors["extra.weight"] = torch.zeros(1)
        del tensors["backbone.norm_f.weight"], tensors["positions.mmu"]
        tensors["text_embedding.weight"] = tensors["text_embedding.weight"][:-1].clone()

    rewrite(folder / "model.safetensors", change)
    with pytest.raises(ValueError) as caught:
        weights.load(folder)
    assert str(caught.value) == (
        f"{folder}: model: tensors do not fit the config: 2 missing: backbone.norm_f.weight, positions.mmu; 1 unexpected: extra.weight; "
        "1 wrongly shaped: text_embedding.weight (2047, 64) instead of (2048, 64)"
    )


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json, so it is no model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: .*not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"backbone": 3}'), "config.json: "),
        (lambda folder: (folder / "config.json").write_text('{"n_layers": 3}'), "config.json: unknown key 'n_layers'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors: damaged"),
        (lambda folder: (folder / "vq.safetensors").write_text("version https://git-lfs"), "vq.safetensors: damaged"),
        (lambda folder: (folder / "vision.safetensors").write_bytes(b""), "vision.safetensors: damaged"),
    ],
)
def test_damaged_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        weights.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1.3b", "'1.3b' is a preset, a shape without weights"),
        ("nanno", "there is no file or folder 'nanno'; pass 'nano', a folder, a Hub id owner/name or a checkpoint file"),
        ("runs/model.pth", "there is no file or folder 'runs/model.pth'"),
        ("/no/such/folder", "there is no file or folder '/no/such/folder'"),
    ],
)
def test_unknown_sources(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        weights.load(source)


# ---- fingerprint


def test_fingerprint_names_the_weights_not_the_file(bundle, folder, tmp_path):
    assert len(bundle.fingerprint) == 16
    assert weights.load(folder).fingerprint == bundle.fingerprint
    assert weights.load(folder, dtype=torch.bfloat16).fingerprint == bundle.fingerprint
    other_label = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, name="mine"), vision=None, vq=None)
    assert other_label.fingerprint == bundle.fingerprint
    weights.save(bundle, tmp_path / "half", dtype=torch.float16)
    half = weights.load(tmp_path / "half")
    weights.save(half, tmp_path / "single")
    assert half.fingerprint == weights.load(tmp_path / "single").fingerprint
    assert half.fingerprint == weights.load(tmp_path / "half", dtype=torch.float16).fingerprint


@torch.no_grad()
def test_fingerprint_sees_every_weight_and_the_config(bundle, folder):
    loaded = weights.load(folder)
    seen = {bundle.fingerprint}
    for parameter in (loaded.model.positions["mmu"], loaded.model.backbone.layers[1].mixer.A_log):
        for i, j in ((0, 1), (-1, -2)):
            flat = parameter.view(-1)
            flat[[i, j]] = flat[[j, i]]  # the same values in another order
            seen.add(loaded.fingerprint)
    loaded.model.backbone.layers[0].mixer.in_proj.lora_B["t2i"][3, 2] += 0.01
    seen.add(loaded.fingerprint)
    lora = dataclasses.replace(bundle.config.lora, alpha=16.0)
    seen.add(dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, lora=lora)).fingerprint)
    assert len(seen) == 7


def test_checksum_runs_over_many_chunks(monkeypatch):
    values = torch.randn(10_000)
    whole = weights.checksum(values)
    monkeypatch.setattr(weights, "CHECKSUM_CHUNK", 999)
    assert weights.checksum(values) != whole
    moved = torch.cat([values[999:1998], values[:999], values[1998:]])
    assert weights.checksum(moved) != weights.checksum(values)


def test_config_is_readable(folder, bundle):
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(bundle.config.to_dict()))


def test_files_are_readable_for_others(bundle, tmp_path, monkeypatch):
    """And the umask stays as it is meanwhile: other threads make files with it, too."""
    mask = os.umask(0o022)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            weights.save(bundle, tmp_path / "model")
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o644}
