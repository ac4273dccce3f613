"""Times decoding with the fused kernels at the shape of the 1.3B model, random weights: from a token to the next sampled token.

    PYTHONPATH=src python3 benchmarks/decode.py --json out.json

Needs a CUDA device, torch and triton. A step of few layers is first compared with the plain PyTorch step (logits, states, sampled tokens;
fp32, bf16 and quantised; several slots out of order, padding rows, both tasks in one batch, poisoned buffers), one and two rows by the
kernel of a whole step and by the vector kernels, more by matrix products, on Hopper by its own kernels, and the engine with the plain
engine. What is off is not timed, and the exit code is 1. Bytes per step count each weight and state once read, and each state once
written; their rate is set beside the read bandwidth measured in the same run. Then whole requests run through the engine, prompts
included. `--sweep` also tries other launch choices, `--parts` times each kernel by itself. The last line on stdout is JSON.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _decode_checks import differences, rows_of
from _measure import milliseconds, read_bandwidth
from _model import image_request, random_model, step_bytes, text_request, timed_request
from _report import add_json_option, begin, finish, lacks
from torch import Tensor

from omnimamba.config import PRESETS, OmniMambaConfig, Task, preset
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.engine.runner import DecodeSample, Runner
from omnimamba.engine.sampler import stream_key
from omnimamba.model.omnimamba import OmniMambaModel

STEPS = 16  # of a block
PARTS_BATCHES = (1, 64)
# what --sweep tries: (rows of a program, warps) of in_proj and out_proj, int8, one row; (rows, columns, warps, stages) of in_proj, 64 rows
IN_TILES = ((8, 4), (16, 4), (16, 8), (32, 8))
OUT_TILES = ((4, 4), (8, 4), (8, 8), (16, 16))
MATRIX_TILES = ((64, 64, 4, 6), (64, 64, 4, 8), (64, 128, 4, 4), (32, 64, 4, 8), (128, 64, 8, 6))


@dataclass(frozen=True)
class Case:
    """A batch that is timed."""

    name: str
    task: Task
    rows: int
    ssm_dtype: torch.dtype = torch.float32
    is_guided: bool = False
    params: SamplingParams = SamplingParams(seed=0)
    scheme: str | None = None
    """Quantisation of the weights."""


CASES = (
    Case("T2I", Task.T2I, 1),
    Case("T2I, bf16 state", Task.T2I, 1, torch.bfloat16),
    Case("T2I, top-k 100", Task.T2I, 1, params=SamplingParams(seed=0, top_k=100)),
    Case("T2I, guided", Task.T2I, 1, is_guided=True, params=SamplingParams(seed=0, guidance_scale=3.0)),
    Case("text", Task.MMU, 1),
    Case("T2I x4", Task.T2I, 4),
    Case("T2I x64", Task.T2I, 64),
    Case("T2I x64, bf16 state", Task.T2I, 64, torch.bfloat16),
    Case("T2I x256", Task.T2I, 256),
    Case("T2I x256, bf16 state", Task.T2I, 256, torch.bfloat16),
    Case("text x64", Task.MMU, 64),
    Case("T2I, int8", Task.T2I, 1, scheme="int8"),
    Case("T2I, int8, bf16 state", Task.T2I, 1, torch.bfloat16, scheme="int8"),
    Case("text, int8", Task.MMU, 1, scheme="int8"),
    Case("T2I, fp8", Task.T2I, 1, scheme="fp8"),
)


def samples_of(case: Case, first_slot: int = 0) -> list[Any]:
    per_sample = 1 + case.is_guided
    return [
        DecodeSample(
            (first_slot + per_sample * i, first_slot + per_sample * i + case.is_guided),
            case.task,
            7 + i,
            case.params,
            stream_key(0, i),
            0,
            2**30,
        )
        for i in range(case.rows)
    ]


# ---- time


def timed(
    model: OmniMambaModel, case: Case, image_table: Tensor, bandwidth: float, repeats: int, device: str, failures: dict[str, list[str]]
) -> dict[str, float]:
    """Time of a case's step by itself, and of a block as the engine runs it, host included. RuntimeError if its path is wrong."""
    from omnimamba.engine.decoder import DecodeOptions, FusedDecoder, is_filtering

    runner = Runner(model, case.rows * (1 + case.is_guided), ssm_dtype=case.ssm_dtype)
    decoder = FusedDecoder(model, runner.state, image_table, options=DecodeOptions(max_steps=STEPS))
    batch = samples_of(case)
    runner.state.ssm.normal_()
    runner.state.position.fill_(72)
    tasks, filtered = frozenset({case.task}), is_filtering(case.params)
    bucket = decoder.bucket(len(rows_of(batch)))
    if failures[decoder.path(bucket.b)]:
        raise RuntimeError(f"not timed: the results of the {decoder.path(bucket.b)} products are wrong")

    def steps() -> None:
        for _ in range(STEPS):
            decoder.replay(bucket, tasks, filtered)

    step_ms = milliseconds(steps, repeats, device, lambda: decoder.fill(batch)) / STEPS
    block = decoder.start(batch, STEPS)
    decoder.wait(block)
    start = time.perf_counter()
    for _ in range(repeats):
        following = decoder.go_on(block)
        decoder.tokens(block)
        assert following is not None
        block = following
    decoder.wait(block)
    block_ms = (time.perf_counter() - start) / repeats / STEPS * 1e3
    num_bytes = step_bytes(model, runner.state, case.task, len(rows_of(batch)))
    return {
        "rows": len(rows_of(batch)),
        "ms": step_ms,
        "ms with host": block_ms,
        "tokens/s": case.rows / block_ms * 1e3,
        "images/s": case.rows / block_ms * 1e3 / model.config.num_image_tokens if case.task is Task.T2I else 0.0,
        "MB per step": num_bytes / 1e6,
        "TB/s": num_bytes / step_ms / 1e9,
        "share": num_bytes / step_ms * 1e3 / bandwidth,
    }


