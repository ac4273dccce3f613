"""The script that cut this folder, and its limit."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent


@pytest.fixture
def cut():
    spec = importlib.util.spec_from_file_location("cut", HERE / "cut.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cut_keeps_inputs_and_weights_and_the_start_of_outputs(cut, tmp_path, capsys):
    full, target = tmp_path / "full", tmp_path / "cut"
    full.mkdir()
    config = json.dumps({"tied_keys": [["copy", "original"]]})
    (full / "config.json").write_text(config)
    weight, large = torch.randn(100, 100), torch.randn(3, 50, 1000)
    save_file({"original": weight, "copy": weight.clone(), cut.CODEBOOK_USED: torch.zeros(9)}, full / "weights.safetensors")
    save_file({"x": large, "logits": large.clone(), "tall": large.view(-1, 1).clone(), "loss": torch.ones(1)}, full / "case.safetensors")
    cut.cut_folder(full, target)
    assert "case.safetensors" in capsys.readouterr().out
    assert (target / "config.json").read_text() == config
    weights, case = load_file(target / "weights.safetensors"), load_file(target / "case.safetensors")
    assert weights.keys() == {"original"} and torch.equal(weights["original"], weight)
    kept = cut.MAX_OUTPUT_BYTES // (3 * 50 * 4)
    assert torch.equal(case["x"], large) and torch.equal(case["logits"], large[..., :kept])
    assert case["tall"].shape == (150_000, 1) and case["loss"].item() == 1


def test_this_folder_is_at_most_12_megabytes():
    assert sum(path.stat().st_size for path in HERE.rglob("*") if path.suffix in (".json", ".safetensors")) <= 12_000_000
