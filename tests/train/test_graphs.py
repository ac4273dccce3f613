"""Recorded steps against steps from Python: on a CPU with a recorder that repeats the step, on a GPU with CUDA graphs."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from omnimamba.config import Task
from omnimamba.data.augment import Augmentation
from omnimamba.train import checkpoint, loop, run
from omnimamba.train.graphs import GraphRecorder, RecordedSteps, mapped, shapes_of
from omnimamba.train.optim import MovingAverage, adamw, set_learning_rate, trainable
from omnimamba.train.run import check_graphs, make_objective, train

CPU = torch.device("cpu")


class Repeater:
    """Takes the place of CUDA graphs: a recording is the step itself, which writes into the same tensors each time."""

    def __init__(self, generator=None):
        self.num_run = self.num_recorded = self.num_played = 0

    def run(self, step):
        self.num_run += 1
        return step()

    def record(self, step):
        self.num_recorded += 1
        figures = {}

        def play():
            self.num_played += 1
            for name, value in step().items():
                figures.setdefault(name, torch.empty_like(value)).copy_(value)
            return figures

        return play


@pytest.fixture
def repeaters(monkeypatch):
    """The recorders of runs with train.graphs, in place of CUDA graphs."""
    made = []
    monkeypatch.setattr(loop, "GraphRecorder", lambda generator: made.append(Repeater()) or made[-1])
    return made


EVERY_CHANGE = Augmentation(0.2, 5, 5, 0.1, 0.2, 0.2, 0.2, 0.1, 0.2, 0.2, 0.2)


def with_graphs(recipe, out):
    return dataclasses.replace(recipe, out=out, train=dataclasses.replace(recipe.train, graphs=True))


@pytest.mark.parametrize(
    ("stage", "resumes_at", "parts"), [("stage2", 0, 1), ("stage2", 9, 1), ("stage1_t2i", 0, 1), ("stage2", 0, 2), ("stage1_t2i", 0, 2)]
)
def test_the_same_run(recipe, tmp_path, repeaters, log_lines, stage, resumes_at, parts):
    """Losses and all that a checkpoint holds, to the bit: shapes that change, validations between, resumed or not."""
    options = {"steps": 14, "ema": 0.9, "warmup": 3, "val_every": 5, "sample_every": 7, "save_every": 7, "image_token_noise": 0.2}
    if stage == "stage2":
        options |= {"mmu_batch": 5 + parts // 2, "mean_by_sample": True}  # some of them without an image
    options["accumulate"] = parts
    plain = dataclasses.replace(recipe(stage, **options), augment=EVERY_CHANGE)
    loop.run(make_objective(plain, CPU), plain, CPU)
    graphs = with_graphs(plain, str(tmp_path / "graphs"))
    if resumes_at:
        objective = make_objective(graphs, CPU)
        batch, objective.batch = objective.batch, lambda step: batch(step) if step < resumes_at else 1 / 0
        with pytest.raises(ZeroDivisionError):
            loop.run(objective, graphs, CPU)
    loop.run(make_objective(graphs, CPU), graphs, CPU)

    one, other = (checkpoint.read(f"{r.out}/checkpoints/step-00000014") for r in (plain, graphs))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for kind in ("train", "val"):
        expected, found = (
            {line["step"]: {k: v for k, v in line.items() if k not in ("time", "tokens_per_s")} for line in log_lines(r.out, kind)}
            for r in (plain, graphs)
        )
        assert found == expected
    assert len(repeaters) == 1 + bool(resumes_at)
    for repeater in repeaters:
        assert repeater.num_played > 0 and repeater.num_recorded >= 1
    if not resumes_at:
        assert repeaters[0].num_run + repeaters[0].num_played == 14 and (repeaters[0].num_run > 2) == (stage == "stage2")


def test_what_a_recording_reads_stays_where_it_is(recipe, tmp_path):
    """Weights and the optimizer's state, through averages, validation, samples and export."""
    r = recipe("stage2", steps=2, ema=0.9, save_every=2)
    objective = make_objective(r, CPU)
    model = objective.players["model"]
    loop.run(objective, r, CPU)
    optimizers = {"model": adamw(trainable(model).values(), r.train)}
    averages = {"model": MovingAverage(model, 0.9)}
    loop.load(tmp_path / "run/checkpoints/step-00000002", objective, optimizers, averages, loop.ALONE)

    def addresses():
        state = [tensor for values in optimizers["model"].state.values() for tensor in values.values()]
        return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers(), *state)]

    before, requires_grad = addresses(), [p.requires_grad for p in model.parameters()]
    with loop.averaged(averages), objective.whole():
        objective.validate()
        objective.sample(tmp_path / "samples")
        objective.export(tmp_path / "model")
    assert addresses() == before and [p.requires_grad for p in model.parameters()] == requires_grad