def whole_request(model: OmniMambaModel, request: Request, device: str) -> dict[str, float]:
    """Times of a request through the engine, prompt and host included: the first, which compiles and captures, then the best of three."""
    engine = Engine(model, num_slots=request.num_samples)
    (first_run, first_run_first, num_tokens), *runs = (timed_request(engine, request, device) for _ in range(4))
    best, first, _ = min(runs)
    figures = {"s": best, "first token ms": first * 1e3, "tokens/s": num_tokens / best, "first run s": first_run}
    return figures | {
        "first run, first token ms": first_run_first * 1e3,
        "images/s": request.num_samples / best * (request.task is Task.T2I),
    }


def request_line(name: str, figures: dict[str, float]) -> str:
    images = f"{figures['images/s']:6.2f} images/s" if figures["images/s"] else " " * 15
    return (
        f"{name:34} {figures['s']:7.3f} s  first token {figures['first token ms']:6.1f} ms {figures['tokens/s']:8.0f} tokens/s {images}  "
        f"(first run {figures['first run s']:.2f} s, its first token {figures['first run, first token ms']:.0f} ms)"
    )


def line(name: str, figures: dict[str, float]) -> str:
    images = f"{figures['images/s']:7.2f} images/s" if figures["images/s"] else " " * 16
    return (
        f"{name:54} {figures['ms']:7.3f} ms ({figures['ms with host']:7.3f} with host) {figures['tokens/s']:8.0f} tokens/s {images} "
        f"{figures['MB per step']:7.0f} MB {figures['TB/s']:5.2f} TB/s {figures['share']:4.0%}"
    )


