"""Times training by the shipped recipes, on made-up data and random weights: with and without CUDA graphs, less memory for more time.

    PYTHONPATH=src python3 benchmarks/train.py --json out.json
    PYTHONPATH=src python3 benchmarks/train.py --profile --cases "1.3b stage 2" --variants chunk
    PYTHONPATH=src torchrun --nproc-per-node 2 benchmarks/train.py --cases "1.3b stage 1 T2I"

The training loop itself runs, batches, augmentation and frozen encoders included; the figures are those of its log, without the first
interval, in which kernels are compiled and graphs recorded. First all variants train a tiny model in fp32: if their losses differ,
nothing is timed, and the exit code is 1. Under torchrun the variants are ways of spreading a step over its processes, a GPU each; their
losses have to be those of one process alone, and memory is that of the first GPU. MFU: products and convolutions of a step that need no
second pass over a block, as PyTorch counts them (those in our kernels are left out), over the rate of a large bf16 product in the same
run. Needs the extra `train` without pyarrow, and a CUDA device. With --profile the kernels of a step by their time, and what a step keeps
for its backward pass by shape. The last line on stdout is JSON.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
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
from omnimamba.train.parallel import ALONE, Processes, joined_processes

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
    parts: int = 2
    """Of a step in the variants with parts: for 1.3B as few as fit 40 GB."""


CASES = {
    "1.3b stage 2": Case("1.3b/3-stage2.toml", 110, 110, parts=4),
    "1.3b stage 2, 4 MMU": Case("1.3b/3-stage2.toml", 110, 110, ("train.mmu_batch=4",), 4),
    "1.3b stage 1 T2I": Case("1.3b/2-stage1-t2i.toml", overrides=("train.t2i_batch=90",)),
    "nano stage 2": Case("nano/6-stage2.toml", 8, 3),
    "tiny": Case("nano/6-stage2.toml", 8, 3, ("preset=tiny", "train.mmu_batch=6", "train.t2i_batch=6", "train.precision=fp32")),
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
PARTS = {
    "parts, chunk": (CHUNK,),
    "graphs, parts, chunk": ("train.graphs=true", CHUNK),
}
"""A batch in the case's parts, one after the other."""
VARIANTS |= PARTS
SPREAD = {
    "ddp, chunk": ("train.parallel=ddp", CHUNK),
    "fsdp, chunk": ("train.parallel=fsdp", CHUNK),
    "fsdp, recompute, chunk": ("train.parallel=fsdp", "train.recompute=true", CHUNK),
}
"""Variants for several processes."""
LEARNS_FAST = ("train.warmup=0", "train.lr=3e-3")
"""So that losses show whether a step works on the weights that the one before it left."""
NOT_RANDOM = ("model.lora.dropout=0.0", "train.image_token_noise=0.0", "augment={}")
"""For losses of several processes, or parts, that are to be those of one: each draws noise of its own."""


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
    run += [f"train.accumulate={case.parts}"] if variant in PARTS else []
    return read_recipe(RECIPES / case.recipe, [*files, *start, *data, *run, *case.overrides, *(VARIANTS | SPREAD)[variant]])


def addmm_flop(_: torch.Size, a: torch.Size, b: torch.Size, **__: object) -> int:
    """Of a product that is added in place; PyTorch's counter knows it by its other name only."""
    return 2 * a.numel() * b[-1]


def step_size(recipe: Recipe, device: torch.device) -> tuple[float, int]:
    """FLOP and tokens of a step. FLOP are those of one sample of each task, forward and backward, times their number."""
    train, objective = recipe.train, TimedObjective(recipe, device)
    objective.losses = TaskLosses(objective.model, dataclasses.replace(train, recompute=False, loss_chunk=0))
    flop = 0
    for task, num in ((Task.MMU, train.mmu_batch), (Task.T2I, train.t2i_batch)):
        if num:
            batch = objective.batch(0)[task].split(num)[0]
            counted = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop})
            with counted, torch.autocast(objective.device.type, torch.bfloat16):
                generator = torch.Generator(objective.device)
                objective.loss("model", {task: batch}, 0, generator)["loss"].backward()
            flop += num * counted.get_total_flops()
    return flop, objective.num_tokens(objective.batch(0))


def timed(
    recipe: Recipe, flop: float, num_tokens: int, product_rate: float, device: torch.device, processes: Processes
) -> dict[str, float | None] | None:
    """None on all processes but the first."""
    memory = Memory(device.type)
    objective = TimedObjective(recipe, device, processes)
    memory.restart()
    loop.run(objective, recipe, device, processes=processes)
    if not processes.is_main:
        return None
    lines = read_log(Path(recipe.out) / LOG_FILE)
    tokens_per_s = statistics.median(line["tokens_per_s"] for line in lines[1:])
    return {
        "steps/s": tokens_per_s / num_tokens,
        "tokens/s": tokens_per_s,
        "MFU": flop * tokens_per_s / num_tokens / product_rate / processes.size,
        "peak GB": memory.peak(),
        "reserved GB": torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else None,
    }


