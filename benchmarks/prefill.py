"""Times reading prompts at the shape of the 1.3B model, random weights, bf16: one pass, and long sequences in pieces.

    PYTHONPATH=src python3 benchmarks/prefill.py --json out.json
    PYTHONPATH=src python3 benchmarks/prefill.py --profile --cases "image and question" "in one piece"

Needs a CUDA device and torch; with Triton the kernels of the scan, the convolution and the gated norm run. Captured passes are first
compared with passes launched from Python, in fp32 and few layers: rows of unequal lengths, a bucket that they do not fill, a second piece
that goes on from the first. If they differ nothing is timed, and the exit code is 1. TFLOP/s counts the products with in_proj and out_proj
only; memory is the peak of the tensors of passes launched from Python. --profile adds what each kernel of a case took on the device,
kernels of one name apart by their grids. The last line on stdout is JSON.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _measure import Memory, kernels, milliseconds
from _model import random_model
from _report import add_json_option, begin, finish, lacks
from torch import Tensor

from omnimamba.config import PRESETS, OmniMambaConfig, Task, preset
from omnimamba.engine.prefill import PrefillGraphs
from omnimamba.engine.runner import Runner
from omnimamba.model.omnimamba import OmniMambaModel

TOLERANCE = 1e-5  # rms(error) / rms(expected) in fp32
CHECKED_LAYERS = 3
PIECE = 4096  # positions that the engine reads at once unless told otherwise


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    task: Task
    rows: int
    length: int
    piece: int = PIECE
    """Positions of one pass; passes of more than PIECE are not captured."""


CASES = (
    Case("caption", Task.T2I, 1, 73),
    Case("guided caption", Task.T2I, 2, 73),
    Case("8 captions", Task.T2I, 8, 73),
    Case("image and question", Task.MMU, 1, 760),
    Case("4 images and questions", Task.MMU, 4, 760),
    Case("one piece", Task.MMU, 1, PIECE),
    Case("long sequence", Task.MMU, 1, 16 * PIECE),
    Case("in pieces of 16,384", Task.MMU, 1, 16 * PIECE, 4 * PIECE),
    Case("in one piece", Task.MMU, 1, 16 * PIECE, 16 * PIECE),
)


def embeddings(model: OmniMambaModel, num: int) -> Tensor:
    return torch.randn(num, model.config.backbone.d_model, device=model.device, dtype=model.dtype) * 0.02


def wrong_results(config: OmniMambaConfig, device: str) -> Iterator[str]:
    """What differs between passes in buckets, the first from Python and the later captured, and plain passes."""
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, n_layer=CHECKED_LAYERS))
    model = random_model(config, torch.float32, device)
    runner, expected_runner = Runner(model, 6), Runner(model, 6)
    runner.prefill_graphs = PrefillGraphs(model, runner.state, use_graphs=device == "cuda")
    expected_runner.prefill_graphs = None
    for lengths in ((70, 65, 73), (90, 72, 66), (96, 81, 65), (81,), (96,), (66,)):  # two buckets, three passes each
        slots, chunks = [4, 0, 2][: len(lengths)], [embeddings(model, length) for length in lengths]
        logits = runner.prefill(slots, chunks, Task.T2I)
        expected = expected_runner.prefill(slots, chunks, Task.T2I)
        pairs = {"logits": (logits, expected)}
        pairs |= {part: (getattr(runner.state, part), getattr(expected_runner.state, part)) for part in ("ssm", "conv")}
        for name, (found, wanted) in pairs.items():
            error = ((found - wanted).norm() / wanted.norm()).item()
            if not error <= TOLERANCE:
                yield f"rows of {lengths} positions: {name} off by {error:.1e}"
        if not torch.equal(runner.state.position, expected_runner.state.position):
            yield f"rows of {lengths} positions: positions {runner.state.position.tolist()}"


def reading(runner: Runner, case: Case) -> Callable[[], None]:
    slots, rows = list(range(case.rows)), [embeddings(runner.model, case.length) for _ in range(case.rows)]

    def read() -> None:
        runner.reset(slots)
        for first in range(0, case.length, case.piece):
            runner.prefill(slots, [row[first : first + case.piece] for row in rows], case.task)

    return read


def timed(runner: Runner, case: Case, repeats: int, device: str) -> dict[str, Any]:
    model, read = runner.model, reading(runner, case)
    graphs = runner.prefill_graphs
    ms = milliseconds(read, repeats, device)
    runner.prefill_graphs = None
    memory = Memory(device)
    memory.restart()
    figures = {"ms": ms, "ms from Python": milliseconds(read, repeats, device), "peak GB": memory.peak()}
    runner.prefill_graphs = graphs
    backbone = model.config.backbone
    num_tokens = case.rows * case.length
    flop = 2 * num_tokens * backbone.n_layer * backbone.d_model * (backbone.d_in_proj + backbone.d_inner)
    return figures | {"tokens/s": num_tokens / ms * 1e3, "TFLOP/s": flop / ms / 1e9}


def main() -> int:
    parser = argparse.ArgumentParser(description="Reading prompts, random weights.")
    add_json_option(parser)
    parser.add_argument("--preset", choices=list(PRESETS), default="1.3b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument("--profile", action="store_true", help="also what each kernel took")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, as a test of this script")
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu else "cuda"
    if lacks(device):
        return 2
    config = preset(arguments.preset)
    failures = list(wrong_results(config, device))
    if failures:
        print("nothing is timed, results are wrong:", *failures, sep="\n", file=sys.stderr)
        return 1
    report = begin(device, preset=arguments.preset)
    report["cases"] = {}
    print("passes in buckets equal plain passes", flush=True)
    runner = Runner(random_model(config, torch.bfloat16, device), 8)
    for case in CASES:
        if arguments.cases and case.name not in arguments.cases:
            continue
        figures = report["cases"][case.name] = timed(runner, case, arguments.repeats, device)
        print(
            f"{case.name:24} {case.rows} x {case.length:6} positions {figures['ms']:8.2f} ms "
            f"({figures['ms from Python']:8.2f} from Python) {figures['tokens/s']:9.0f} tokens/s {figures['TFLOP/s']:5.0f} TFLOP/s"
            + (f" {figures['peak GB']:6.2f} GB" if figures["peak GB"] is not None else ""),
            flush=True,
        )
        if arguments.profile:
            found = kernels(reading(runner, case), device)
            figures["kernels"] = [kernel._asdict() for kernel in found]
            print(f"  all kernels {sum(kernel.count for kernel in found):6.0f} x {sum(kernel.ms for kernel in found):9.3f} ms")
            print(*(f"  {kernel.ms:9.3f} ms {kernel.count:6.0f} x {kernel.name}" for kernel in found), sep="\n", flush=True)
    finish(report, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