def sweep(
    config: OmniMambaConfig, image_table: Tensor, bandwidth: float, repeats: int, device: str, failures: dict[str, list[str]]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Other launch choices, one kernel after another; the best choice of each stays for the next."""
    from omnimamba.ops.triton.launch import LAUNCHES, Launch

    base = dict(LAUNCHES)
    d = config.backbone.d_model

    def run(model: OmniMambaModel, case: Case, **choices: Any) -> tuple[float, str, dict[str, float]]:
        LAUNCHES.update(choices)
        try:
            figures = timed(model, case, image_table, bandwidth, repeats, device, failures)
        except Exception as error:
            return float("inf"), f"{case.name}: {type(error).__name__}: {str(error)[:100]}", {}
        return figures["ms"], case.name, figures

    try:
        model = random_model(config, torch.bfloat16, device, "int8")
        project = {width: next(choice for largest, choice in base["decode_project_8bit"] if width <= largest) for width in (d, 2 * d)}
        for width, tiles in ((d, IN_TILES), (2 * d, OUT_TILES)):
            results = []
            for rows, warps in tiles:
                chosen = project | {width: Launch(rows, 0, warps, 1)}
                case = Case(f"int8, project {width}: {rows} rows, {warps} warps", Task.T2I, 1)
                ms, name, figures = run(model, case, decode_project_8bit=((d, chosen[d]), (torch.inf, chosen[2 * d])))
                results.append((ms, chosen))
                yield name, figures
            project = min(results, key=lambda r: r[0])[1]
        del model
        model = random_model(config, torch.bfloat16, device)
        for rows, columns, warps, stages in MATRIX_TILES:
            choice = Launch(rows, columns, warps, stages)
            case = Case(f"x64, projections: {rows} rows, {columns} columns, {warps} warps, {stages} stages", Task.T2I, 64)
            yield run(model, case, decode_matrix=((d, choice), base["decode_matrix"][-1]))[1:]
    finally:
        LAUNCHES.update(base)


# ruff: noqa: B023, the functions of `parts` are called before its loop goes on
def parts(model: OmniMambaModel, image_table: Tensor, device: str, repeats: int) -> Iterator[tuple[str, float, float]]:
    """(kernel, microseconds per layer, TB/s) of each kernel alone, run for all layers in one graph; batch 1 and 64."""
    from omnimamba.engine.decoder import FusedDecoder
    from omnimamba.ops.cuda import mix_rows, project_rows
    from omnimamba.ops.triton import decode as kernels

    config = model.config.backbone
    for b in PARTS_BATCHES:
        runner = Runner(model, b)
        decoder = FusedDecoder(model, runner.state, image_table)
        rows = decoder.fill(samples_of(Case("", Task.T2I, b))).rows
        x, y = (torch.randn(b, width, device=device) for width in (config.d_model, config.d_inner))
        u, gated = (torch.randn(b, width, device=device, dtype=model.dtype) for width in (config.d_model, config.d_inner))
        mixed = torch.randn(kernels.matrix_parts(config.d_inner), b, config.d_model, device=device)
        newest = torch.randn(b, 2 * config.d_state, device=device)
        width = config.d_in_proj + decoder.layers[0].lora.A.shape[0]
        projected = torch.randn(b, width, device=device, dtype=torch.float32 if b == 1 else model.dtype)
        pdl, eps = decoder.pdl, config.norm_eps
        runs: dict[str, tuple[Callable[[Any], Any], int]] = {
            "mix": (
                lambda l: kernels.mix(projected, l.lora, l.mixer, l.conv, l.ssm, rows.slots, rows.is_t2i, y, newest, pdl=pdl),
                2 * b * decoder.layers[0].ssm[0].nbytes,
            )
        }
        if b == 1:
            runs |= {
                "in_proj": (
                    lambda l: kernels.project(x, l.norm, l.in_proj, projected, eps=eps, lora=l.lora, pdl=pdl),
                    decoder.layers[0].in_proj.values.nbytes,
                ),
                "out_proj": (
                    lambda l: kernels.project(
                        y, l.gated_norm, l.out_proj, x, eps=eps, add=True, shift=kernels.Shift(l.conv, rows.slots, newest), pdl=pdl
                    ),
                    decoder.layers[0].out_proj.values.nbytes,
                ),
            }
        else:
            runs |= {
                "norm": (
                    lambda l: kernels.norm(x, l.norm, u, eps=eps, addend=mixed, shift=kernels.Shift(l.conv, rows.slots, newest), pdl=pdl),
                    mixed.nbytes + 2 * x.nbytes,
                ),
                "in_proj": (
                    lambda l: kernels.multiply_parts(u, l.packed, projected[None], pdl=pdl),
                    decoder.layers[0].in_proj.values.nbytes,
                ),
                "out_proj": (
                    lambda l: kernels.multiply_parts(gated, l.out_proj.values, mixed, pdl=pdl),
                    decoder.layers[0].out_proj.values.nbytes,
                ),
            }
            streamed = mix_rows.device_shape(decoder.layers[0], b, model.device)
            if streamed is not None:
                made = mix_rows.Mixed(gated, torch.zeros(b, streamed.row_chunks, device=device), newest)
                counter = torch.zeros(1, dtype=torch.int32, device=device)
                runs["mix, streamed"] = (
                    lambda l, shape=streamed: mix_rows.mix_rows(shape, projected, l, rows.slots, rows.is_t2i, made, counter, pdl=pdl),
                    2 * b * decoder.layers[0].ssm[0].nbytes,
                )
            if decoder.path(b) == "hopper":
                num_squares = project_rows.num_squares(decoder.layers[0], b, model.device)
                entering, leaving = (
                    project_rows.Rows(values, torch.ones(b, num, device=device)) for values, num in ((u, num_squares), (gated, 16))
                )
                runs |= {
                    "in_proj, normed": (
                        lambda l: project_rows.project_in(entering, l.packed, projected, eps=eps, pdl=pdl),
                        decoder.layers[0].in_proj.values.nbytes,
                    ),
                    "out_proj, normed": (
                        lambda l: project_rows.project_out(
                            leaving, l.out_proj.values, x, l.norm, entering, kernels.Shift(l.conv, rows.slots, newest), eps=eps, pdl=pdl
                        ),
                        decoder.layers[0].out_proj.values.nbytes,
                    ),
                }
        for name, (run, num_bytes) in runs.items():

            def all_layers(run: Callable[[Any], Any] = run) -> None:
                for layer in decoder.layers:
                    run(layer)

            if device == "cuda":
                all_layers()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    all_layers()
                ms = milliseconds(graph.replay, repeats, device)
            else:
                ms = milliseconds(all_layers, 1, device)
            yield f"{name} x{b}", ms / len(decoder.layers) * 1e3, num_bytes * len(decoder.layers) / ms / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description="Decoding with the fused kernels, random weights.")
    add_json_option(parser)
    parser.add_argument("--preset", choices=list(PRESETS), default="1.3b")
    parser.add_argument("--cases", nargs="+", metavar="WORD", help="only the cases whose name contains one of these")
    parser.add_argument("--sweep", action="store_true", help="try other launch choices")
    parser.add_argument("--parts", action="store_true", help="time each kernel by itself")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of 16 steps per case")
    parser.add_argument("--interpret", action="store_true", help="run on the CPU in Triton's interpreter, as a test of this script")
    arguments = parser.parse_args()
    device = "cpu" if arguments.interpret else "cuda"
    if lacks(device, triton=True):
        return 2
    started = time.perf_counter()
    config = preset(arguments.preset)
    report = begin(device, preset=arguments.preset)
    if arguments.interpret:
        report["device"] = "interpreter"
    failures = report["wrong"] = differences(config, device)
    bandwidth = read_bandwidth(device)
    report |= {"read GB/s": bandwidth / 1e9, "cases": {}, "parts": {}}
    print(f"checked in {time.perf_counter() - started:.0f} s; read bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
    model = random_model(config, torch.bfloat16, device)
    image_table = Runner(model, 1).image_table
    if arguments.parts:
        for name, us, rate in parts(model, image_table, device, arguments.repeats):
            report["parts"][name] = {"us": us, "TB/s": rate}
            print(f"  {name:34} {us:7.2f} us per layer {rate:5.2f} TB/s", flush=True)
    rows = []
    scheme = None
    for case in CASES:
        if arguments.cases and not any(word in case.name for word in arguments.cases):
            continue
        if case.scheme != scheme:
            scheme = case.scheme
            del model
            model = random_model(config, torch.bfloat16, device, scheme)
        try:
            figures = timed(model, case, image_table, bandwidth, arguments.repeats, device, failures)
        except Exception as error:  # one failing case must not cost the others
            traceback.print_exc()
            report["cases"][case.name] = {"error": repr(error)}
            continue
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()
        report["cases"][case.name] = figures
        rows.append(line(case.name, figures))
        print(rows[-1], flush=True)
    report["requests"] = {}
    if not failures["engine"] and not arguments.cases:
        del model
        model = random_model(config, torch.bfloat16, device)
        text = text_request(config, 128)
        requests = {"image": image_request(config, 1), "64 images of a prompt": image_request(config, 64), "text after 760 positions": text}
        for name, request in requests.items():
            report["requests"][name] = whole_request(model, request, device)
            rows.append(request_line(name, report["requests"][name]))
            print(rows[-1], flush=True)
    if arguments.sweep:
        report["sweep"] = {}
        del model
        for name, figures in sweep(config, image_table, bandwidth, arguments.repeats, device, failures):
            report["sweep"][name] = figures
            rows.append(line(name, figures) if figures else name)
            print(rows[-1], flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s", *rows, sep="\n")
    finish(report, arguments.json)
    return int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
