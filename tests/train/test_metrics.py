"""Figures of a run, as JSON lines and as TensorBoard events."""

import logging
import sys

import pytest

from omnimamba.train.metrics import RunLog


def test_lines_and_events(tmp_path, log_lines):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path / "new") as log:
        log.report(1, {"loss": 2.5, "lr": 1e-3})
        log.report(2, {"loss": 1.5})
        log.report(2, {"psnr": 20.0}, kind="val")
    with RunLog(tmp_path / "new") as log:  # a run that is resumed adds to it
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