def test_one_recording_for_each_set_of_shapes(recipe):
    objective = make_objective(recipe("stage1_mmu", mmu_batch=4), CPU)
    data = objective.mmu
    text_only = next(i for i, sample in enumerate(data.samples) if sample.image is None)
    with_image = next(i for i, sample in enumerate(data.samples) if sample.image is not None)
    seen, repeater = [], Repeater()

    def step(batch, number):
        seen.append((number, batch))
        return {"loss": batch[0][Task.MMU].ids.sum()}

    steps = RecordedSteps(step, CPU, repeater)
    batches = [[{Task.MMU: data.batch(idx, np.random.default_rng(0))}] for idx in ([with_image] * 2, [text_only] * 2)]
    for number, i in enumerate((0, 1, 0, 0, 1, 0)):
        assert steps(batches[i], number)["loss"] == batches[i][0][Task.MMU].ids.sum()
        for buffer, tensor in zip(seen[-1][1][0][Task.MMU], batches[i][0][Task.MMU], strict=True):
            assert buffer is not tensor or tensor is None
            assert tensor is None or torch.equal(buffer, tensor)
    assert (repeater.num_run, repeater.num_recorded, repeater.num_played) == (2, 2, 4)
    assert [number for number, _ in seen] == [0, 1, 2, 2, 4, 2]  # what is recorded sees the number it was recorded with
    assert len({id(batch[0][Task.MMU].ids) for _, batch in seen}) == 2
    assert shapes_of(batches[0]) != shapes_of(batches[1]) == shapes_of([mapped(part, torch.clone) for part in batches[1]])


class Part(NamedTuple):
    x: torch.Tensor


def test_the_recording_used_longest_ago_makes_way(monkeypatch):
    monkeypatch.setattr("omnimamba.train.graphs.MAX_RECORDINGS", 2)
    repeater = Repeater()
    steps = RecordedSteps(lambda parts, number: {"loss": parts[0]["part"].x.sum()}, CPU, repeater)
    for number, size in enumerate((1, 1, 2, 2, 1, 3, 1, 2, 2)):  # 3 drops 2, which then drops 3
        assert steps([{"part": Part(torch.full((size,), number))}], number)["loss"] == size * number
    assert (repeater.num_run, repeater.num_recorded, repeater.num_played) == (4, 3, 5) and len(steps.buckets.values) == 2


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "is_nonzero", "unique", "repeat_interleave"}
"""Operators by which Python waits for a GPU, or has it wait for Python: values read, shapes that depend on values, new constants."""


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names |= {name} & WAITING
        if name in ("index", "index_put", "index_put_") and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.names.add(f"{name} of a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"mean_by_sample": True, "loss_chunk": 50}, {"precision": "bf16"}, {"accumulate": 2, "mmu_batch": 6}]
)
def test_nothing_waits_in_a_step(recipe, options):
    """But for the optimizer, which on a CPU counts its steps in Python."""
    r = dataclasses.replace(recipe("stage2", **{"image_token_noise": 0.1, "mmu_batch": 5} | options), augment=EVERY_CHANGE)
    objective = make_objective(r, CPU)
    parts, model = objective.parts(0), objective.players["model"]

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            pass

    optimizers = {"model": Counting(model.parameters(), lr=0.1)}
    with Waits() as waits:
        loop.train_step(objective, optimizers, r, parts, 0, generator=torch.Generator(), device=CPU)
    assert not waits.names
    with Waits() as waits:
        _ = torch.ones(3)[torch.ones(3, dtype=torch.bool)], torch.tensor(3.0), torch.ones(3).new_tensor((1, 2)), torch.ones(()).item()
    assert waits.names == {"index of a mask", "lift_fresh", "_local_scalar_dense"}


