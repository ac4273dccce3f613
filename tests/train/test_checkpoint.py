"""Checkpoints: whole or not at all, the newest few, and clear errors for those that cannot be used."""

import pytest
import torch

from omnimamba.train import checkpoint


def save(folder, step, value=0.0, *, keep=2, fingerprint="recipe"):
    tensors = {"model": {"w": torch.full((3,), value), "n": torch.tensor(7)}, "model-ema": {"w": torch.arange(3.0)}}
    return checkpoint.save(folder, step, tensors, {"model": {"state": {0: torch.ones(2)}}}, keep=keep, fingerprint=fingerprint)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path / "new", 12, 0.5)
    assert path == tmp_path / "new" / "step-00000012"
    step, tensors, optimizers = checkpoint.load(path, fingerprint="recipe")
    assert step == 12 and set(tensors) == {"model", "model-ema"}
    assert tensors["model"]["w"].tolist() == [0.5] * 3 and tensors["model"]["n"] == 7 and tensors["model-ema"]["w"].tolist() == [0, 1, 2]
    assert optimizers["model"]["state"][0].tolist() == [1, 1]


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 20, 100_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-100000000"]


def test_a_leftover_is_ignored_and_replaced(tmp_path):
    save(tmp_path, 5, 1.0)
    leftover = tmp_path / "step-00000010.tmp"
    leftover.mkdir()
    (leftover / "stray").write_text("half a file")
    assert [path.name for path in checkpoint.step_folders(tmp_path)] == ["step-00000005"]
    assert not (save(tmp_path, 10) / "stray").exists()
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


def test_an_interrupted_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 5, 1.0)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10)
    assert [path.name for path in checkpoint.step_folders(tmp_path)] == ["step-00000005"]
    checkpoint.load(tmp_path / "step-00000005", fingerprint="recipe")


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, 1.0)
    path = save(tmp_path, 5, 2.0)
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoint.load(path, fingerprint="recipe")[1]["model"]["w"].tolist() == [2] * 3


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.pt", "meta.json"])
@pytest.mark.parametrize("content", [b"", b"{}", "half"])
def test_damaged_file(tmp_path, name, content):
    path = save(tmp_path, 5)
    file = path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(ValueError, match="step-00000005: damaged checkpoint .*; delete the folder to resume from the one before") as error:
        checkpoint.load(path, fingerprint="recipe")
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    path = save(tmp_path, 5)
    (path / "optimizers.pt").unlink()
    with pytest.raises(ValueError, match="damaged checkpoint"):
        checkpoint.load(path, fingerprint="recipe")


def test_another_recipe(tmp_path):
    with pytest.raises(ValueError, match="saved by another recipe; give another `out` folder or delete this one to start again"):
        checkpoint.load(save(tmp_path, 5), fingerprint="other")
