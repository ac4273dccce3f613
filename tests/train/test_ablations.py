"""The ablations: every variant is a chain of valid recipes, fair in what it sees; table and plot; and the command, at tiny size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from omnimamba.data.kept import Kept
from omnimamba.train import ablations
from omnimamba.train.ablations import CHAIN, VARIANTS
from omnimamba.train.config import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "ablations"


def recipes(name):
    variant = VARIANTS[name]
    last = variant.recipes[-1]
    return [
        read_recipe(RECIPES / f"{recipe}.toml", [*variant.overrides, *(variant.last_overrides if recipe == last else ())])
        for recipe in variant.recipes
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_see_as_much_as_the_full_model(name):
    """Samples of both tasks together; of each task too, but for the imbalanced ones."""

    def seen(name):
        return [sum(r.train.steps * getattr(r.train, f"{task}_batch") for r in recipes(name)) for task in ("mmu", "t2i")]

    assert sum(seen(name)) == sum(seen("full"))
    assert name.startswith("mostly") or seen(name) == seen("full")


def test_variants_are_what_they_say():
    full = recipes("full")[-1].config
    assert full.lora.rank == 8 and not full.unified_vocabulary
    assert all(recipe.config.lora.rank == 0 for recipe in recipes("no-task-lora"))
    assert all(recipe.config.unified_vocabulary for recipe in recipes("unified-vocabulary"))
    (joint,) = recipes("joint")
    assert joint.train.stage == "stage2" and not joint.init.model
    last = recipes("mostly-painting")[-1].train
    assert last.t2i_batch == 15 * last.mmu_batch
    assert [recipe.train.stage for recipe in recipes("full")] == ["stage1_t2i", "stage1_mmu", "stage2"]


def test_variants_share_the_stages_they_have_in_common():
    owners = {name: [ablations.first_with_stage(name, i) for i in range(len(VARIANTS[name].recipes))] for name in VARIANTS}
    assert owners == {
        "full": ["full"] * 3,
        "no-task-lora": ["no-task-lora"] * 3,
        "unified-vocabulary": ["unified-vocabulary"] * 3,
        "joint": ["joint"],
        "mostly-painting": ["full", "full", "mostly-painting"],
        "mostly-understanding": ["full", "full", "mostly-understanding"],
    }


def test_a_stage_is_trained_again_with_other_changes(tmp_path):
    (tmp_path / ablations.CHANGES).write_text('["train.lr=1"]')
    assert ablations.is_trained(tmp_path, ["train.lr=1"]) and not ablations.is_trained(tmp_path, ["train.lr=2"])
    assert not ablations.is_trained(tmp_path / "none", [])


RESULTS = {
    "full": {"caption_exact_match": [0.5, 0.6, 0.7], "painted_top1": [0.1, 0.1, 0.1], "t2i_loss": [2.5, 2.75, 3.0]},
    "joint": {"caption_exact_match": [0.25], "painted_top1": [0.0], "t2i_loss": [3.0]},
}


def test_table_and_plot(tmp_path):
    assert ablations.table(RESULTS).splitlines() == [
        "| variant | what | seeds | name right, % | painting recognised, % | loss of images, nats a token |",
        "| --- | --- | --- | --- | --- | --- |",
        "| full | decoupled vocabularies, task LoRA, decoupled stages | 3 | 60.0 ± 10.0 | 10.0 ± 0.0 | 2.75 ± 0.25 |",
        "| joint | both tasks from the first step, as many samples | 1 | 25.0 ± 0.0 | 0.0 ± 0.0 | 3.00 ± 0.00 |",
    ]
    ablations.plot(RESULTS, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 2 * picture.height


@pytest.mark.slow
def test_the_command(tmp_path, data_folder, tokenizer_file, encoders, monkeypatch):
    """Two variants of the tiny model, scored, and not run again."""
    scores = iter((0.5, 0.25, 0.75))

    class Report:
        def to_dict(self):
            return {"figures": {"caption_exact_match": {"value": next(scores)}}}

    monkeypatch.setattr(ablations, "evaluate", lambda *_, **__: Report())
    files = [f"init.tokenizer={tokenizer_file}", f"init.vision={encoders}/vision.safetensors", f"init.vq={encoders}/vq.safetensors"]
    overrides = [*files, "preset=tiny", f"data.folder={data_folder}", "data.kinds=[]", "train.precision=fp32"]
    for name, chain in (("full", CHAIN), ("joint", ("joint",))):
        for _ in range(2):
            ablations.run_variant(RECIPES, name, 1, tmp_path, overrides, steps=1 / 1200, num_prompts=0, limit=None, device="cpu")
        assert [path.name for path in sorted((tmp_path / name / "seed-1").iterdir()) if path.is_dir()] == list(chain)
    ablations.run_variant(
        RECIPES, "mostly-painting", 1, tmp_path, overrides, steps=1 / 1200, num_prompts=0, limit=None, device="cpu", kept=Kept()
    )
    (stage,) = [path for path in (tmp_path / "mostly-painting" / "seed-1").iterdir() if path.is_dir()]
    started_from = json.loads((stage / "recipe.json").read_text())["init"]["model"]
    assert stage.name == CHAIN[-1] and started_from == str(tmp_path / "full" / "seed-1" / CHAIN[-2] / "model")
    ablations.write_results(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: figures["caption_exact_match"] for name, figures in results.items()} == {
        "full": [0.5], "joint": [0.25], "mostly-painting": [0.75]
    }  # fmt: skip
    assert all(0 < figures[loss][0] < 20 for figures in results.values() for loss in ("mmu_loss", "t2i_loss"))
    assert (tmp_path / "ablations.png").is_file() and (tmp_path / "table.md").read_text().count("\n") == 5


def test_an_unknown_variant():
    command = [sys.executable, "-m", "omnimamba.train.ablations", RECIPES, "--variant", "no-lora"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "did you mean 'no-task-lora'" in result.stderr


@pytest.mark.slow
def test_runs_that_fail_are_reported_and_the_others_go_on(tmp_path):
    command = [sys.executable, "-m", "omnimamba.train.ablations", RECIPES, f"data.folder={tmp_path}/none", "--seeds", "1", "--jobs", "2"]
    command += ["--variant", "full", "--variant", "joint", "--device", "cpu", "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1 and "2 of 2 runs failed: " in result.stderr
    for name in ("full", "joint"):
        assert f"{name}, seed 0 failed: ValueError; the end of {tmp_path}/out/{name}/seed-0/log.txt:" in result.stderr
        assert f"data.folder={tmp_path}/none: no such folder" in (tmp_path / "out" / name / "seed-0" / "log.txt").read_text()
    assert "no such folder" in result.stderr and (tmp_path / "out" / "results.json").read_text() == "{}\n"
