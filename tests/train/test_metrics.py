"""Figures of a run, as JSON lines and as TensorBoard events."""

import inspect
import logging
import sys
import types

import pytest

from omnimamba.train.metrics import RunLog


def test_lines_and_events(tmp_path, log_lines):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path / "new") as log:
        log.report(1, {"loss": 2.5, "lr": 1e-3})
        log.report(2, {"loss": 1.5})
        log.report(2, {"psnr": 20.0}, kind="val")
        log.report(3, {"loss": 7.0})
    with (tmp_path / "new" / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "ki')  # where it was killed
    with RunLog(tmp_path / "new", first=2) as log:  # a run that is resumed adds to it
        log.report(3, {"loss": 0.5})
    lines = log_lines(tmp_path / "new")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.5), (2, 1.5), (3, 0.5)]
    assert lines[0]["lr"] == 1e-3 and lines[0]["time"] <= lines[2]["time"]
    (line,) = log_lines(tmp_path / "new", "val")
    assert (line["step"], line["psnr"]) == (2, 20.0)
    events = EventAccumulator(str(tmp_path / "new" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 1.5), (3, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("val/psnr")] == [(2, 20.0)]


def test_lines_are_there_before_the_end(tmp_path, log_lines):
    with RunLog(tmp_path) as log:
        log.report(1, {"loss": 2.5})
        assert len(log_lines(tmp_path)) == 1


def test_without_tensorboard(tmp_path, log_lines, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING), RunLog(tmp_path) as log:
        log.report(1, {"loss": 2.5})
    assert "no TensorBoard events: `pip install omnimamba[train]` adds them" in caplog.text
    assert len(log_lines(tmp_path)) == 1 and not (tmp_path / "tensorboard").exists()


def test_closed_after_an_error(tmp_path):
    with pytest.raises(KeyError), RunLog(tmp_path) as log:
        raise KeyError
    assert log.file.closed


def test_plot(tmp_path):
    from PIL import Image

    with RunLog(tmp_path) as log:
        for step in range(1, 4):
            log.report(step, {"loss": 1 / step, "mmu": 2 / step, "grad_norm": 1.0, "player_grad_norm": 1.0, "usage": 0.5, "lr": 1e-3})
        log.report(3, {"mmu": 0.7, "mmu_exact": 0.5, "mmu_exact_name": 0.5, "psnr": 20.0, "codes_used": 0.5, "a_accuracy": 0.5}, kind="val")
    with Image.open(tmp_path / "losses.png") as plot:
        assert 2 * plot.height < plot.width < 3 * plot.height  # two panels


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers(tmp_path, monkeypatch, name):
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **options: calls.append(("init", options["project"], options["name"], options["resume"])),
        log=lambda figures, step: calls.append(("log", step, figures)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    with RunLog(tmp_path, tracker=name) as log:
        log.report(1, {"loss": 2.5})
    assert calls == [("init", "omnimamba", str(tmp_path), "allow"), ("log", 1, {"train/loss": 2.5}), ("finish",)]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"train.tracker='{name}' needs the package {name}; `pip install {name}` installs it"):
        RunLog(tmp_path / "new", tracker=name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_the_trackers_take(name):
    """Their `init` has the arguments that are passed."""
    module = pytest.importorskip(name)
    expected = {"project", "name", "resume"} | ({"id", "dir"} if name == "wandb" else set())
    assert expected <= inspect.signature(module.init).parameters.keys()
