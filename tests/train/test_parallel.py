"""Several processes (gloo, on the CPU): the same run as on one, in DDP and in FSDP2, in parts, and resumed on other numbers of them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimamba.train.config import Train
from omnimamba.train.run import check_share, train

LAUNCH = Path(__file__).with_name("launch.py")


def launch(*jobs: tuple[int, Path, list[str]]) -> None:
    """Runs each (number of processes, recipe, overrides)."""
    text = json.dumps([{"processes": num, "recipe": str(recipe), "overrides": overrides} for num, recipe, overrides in jobs])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, LAUNCH], input=text, capture_output=True, text=True, env=environment, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]


RUNS = {
    "ddp": (2, ["train.parallel=ddp"]),
    "fsdp": (2, ["train.parallel=fsdp"]),
    "ddp-parts": (2, ["train.accumulate=2", "train.recompute=true"]),
    "fsdp-parts": (2, ["train.parallel=fsdp", "train.accumulate=2", "train.recompute=true", "train.loss_chunk=50"]),
    "one-from-fsdp": (1, []),
    "four-from-fsdp": (4, ["train.parallel=fsdp"]),
    "four-from-ddp": (4, ["train.parallel=fsdp"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, plain_stage2) -> Path:
    """The folder of all runs, by name; `alone` is the one on one process. Runs named X-from-Y go on from the middle of Y."""
    folder = tmp_path_factory.mktemp("runs")
    train(plain_stage2, [f"out={folder / 'alone'}"], device="cpu")
    jobs = {name: (num, plain_stage2, [*overrides, f"out={folder / name}"]) for name, (num, overrides) in RUNS.items()}
    launch(*(job for name, job in jobs.items() if "-from-" not in name))
    for name in jobs:
        if "-from-" in name:
            middle = Path("checkpoints", "step-00000004")
            shutil.copytree(folder / name.partition("-from-")[2] / middle, folder / name / middle)
    launch(*(job for name, job in jobs.items() if "-from-" in name))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_same_run(runs, name, log_lines):
    """fp32, to rounding: losses of each step, validations, and weights, exported and averaged."""
    for kind in ("train", "val"):
        expected, found = ({line["step"]: line for line in log_lines(runs / run, kind)} for run in ("alone", name))
        if "-from-" in name:
            expected = {step: line for step, line in expected.items() if step > 4}
        assert found.keys() == expected.keys()
        for step, line in expected.items():
            for figure in line.keys() - {"time", "tokens_per_s", "kind"}:
                assert found[step][figure] == pytest.approx(line[figure], rel=2e-5, abs=1e-6), (kind, step, figure)
    expected, found = (load_file(runs / run / "model" / "model.safetensors") for run in ("alone", name))
    assert found.keys() == expected.keys()
    for tensor in expected:
        torch.testing.assert_close(
            found[tensor], expected[tensor], rtol=1e-4, atol=2e-5, msg=lambda text, tensor=tensor: f"{tensor}: {text}"
        )
    assert (runs / name / "samples" / "step-00000008" / "painted.png").is_file()


@pytest.mark.slow
def test_checkpoints_of_several_processes(runs):
    """All have the same tensors, whoever wrote them."""
    from omnimamba.train import checkpoint

    expected = checkpoint.read(runs / "alone/checkpoints/step-00000008")
    for name in ("ddp", "fsdp"):
        found = checkpoint.read(runs / name / "checkpoints/step-00000008")
        assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in expected.items()}
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("stage", "several"), [([], (2, 3)), (["train.stage=stage1_t2i", "train.mmu_batch=0"], (2, 4))])
def test_parts_on_one_process(plain_stage2, tmp_path, log_lines, stage, several, device):
    """They are the whole, also after updates so large that a part which worked with older weights would show."""
    losses = {}
    for parts in (1, *several):
        changes = ["train.lr=1e-2", "train.warmup=0", "train.val_every=0", "train.sample_every=0", "train.save_every=0"]
        train(plain_stage2, [*stage, *changes, f"train.accumulate={parts}", f"out={tmp_path / str(parts)}"], device=device)
        losses[parts] = [line["loss"] for line in log_lines(tmp_path / str(parts))]
    assert losses[1][-1] < 0.95 * losses[1][0]
    assert all(losses[parts] == pytest.approx(losses[1], rel=1e-3) for parts in several)


@pytest.mark.parametrize(
    ("kind", "train", "num", "message"),
    [
        ("stage2", {"mmu_batch": 4, "t2i_batch": 6}, 4, "train.t2i_batch=6 is that of a whole step; pass a multiple of 4, for 4 processes"),
        ("stage1_t2i", {"t2i_batch": 6, "accumulate": 4}, 1, "train.t2i_batch=6 .* multiple of 4, for 1 processes with train.accumulate=4"),
        ("tower", {}, 2, "a tower recipe runs on one process, in one part"),
        ("vq", {"accumulate": 2}, 1, "a vq recipe runs on one process, in one part"),
    ],
)
def test_steps_that_cannot_be_split(recipe, kind, train, num, message):
    with pytest.raises(ValueError, match=message):
        check_share(recipe(kind, **train), num)
    check_share(recipe("stage2", mmu_batch=4, t2i_batch=8), 2)
    check_share(recipe("stage2", mmu_batch=3, t2i_batch=48, accumulate=4), 1)


@pytest.mark.parametrize(
    ("mmu", "t2i", "accumulate", "num", "expected"),
    [
        (3, 48, 1, 1, {"mmu_batch": 1, "t2i_batch": 1}),
        (3, 48, 3, 1, {"mmu_batch": 1, "t2i_batch": 2}),
        (12, 12, 5, 1, {"mmu_batch": 2, "t2i_batch": 3}),
        (64, 2, 3, 1, {"mmu_batch": 2, "t2i_batch": 1}),
        (3, 48, 3, 2, {"mmu_batch": 3, "t2i_batch": 3}),
        (0, 90, 2, 1, {"t2i_batch": 2}),
    ],
)
def test_parts_of_tasks(mmu, t2i, accumulate, num, expected):
    assert Train(mmu_batch=mmu, t2i_batch=t2i, accumulate=accumulate).parts_of_tasks(num) == expected
