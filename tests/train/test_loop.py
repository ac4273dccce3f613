"""The loop, whatever it trains: batches in order, updates, resuming to the bit, errors."""

import contextlib
import dataclasses
import os
import signal
import weakref

import pytest
import torch
from torch import nn

from omnimamba.train import checkpoint, loop
from omnimamba.train.config import Data, Init, LookalikeTraining, Recipe, Samples, TowerTraining, Train, VQTraining
from omnimamba.train.interrupt import STOP_SIGNALS, Interrupted
from omnimamba.train.run import make_objective

CPU = torch.device("cpu")


class Stopped(Exception):
    """What ends a run from outside."""


class Toy(loop.Objective):
    """Two players that pull at the same number from both sides."""

    def __init__(self):
        self.one, self.two = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for player, weight in ((self.one, 2.0), (self.two, 3.0)):
            nn.init.constant_(player.weight, weight)
        self.players = {"one": self.one, "two": self.two}
        self.seen = []

    def batch(self, step):
        return torch.tensor([[step + 1.0]])

    def num_tokens(self, batch):
        return 1

    def loss(self, player, batch, step, generator):
        self.seen.append((player, step, batch.item(), torch.rand(1).item(), torch.rand(1, generator=generator).item()))
        if player == "two" and step == 0:
            return {}
        return {"loss": self.one(self.two(batch)).sum() if player == "one" else 5 * self.two(batch).sum()}

    def validate(self):
        return {"weight": self.one.weight.item()}

    def sample(self, folder):
        folder.mkdir(parents=True)

    def export(self, folder):
        folder.mkdir(parents=True, exist_ok=True)

    def summary(self):
        return "toy"


def toy_recipe(tmp_path, **train):
    return Recipe(
        "vq", "tiny", Train(**{"steps": 6, "lr": 0.1, "batch": 1, "precision": "fp32", "log_every": 1} | train), out=str(tmp_path / "run")
    )


def test_every_step_has_its_own_batch_and_randomness(tmp_path):
    toy = Toy()
    loop.run(toy, toy_recipe(tmp_path), CPU)
    assert [row[:3] for row in toy.seen] == [(player, step, step + 1) for step in range(6) for player in ("one", "two")]
    assert len({row[3] for row in toy.seen}) == len({row[4] for row in toy.seen}) == 12
    again = Toy()
    loop.run(again, toy_recipe(tmp_path), CPU)
    assert again.seen == toy.seen


def test_a_players_loss_leaves_no_gradient_in_another(tmp_path):
    """The decoder's adversarial loss reaches the discriminator, which must learn from its own loss alone."""
    toy = Toy()
    recipe = toy_recipe(tmp_path, grad_clip=0)
    optimizers = {name: torch.optim.SGD(player.parameters(), lr=0.1) for name, player in toy.players.items()}
    for step in (1, 2):
        before = toy.two.weight.item()
        figures = loop.train_step(toy, optimizers, recipe, [toy.batch(0)], step, generator=torch.Generator(), device=CPU)
        assert toy.two.weight.item() == pytest.approx(before - 0.1 * 5)
        assert figures["two_grad_norm"].item() == pytest.approx(5)


def test_an_objective_is_told_of_each_update(tmp_path):
    toy, updates = Toy(), []
    toy.updated = lambda: updates.append((toy.one.weight.item(), toy.two.weight.item()))
    loop.run(toy, toy_recipe(tmp_path), CPU)
    ones, twos = zip(*updates, strict=True)
    assert len(updates) == 11  # player two pauses in the first step
    assert len(set(ones)) == len(set(twos)) == 6  # twos with that of the start
    assert (ones[-1], twos[-1]) == (toy.one.weight.item(), toy.two.weight.item())


