"""Times training by the shipped recipes, on made-up data and random weights: with and without CUDA graphs, less memory for more time.

    PYTHONPATH=src python3 benchmarks/train.py --json out.json
    PYTHONPATH=src python3 benchmarks/train.py --profile --cases "1.3b stage 2" --variants chunk

The training loop itself runs, batches, augmentation and frozen encoders included; the figures are those of its log, without the first
interval, in which kernels are compiled and graphs recorded. First all variants train a tiny model in fp32: if their losses differ,
nothing is timed, and the exit code is 1. MFU: products and convolutions of a step that need no second pass over a block, as PyTorch
counts them (those in our kernels are left out), over the rate of a large bf16 product in the same run. Needs the extra `train` without
pyarrow, and a CUDA device. With --profile the kernels of a step by their time, and what a step keeps for its backward pass by shape.
The last line on stdout is JSON.
"""

import argparse
import dataclasses
import functools
import json
import logging
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import Memory, kernels, milliseconds
from _report import add_json_option, begin, finish
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from omnimamba.config import OmniMambaConfig, Task
from omnimamba.data.prepare import train_text_tokenizer
from omnimamba.model.vision import VisionTowers
from omnimamba.model.vq import VQModel
from omnimamba.train import loop
from omnimamba.train.config import Recipe, read_recipe
from omnimamba.train.metrics import LOG_FILE, read_log
from omnimamba.train.omnimamba import OmniMambaObjective, TaskLosses
from omnimamba.train.optim import adamw, trainable

RECIPES = Path(__file__).parents[1] / "recipes"
NUM_IMAGES = 4
PROFILED_STEPS, PROFILE_LINES = 3, 40
CHECKED_STEPS, TOLERANCE = 8, 1e-4  # of the losses, relative
TOKENIZER_SIZE = 257  # end of text and the bytes


@dataclasses.dataclass(frozen=True)
class Case:
    recipe: str
    question: int = 0
    answer: int = 0
    """Characters, which are tokens, of each conversation; 0: the recipe has none."""
    overrides: tuple[str, ...] = ()


CASES = {
    "1.3b stage 2": Case("1.3b/3-stage2.toml", 110, 110),
    "1.3b stage 1 T2I": Case("1.3b/2-stage1-t2i.toml", overrides=("train.t2i_batch=90",)),
    "nano stage 2": Case("nano/6-stage2.toml", 8, 3),
    "tiny": Case("nano/6-stage2.toml", 8, 3, ("preset=tiny", "train.mmu_batch=6", "train.t2i_batch=4", "train.precision=fp32")),
}
CHUNK = "train.loss_chunk=4096"
VARIANTS = {
    "python": (),
    "graphs": ("train.graphs=true",),
    "graphs, chunk": ("train.graphs=true", CHUNK),
    "chunk": (CHUNK,),
    "recompute": ("train.recompute=true",),
    "recompute, chunk": ("train.recompute=true", CHUNK),
    "graphs, recompute, chunk": ("train.graphs=true", "train.recompute=true", CHUNK),
}


class TimedObjective(OmniMambaObjective):
    def export(self, folder: Path) -> None:
        """Nothing: the model is worth nothing."""