def test_learning_rate_of_a_recording():
    """It is written into the tensor that the recording reads."""
    for lr in (0.1, torch.tensor(0.1)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        set_learning_rate(optimizer, 0.25)
        assert optimizer.param_groups[0]["lr"] == 0.25 and (not isinstance(lr, torch.Tensor) or lr == 0.25)


def test_where_graphs_are_refused(recipe, plain_stage2, tmp_path, monkeypatch):
    for device, num_processes in ((CPU, 1), (torch.device("cuda"), 2)):
        with pytest.raises(
            ValueError, match=f"graphs=true is for one process with a CUDA device; leave it .* {num_processes} on .* {device}"
        ):
            check_graphs(recipe("stage2", graphs=True), device, num_processes)
        check_graphs(recipe("stage2"), device, num_processes)
    check_graphs(recipe("stage2", graphs=True), torch.device("cuda"), 1)
    monkeypatch.setattr(run, "missing_for_kernels", lambda: "no kernels here")
    with pytest.raises(ValueError, match="train.recompute=true where blocks have kernels: no kernels here"):
        check_graphs(recipe("stage2", graphs=True, recompute=True), torch.device("cuda"), 1)
    with pytest.raises(ValueError, match="train.graphs=true is for one process with a CUDA device"):
        train(plain_stage2, ["train.graphs=true", f"out={tmp_path}/run"], device="cpu")
    assert not (tmp_path / "run").exists()
    assert loop.recipe_fingerprint(recipe("stage2", graphs=True)) == loop.recipe_fingerprint(recipe("stage2"))


# ---- on a GPU


class FromPython(GraphRecorder):
    """Runs every step from Python, with the surroundings that a recording has."""

    def record(self, step):
        return lambda: self.run(step)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "bf16", "loss_chunk": 100}, {"recompute": True}])
@pytest.mark.parametrize("stage", ["stage2", "stage1_t2i"])
def test_graphs_compute_what_python_does(recipe, tmp_path, monkeypatch, log_lines, stage, options):
    """To the bit, dropout and augmentation included, also when a run goes on."""
    cuda = torch.device("cuda")
    reports = {"val_every": 10, "sample_every": 20, "save_every": 20}
    more = {"steps": 40, "ema": 0.9, "warmup": 3, "image_token_noise": 0.2} | ({"mmu_batch": 5} if stage == "stage2" else {})
    base = dataclasses.replace(recipe(stage, **reports, **more, **options), augment=EVERY_CHANGE)
    runs = {name: with_graphs(base, str(tmp_path / name)) for name in ("graphs", "python", "parts")}
    loop.run(make_objective(runs["graphs"], cuda), runs["graphs"], cuda)
    objective = make_objective(runs["parts"], cuda)
    batch, objective.batch = objective.batch, lambda step: batch(step) if step < 30 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        loop.run(objective, runs["parts"], cuda)
    loop.run(make_objective(runs["parts"], cuda), runs["parts"], cuda)
    monkeypatch.setattr(loop, "GraphRecorder", FromPython)
    loop.run(make_objective(runs["python"], cuda), runs["python"], cuda)
    expected = checkpoint.read(tmp_path / "python/checkpoints/step-00000040")
    losses = {line["step"]: line["loss"] for line in log_lines(runs["python"].out)}
    for name in ("graphs", "parts"):
        found = checkpoint.read(tmp_path / name / "checkpoints/step-00000040")
        assert {line["step"]: line["loss"] for line in log_lines(runs[name].out)} == losses
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items()), name


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_no_step_waits_for_the_gpu(recipe):
    cuda = torch.device("cuda")
    r = dataclasses.replace(recipe("stage2", image_token_noise=0.1, mmu_batch=5), augment=EVERY_CHANGE)
    objective = make_objective(r, cuda)
    optimizers = {"model": adamw(trainable(objective.players["model"]).values(), r.train)}
    generator = torch.Generator(cuda)
    for step in range(3):
        parts = objective.parts(step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step compiles and allocates
        try:
            loop.train_step(objective, optimizers, r, parts, step, generator=generator, device=cuda)
        finally:
            torch.cuda.set_sync_debug_mode("default")
