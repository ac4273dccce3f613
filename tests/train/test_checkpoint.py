"""Checkpoints: whole or not at all, the newest few and the best, and clear errors for those that cannot be used."""

import json

import pytest
import torch

from omnimamba.train import checkpoint
from omnimamba.train.checkpoint import Best, Checkpoints


def save(folder, step, value=0.0, *, keep=2, fingerprint="recipe", best=None, figures=None):
    tensors = {"model/w": torch.full((3,), value), "model/n": torch.tensor(7), "model-ema/w": torch.arange(3.0)}
    with Checkpoints(folder, keep=keep, fingerprint=fingerprint, best=best) as checkpoints:
        checkpoints.save(step, tensors, figures)
    return folder / f"step-{step:08d}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = save(tmp_path / "new", 12, 0.5)
    assert checkpoint.read_step(path, fingerprint="recipe") == 12
    tensors = checkpoint.read(path)
    assert tensors["model/w"].tolist() == [0.5] * 3 and tensors["model/n"] == 7 and tensors["model-ema/w"].tolist() == [0, 1, 2]
    some = {"model/w": torch.zeros(3)}
    checkpoint.load(path, some)
    assert some["model/w"].tolist() == [0.5] * 3


def test_what_changes_while_it_is_written_is_saved_as_it_was(tmp_path):
    tensor = torch.zeros(1000, 1000)
    with Checkpoints(tmp_path, keep=1, fingerprint="recipe") as checkpoints:
        checkpoints.save(1, {"w": tensor})
        tensor.fill_(1)
    assert not checkpoint.read(tmp_path / "step-00000001")["w"].any()


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 20, 100_000_000):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-100000000"]
    assert [path.name for path in checkpoint.step_folders(tmp_path)] == ["step-00000020", "step-100000000"]


@pytest.mark.parametrize(("is_highest", "expected"), [(False, (10, 0.5)), (True, (5, 3.0))])
def test_the_best_is_kept(tmp_path, is_highest, expected):
    best = Best("mmu", is_highest)
    for step, figures in ((5, {"mmu": 3.0}), (10, {"mmu": 0.5}), (15, None), (20, {"mmu": 1.0, "t2i": 9.0}), (25, None)):
        save(tmp_path, step, keep=1, best=best, figures=figures)
    step, value = expected
    assert names(tmp_path) == [f"step-{step:08d}", "step-00000025"]
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="recipe", best=best)
    assert checkpoints.best_folder() == tmp_path / f"step-{step:08d}" and checkpoints.best_value() == value


def test_without_a_best(tmp_path):
    assert Checkpoints(tmp_path, keep=1, fingerprint="recipe", best=Best("mmu")).best_value() is None
    save(tmp_path, 5, figures={"mmu": 1.0})
    assert Checkpoints(tmp_path, keep=1, fingerprint="recipe").best_folder() is None


def test_leftovers_are_ignored_and_removed(tmp_path):
    save(tmp_path, 5, 1.0)
    for name in ("step-00000010.tmp", "step-00000003.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stray").write_text("half a file")
    assert [path.name for path in checkpoint.step_folders(tmp_path)] == ["step-00000005"]
    assert not (save(tmp_path, 10) / "stray").exists()
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


def test_a_failed_save_leaves_no_checkpoint_and_is_reported(tmp_path, monkeypatch):
    save(tmp_path, 5, 1.0)

    def stop(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(json, "dump", stop)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, 10)
    assert [path.name for path in checkpoint.step_folders(tmp_path)] == ["step-00000005"]
    checkpoint.read(tmp_path / "step-00000005")


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, 1.0)
    path = save(tmp_path, 5, 2.0)
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoint.read(path)["model/w"].tolist() == [2] * 3


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json"])
@pytest.mark.parametrize("content", [b"", b"{}", "half", None])
def test_damaged_file(tmp_path, name, content):
    path = save(tmp_path, 5)
    file = path / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(ValueError, match="step-00000005: damaged checkpoint .*; delete the folder to resume from the one before") as error:
        checkpoint.read_step(path, fingerprint="recipe")
        checkpoint.read(path)
    assert "\n" not in str(error.value)


def test_a_tensor_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="damaged checkpoint .*other"):
        checkpoint.load(save(tmp_path, 5), {"other": torch.zeros(2)})


def test_another_recipe(tmp_path):
    with pytest.raises(ValueError, match="saved by another recipe; give another `out` folder or delete this one to start again"):
        checkpoint.read_step(save(tmp_path, 5), fingerprint="other")