def test_gradients_are_clipped(tmp_path):
    for clip, norm in ((0.5, 0.5), (0.0, 30.0)):
        toy = Toy()
        optimizers, recipe = {"one": torch.optim.SGD(toy.one.parameters(), lr=0.1)}, toy_recipe(tmp_path, grad_clip=clip)
        figures = loop.train_step(toy, optimizers, recipe, [torch.tensor([[10.0]])], 0, generator=torch.Generator(), device=CPU)
        assert figures["grad_norm"].item() == pytest.approx(30)  # as it was
        assert toy.one.weight.item() == pytest.approx(2 - 0.1 * norm)


def test_parts_add_up_and_leave_nothing(tmp_path):
    """What led to a part's loss is free before the next part begins."""
    toy, alive = Toy(), []
    loss = toy.loss

    def watched(*arguments):
        assert all(reference() is None for reference in alive)
        found = loss(*arguments)
        alive.append(weakref.ref(found["loss"]))
        return found

    toy.loss = watched
    optimizers, parts = {"one": torch.optim.SGD(toy.one.parameters(), lr=0.1)}, [torch.tensor([[x]]) for x in (1.0, 2.0, 4.0)]
    figures = loop.train_step(toy, optimizers, toy_recipe(tmp_path, grad_clip=0), parts, 0, generator=torch.Generator(), device=CPU)
    assert len(alive) == 3
    assert figures["loss"].item() == pytest.approx(7 * 6) and figures["grad_norm"].item() == pytest.approx(7 * 3)