def profiled(recipe: Recipe, device: str, steps: int) -> dict[str, list[dict[str, Any]]]:
    """The kernels of a step by their time, and the tensors that one keeps for its backward pass, by shape; parameters are left out."""
    objective = TimedObjective(recipe, torch.device(device))
    optimizers = {"model": adamw(trainable(objective.model).values(), recipe.train)}
    generator, batch = torch.Generator(device), objective.batch(0)
    step = functools.partial(loop.train_step, objective, optimizers, recipe, [batch], 0, generator=generator, device=objective.device)
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


@contextlib.contextmanager
def data_of(case: Case, processes: Processes) -> Iterator[Path]:
    """A folder with the case's data, which the first process makes and removes."""
    names: list[Any] = [tempfile.mkdtemp() if processes.is_main else None]
    if processes.is_main:
        write_data(Path(names[0]), made_up(case, "python", Path(names[0]), 1, 1).config, case)
    if processes.size > 1:
        dist.broadcast_object_list(names, group=processes.control)
    try:
        yield Path(names[0])
        processes.wait()
    finally:
        if processes.is_main:
            shutil.rmtree(names[0])


def wrong_losses(variants: list[str], device: torch.device, processes: Processes) -> list[str]:
    """Which variants train the tiny model otherwise than Python does on one process, in one part."""
    errors: dict[str, float] = {}
    with data_of(CASES["tiny"], processes) as folder:
        for overrides in ((), NOT_RANDOM):
            case = dataclasses.replace(CASES["tiny"], overrides=(*CASES["tiny"].overrides, *LEARNS_FAST, *overrides))
            compared = [name for name in variants if (name in SPREAD or name in PARTS) == bool(overrides)]
            losses: dict[str, list[float]] = {}
            for name in dict.fromkeys(["python", *compared]) if compared else ():
                recipe = made_up(case, name, folder, CHECKED_STEPS, 1)
                recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, loss_chunk=min(recipe.train.loss_chunk, 50)))
                recipe = dataclasses.replace(recipe, out=f"{recipe.out}, {len(overrides)}")
                runs = processes if name in SPREAD else ALONE
                if runs.size > 1 or processes.is_main:
                    loop.run(TimedObjective(recipe, device, runs), recipe, device, processes=runs)
                processes.wait()
                losses[name] = [line["loss"] for line in read_log(Path(recipe.out) / LOG_FILE)]
            errors |= {name: max(abs(a / b - 1) for a, b in zip(found, losses["python"], strict=True)) for name, found in losses.items()}
    return [f"{name}: losses off by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]


def main() -> int:
    parser = argparse.ArgumentParser(description="Training by the shipped recipes, random weights and data.")
    add_json_option(parser)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES)[:3], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, *SPREAD], metavar="VARIANT", help="; ".join([*VARIANTS, *SPREAD]))
    parser.add_argument("--steps", type=int, default=10, help="of an interval; the figures are the median of three")
    parser.add_argument("--profile", action="store_true", help="print where time and memory of a step go instead")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, without graphs, as a test of this script")
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/train.py times a GPU: it needs a CUDA device and found none", file=sys.stderr)
        return 2
    logging.getLogger("omnimamba.train").setLevel(logging.ERROR)
    with joined_processes(torch.device(device)) as (processes, where):
        return measure(arguments, where, processes)


def measure(arguments: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    variants = arguments.variants or [name for name in VARIANTS if device.type == "cuda" or "graphs" not in name]
    if processes.size > 1:
        variants = arguments.variants or list(SPREAD)
        if arguments.profile or not set(variants) <= set(SPREAD):
            print(f"several processes time {', '.join(SPREAD)}, without --profile; not {', '.join(variants)}", file=sys.stderr)
            return 2
    if failures := wrong_losses(variants, device, processes):
        print("nothing is timed, results are wrong:", *failures, sep="\n", file=sys.stderr)
        return 1
    say = functools.partial(print, flush=True) if processes.is_main else lambda *_, **__: None
    rate = product_rate(device.type)
    with contextlib.nullcontext() if processes.is_main else contextlib.redirect_stdout(None):
        report: dict[str, Any] = begin(device.type, variants=variants, processes=processes.size)
    report |= {"product TFLOP/s": rate / 1e12, "cases": {}}
    say(f"all variants have the losses of Python; bf16 product {rate / 1e12:.3g} TFLOP/s")
    for name in arguments.cases:
        case, report["cases"][name] = CASES[name], {}
        with data_of(case, processes) as folder:
            size = None if arguments.profile else step_size(made_up(case, "python", folder, 1, 1), device)
            for variant in variants:
                recipe = made_up(case, variant, folder, 4 * arguments.steps, arguments.steps)
                if size is None:
                    report["cases"][name][variant] = found = profiled(recipe, device.type, PROFILED_STEPS)
                    say(f"{name}, {variant}, of each step:", *profile_lines(found), sep="\n")
                    continue
                try:
                    figures = timed(recipe, *size, rate, device, processes)
                except torch.cuda.OutOfMemoryError:
                    if processes.size > 1:
                        raise  # the others wait for this one
                    figures = "out of memory"
                if figures is not None:
                    report["cases"][name][variant] = figures
                    say(f"{name:18} {variant:18} {line(figures)}")
    if processes.is_main:
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