def write_data(folder: Path, config: OmniMambaConfig, case: Case) -> None:
    """Images of noise with captions and conversations, encoders of random weights, and a tokenizer of bytes."""
    folder.mkdir(exist_ok=True)
    train_text_tokenizer((), TOKENIZER_SIZE).save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    if case.answer:
        save_file(VisionTowers(config.towers).state_dict(), folder / "vision.safetensors")
    save_file(VQModel(config.vq).state_dict(), folder / "vq.safetensors")
    size, rng = max(tower.image_size for tower in config.towers.values()), np.random.default_rng(0)
    talk = [{"from": "human", "value": "q" * case.question}, {"from": "gpt", "value": "a" * case.answer}]
    captions, conversations = [], []
    for i in range(NUM_IMAGES):
        Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        captions.append({"image": f"{i}.png", "captions": ["a caption"]})
        conversations.append({"image": f"{i}.png", "conversations": talk, "type": "name"})
    for name, rows in (("captions", captions), ("conversations", conversations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def made_up(case: Case, variant: str, folder: Path, steps: int, log_every: int) -> Recipe:
    """The case's recipe on the data of `write_data`."""
    files = [f"init.tokenizer={folder}/tokenizer.json", f"init.vq={folder}/vq.safetensors"]
    files += [f"init.vision={folder}/vision.safetensors"] if case.answer else []
    start = ["init.backbone=", "init.mmu=", "init.t2i=", "init.shared=", f"model.base_vocab_size={TOKENIZER_SIZE}", "model.eos_id=0"]
    data = [f"data.folder={folder}", "data.images=folder", "data.in_memory=true", "data.val_split=", "data.joined=0.0", "data.versions=1"]
    data += ["data.repeat={}", "lookalikes.versions=0", "lookalikes.labels={}"]
    data += ["data.captions=captions.jsonl", "data.conversations=conversations.jsonl"]
    run = [f"train.steps={steps}", f"train.log_every={log_every}", f"out={folder}/{variant}"]
    run += [f"train.{name}_every=0" for name in ("val", "sample", "save")]
    return read_recipe(RECIPES / case.recipe, [*files, *start, *data, *run, *case.overrides, *VARIANTS[variant]])


def step_flop(objective: TimedObjective, recipe: Recipe) -> float:
    """Of the products and convolutions of a step: those of one sample of each task, forward and backward, times their number."""
    train, losses = recipe.train, objective.losses
    objective.losses = TaskLosses(objective.model, dataclasses.replace(train, recompute=False, loss_chunk=0))
    flop = 0
    for task, num in ((Task.MMU, train.mmu_batch), (Task.T2I, train.t2i_batch)):
        if num:
            batch = objective.batch(0)[task].split(num)[0]
            with FlopCounterMode(display=False) as counter, torch.autocast(objective.device.type, torch.bfloat16):
                generator = torch.Generator(objective.device)
                objective.loss("model", {task: batch}, 0, generator)["loss"].backward()
            flop += num * counter.get_total_flops()
    objective.model.zero_grad()
    objective.losses = losses
    return flop


def timed(recipe: Recipe, product_rate: float, device: str) -> dict[str, float | None]:
    memory = Memory(device)
    objective = TimedObjective(recipe, torch.device(device))
    flop, num_tokens = step_flop(objective, recipe), objective.num_tokens(objective.batch(0))
    memory.restart()
    loop.run(objective, recipe, objective.device)
    lines = read_log(Path(recipe.out) / LOG_FILE)
    tokens_per_s = statistics.median(line["tokens_per_s"] for line in lines[1:])
    return {
        "steps/s": tokens_per_s / num_tokens,
        "tokens/s": tokens_per_s,
        "MFU": flop * tokens_per_s / num_tokens / product_rate,
        "peak GB": memory.peak(),
        "reserved GB": torch.cuda.max_memory_reserved() / 1e9 if device == "cuda" else None,
    }


def profiled(recipe: Recipe, device: str, steps: int) -> dict[str, list[dict[str, Any]]]:
    """The kernels of a step by their time, and the tensors that one keeps for its backward pass, by shape; parameters are left out."""
    objective = TimedObjective(recipe, torch.device(device))
    optimizers = {"model": adamw(trainable(objective.model).values(), recipe.train)}
    generator, batch = torch.Generator(device), objective.batch(0)
    step = functools.partial(loop.train_step, objective, optimizers, recipe, batch, 0, generator=generator, device=objective.device)
    step()
    kept: dict[int, Tensor] = {}  # by address: a tensor may be kept by several operators, or in parts
    parameters = {p.data_ptr() for p in objective.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if base.untyped_storage().data_ptr() not in parameters:
            kept[base.untyped_storage().data_ptr()] = base.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast(device, torch.bfloat16, enabled=recipe.train.precision == "bf16"):
            loss = objective.loss("model", batch, 0, generator)["loss"]
    size, number = Counter[str](), Counter[str]()
    for tensor in kept.values():
        name = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        size[name] += tensor.untyped_storage().nbytes()
        number[name] += 1
    del loss
    kept.clear()
    step()
    return {
        "kernels": [kernel._asdict() for kernel in kernels(step, device, steps)],
        "kept": [{"GB": num_bytes / 1e9, "tensors": number[name], "name": name} for name, num_bytes in size.most_common()],
    }


def product_rate(device: str) -> float:
    """FLOP/s of a large bf16 product."""
    size = 8192 if device == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, 20, device) * 1e3


def wrong_losses(variants: list[str], device: str) -> list[str]:
    """Which variants train the tiny model otherwise than Python does."""
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), made_up(CASES["tiny"], "python", Path(folder), 1, 1).config, CASES["tiny"])
        for variant in dict.fromkeys(["python", *variants]):
            recipe = made_up(CASES["tiny"], variant, Path(folder), CHECKED_STEPS, 1)
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, loss_chunk=min(recipe.train.loss_chunk, 50)))
            loop.run(TimedObjective(recipe, torch.device(device)), recipe, torch.device(device))
            losses[variant] = [line["loss"] for line in read_log(Path(recipe.out) / LOG_FILE)]
    errors = {name: max(abs(a / b - 1) for a, b in zip(found, losses["python"], strict=True)) for name, found in losses.items()}
    return [f"{name}: losses off by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]


def main() -> int:
    parser = argparse.ArgumentParser(description="Training by the shipped recipes, random weights and data.")
    add_json_option(parser)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES)[:3], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="VARIANT", help="; ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=10, help="of an interval; the figures are the median of three")
    parser.add_argument("--profile", action="store_true", help="print where time and memory of a step go instead")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, without graphs, as a test of this script")
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/train.py times a GPU: it needs a CUDA device and found none", file=sys.stderr)
        return 2
    logging.getLogger("omnimamba.train").setLevel(logging.ERROR)
    variants = arguments.variants or [name for name in VARIANTS if device == "cuda" or "graphs" not in name]
    if failures := wrong_losses(variants, device):
        print("nothing is timed, results are wrong:", *failures, sep="\n", file=sys.stderr)
        return 1
    rate = product_rate(device)
    report: dict[str, Any] = begin(device, variants=variants)
    report |= {"product TFLOP/s": rate / 1e12, "cases": {}}
    print(f"all variants have the losses of Python; bf16 product {rate / 1e12:.3g} TFLOP/s", flush=True)
    for name in arguments.cases:
        case, report["cases"][name] = CASES[name], {}
        with tempfile.TemporaryDirectory() as folder:
            write_data(Path(folder), made_up(case, "python", Path(folder), 1, 1).config, case)
            for variant in variants:
                recipe = made_up(case, variant, Path(folder), 4 * arguments.steps, arguments.steps)
                if arguments.profile:
                    report["cases"][name][variant] = found = profiled(recipe, device, PROFILED_STEPS)
                    print(f"{name}, {variant}, of each step:", *profile_lines(found), sep="\n", flush=True)
                    continue
                try:
                    figures: dict[str, float | None] | str = timed(recipe, rate, device)
                except torch.cuda.OutOfMemoryError:
                    figures = "out of memory"
                report["cases"][name][variant] = figures
                print(f"{name:18} {variant:18} {line(figures)}", flush=True)
    finish(report, arguments.json)
    return 0


def line(figures: dict[str, float | None] | str) -> str:
    if isinstance(figures, str):
        return figures
    return "   ".join(f"{value:.3g} {name}" for name, value in figures.items() if value is not None)


def profile_lines(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    ran, kept = found["kernels"], found["kept"]
    lines = [f"{sum(e['ms'] for e in ran):8.2f} ms in {sum(e['count'] for e in ran):.0f} kernels"]
    lines += [f"{e['ms']:8.2f} ms {e['count']:7.1f} x {e['ms'] / e['count'] * 1e3:8.1f} us  {e['name'][:150]}" for e in ran[:PROFILE_LINES]]
    lines += [f"{sum(e['GB'] for e in kept):8.2f} GB kept for the backward pass, weights left out"]
    return lines + [f"{e['GB']:8.2f} GB {e['tensors']:5} x {e['name']}" for e in kept[:PROFILE_LINES]]


if __name__ == "__main__":
    sys.exit(main())