def test_reports(tmp_path, log_lines):
    recipe = toy_recipe(tmp_path, steps=5, log_every=2, val_every=2, sample_every=3)
    loop.run(Toy(), recipe, CPU)
    lines = log_lines(recipe.out)
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert {"loss", "grad_norm", "two_loss", "two_grad_norm", "lr", "tokens_per_s"} <= lines[0].keys()
    assert [line["step"] for line in log_lines(recipe.out, "val")] == [2, 4, 5]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["step-00000003", "step-00000005"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_progress_bar(tmp_path, capsys):
    loop.run(Toy(), toy_recipe(tmp_path), CPU, show_progress=True)
    assert "6/6" in capsys.readouterr().out


def test_without_a_bar_reports_are_lines(tmp_path, caplog):
    with caplog.at_level("INFO", "omnimamba.train"):
        loop.run(Toy(), toy_recipe(tmp_path, log_every=4), CPU)
    assert [line.split(":")[0] for line in caplog.messages if line.startswith("step ")] == ["step 4 of 6", "step 6 of 6"]


def test_averages_are_what_is_validated_and_exported(tmp_path, log_lines):
    class Exporting(Toy):
        def export(self, folder):
            self.exported = self.one.weight.item()

    toy, recipe = Exporting(), toy_recipe(tmp_path, ema=0.9, val_every=1, save_every=6)
    loop.run(toy, recipe, CPU)
    tensors = checkpoint.read(tmp_path / "run/checkpoints/step-00000006")
    assert toy.exported == tensors["one/average/weight"].item() == log_lines(recipe.out, "val")[-1]["weight"]
    assert tensors["one/weights/weight"].item() < toy.exported < 2


@pytest.mark.parametrize("log_every", [1, 100])
def test_numbers_that_are_not_finite_end_the_run(tmp_path, log_every):
    class Broken(Toy):
        def batch(self, step):
            return torch.tensor([[float("nan") if step >= 3 else 1.0]])

    recipe = toy_recipe(tmp_path, save_every=1, log_every=log_every)
    with pytest.raises(ValueError, match="step 3: not a finite number in .*'loss': nan.*; lower train.lr or use train.precision=fp32"):
        loop.run(Broken(), recipe, CPU)
    folders = checkpoint.step_folders(tmp_path / "run/checkpoints")
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000003"]  # none holds what is broken


def test_another_recipe_does_not_touch_a_run(tmp_path):
    loop.run(Toy(), toy_recipe(tmp_path, save_every=6), CPU)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ValueError, match="saved by another recipe"):
        loop.run(Toy(), toy_recipe(tmp_path, save_every=6, lr=0.2), CPU)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_finished_run_trains_no_more_and_a_longer_one_goes_on(tmp_path):
    loop.run(Toy(), toy_recipe(tmp_path, save_every=2), CPU)
    toy = Toy()
    loop.run(toy, toy_recipe(tmp_path, save_every=2), CPU)
    assert not toy.seen
    loop.run(toy, toy_recipe(tmp_path, save_every=2, steps=8), CPU)
    assert [row[1] for row in toy.seen] == [6, 6, 7, 7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_ends(tmp_path, number):
    class Signalled(Toy):
        def loss(self, player, batch, step, generator):
            if player == "two" and step == 3:
                os.kill(os.getpid(), number)
            return super().loss(player, batch, step, generator)

    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    toy, recipe = Signalled(), toy_recipe(tmp_path, ema=0.9)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 4; the same command goes on from there") as stop:
        loop.run(toy, recipe, CPU)
    assert stop.value.exit_code == 128 + number
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    rest, whole = Toy(), Toy()
    loop.run(rest, recipe, CPU)
    loop.run(whole, toy_recipe(tmp_path / "whole", ema=0.9), CPU)
    assert toy.seen + rest.seen == whole.seen
    assert torch.equal(rest.one.weight, whole.one.weight) and torch.equal(rest.two.weight, whole.two.weight)


@pytest.mark.parametrize(("is_highest", "at"), [(False, 4), (True, 2)])
def test_the_best_is_kept_and_exported(tmp_path, is_highest, at):
    class Judged(Toy):
        def validate(self):
            return {"score": {1: 3.0, 2: 9.0, 3: 2.0, 4: 1.0, 5: 1.0, 6: 4.0}[self.seen[-1][1] + 1]}

        def export(self, folder):
            folder.mkdir(parents=True)
            (folder / "weight").write_text(str(self.one.weight.item()))

    options = {"ema": 0.5, "val_every": 1, "save_every": 3, "keep_checkpoints": 1, "best": "score"}
    recipe = toy_recipe(tmp_path, best_is="highest" if is_highest else "lowest", **options)
    with stopped_at(objective := Judged(), 5):
        loop.run(objective, recipe, CPU)
    loop.run(Judged(), recipe, CPU)
    folders = checkpoint.step_folders(tmp_path / "run" / "checkpoints")
    assert [folder.name for folder in folders] == [f"step-0000000{at}", "step-00000006"]
    weights = [checkpoint.read(folder)["one/average/weight"].item() for folder in folders]
    assert [float((tmp_path / "run" / name / "weight").read_text()) for name in ("best", "model")] == weights
    with pytest.raises(ValueError, match="train.best='scor': a validation has no such figure; did you mean 'score'"):
        loop.run(Judged(), toy_recipe(tmp_path / "other", **options | {"best": "scor"}), CPU)


def test_fingerprint_ignores_reports_and_the_length_of_the_run():
    recipe = Recipe("vq", "tiny", Train(steps=1, lr=1.0, batch=1))
    fingerprint = loop.recipe_fingerprint(recipe)
    assert fingerprint == loop.recipe_fingerprint(dataclasses.replace(recipe, out="other", samples=Samples(("a",))))
    other = {int: 7, float: 0.5, bool: True, str: "other", tuple: ("caption",), dict: {"caption": 0.5}}
    ignored = set()
    valid = {"precision": "fp32", "images": "folder", "text_width": 64, "best_is": "highest", "parallel": "fsdp", "tracker": "wandb"}
    valid |= {"repeat": {"name": 2}, "blend": 0.25}
    for section, cls in (
        ("train", Train),
        ("init", Init),
        ("data", Data),
        ("vq", VQTraining),
        ("tower", TowerTraining),
        ("lookalikes", LookalikeTraining),
    ):
        for field in dataclasses.fields(cls):
            if field.name in ("max_broken", "streaming", "graphs", "keep_start"):
                continue  # not for every recipe
            part = getattr(recipe, section)
            value = valid.get(field.name) or other[type(getattr(part, field.name))]
            value = not getattr(part, field.name) if value is True else value
            value = {"name": "caption"} if (section, field.name) == ("lookalikes", "labels") else value
            more = {
                "collage_labels": {"collage_share": 0.1},
                "collage_share": {"collage_labels": ("caption",)},
                "mmu": {"t2i": "x"},
                "t2i": {"mmu": "x"},
                "best": {"val_every": 1},
                "adapter": {"model": "x"},
                "versions": {"labels": {"name": "caption"}} if section == "lookalikes" else {},
                "labels": {"versions": 2} if section == "lookalikes" else {},
            }.get(field.name, {})
            values = dataclasses.asdict(part) | {field.name: value} | more
            if loop.recipe_fingerprint(dataclasses.replace(recipe, **{section: cls(**values)})) == fingerprint:
                ignored.add(field.name)
    reports = {"steps", "log_every", "val_every", "sample_every", "save_every", "keep_checkpoints", "best", "best_is", "tracker"}
    placement = {"accumulate", "recompute", "loss_chunk", "parallel"}
    assert ignored == {*reports, *placement, "in_memory", "num_threads", "val_split"}


def test_batches_are_made_ahead():
    made = []

    class Source:
        def parts(self, step):
            made.append(step)
            return step

    batches = loop.prefetched(Source(), 3, 20)
    assert next(batches) == 3
    batches.close()
    assert made[:4] == [3, 4, 5, 6] and len(made) <= 5
    assert list(loop.prefetched(Source(), 3, 5)) == [3, 4]
    assert list(loop.prefetched(Source(), 5, 5)) == []


# ---- every kind


@contextlib.contextmanager
def stopped_at(objective, step):
    """The objective's data ends at a step, as by a crash."""
    batch = objective.batch

    def limited(i):
        if i >= step:
            raise Stopped
        return batch(i)

    objective.batch = limited
    with pytest.raises(Stopped):
        yield


KINDS = [(kind, ema) for kind in ("vq", "vq_adversarial", "tower", "stage1_mmu", "stage1_t2i", "stage2") for ema in (0.0, 0.9)]


@pytest.mark.parametrize(("kind", "ema"), KINDS)
def test_resumed_run_is_the_same_to_the_bit(recipe, kind, ema, tmp_path, folder_tensors):
    whole = recipe(kind, steps=6, ema=ema, save_every=6, warmup=2)
    loop.run(make_objective(whole, CPU), whole, CPU)

    parts = dataclasses.replace(
        whole, out=str(tmp_path / "parts"), train=dataclasses.replace(whole.train, save_every=3, val_every=2, sample_every=3)
    )
    objective = make_objective(parts, CPU)
    with stopped_at(objective, 4):
        loop.run(objective, parts, CPU)
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["step-00000003"]
    loop.run(make_objective(parts, CPU), parts, CPU)

    for folder, tensors in (("checkpoints/step-00000006", checkpoint.read), ("model", folder_tensors)):
        one, other = tensors(tmp_path / "run" / folder), tensors(tmp_path / "parts" / folder)
        assert one.keys() == other.keys() and one
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different, different[:5]


def test_statistics_of_batchnorm_are_resumed(tmp_path):
    class Normed(Toy):
        def __init__(self):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
            self.players = {"net": self.net}

        def batch(self, step):
            return torch.tensor([[step + 1.0], [0.5], [2.0]])

        def loss(self, player, batch, step, generator):
            return {"loss": self.net(batch).square().mean()}

        def validate(self):
            return {}

    def train(out, **changes):
        toy = Normed()
        loop.run(toy, toy_recipe(tmp_path / out, ema=0.9, **changes), CPU)
        return toy.net.state_dict()

    whole = train("whole")
    objective = Normed()
    with stopped_at(objective, 4):
        loop.run(objective, toy_recipe(tmp_path / "parts", ema=0.9, save_every=3), CPU)
    parts = train("parts", save_every=3)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["1.num_batches_tracked"] == 6 and whole["1.running_mean"].abs().max() > 0
