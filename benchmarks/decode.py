"""Times decoding with the fused kernels at the shape of the 1.3B model, random weights: from a token to the next sampled token.

    PYTHONPATH=src python3 benchmarks/decode.py --json out.json

Needs a CUDA device, torch and triton. A step of few layers is first compared with the plain PyTorch step (logits, states, sampled tokens;
fp32, bf16 and quantised; several slots out of order, padding rows, both tasks in one batch, poisoned buffers), one and two rows by the
vector kernels and more by matrix products, and the engine with the plain engine. What is off is not timed, and the exit code is 1. Bytes
per step count each weight and state once read, and each state once written; their rate is set beside the read bandwidth measured in the
same run. Then whole requests run through the engine, prompts included. `--sweep` also tries other launch choices, `--parts` times each
kernel by itself. The last line on stdout is JSON.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _git import commit
from torch import Tensor

from omnimamba.config import PRESETS, OmniMambaConfig, Task, preset
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.engine.runner import DecodeSample, Runner
from omnimamba.engine.sampler import SamplingRows, guide, sample, stream_key
from omnimamba.model.omnimamba import OmniMambaModel, cast
from omnimamba.model.quantize import quantize_model
from omnimamba.model.state import MambaState
from omnimamba.ops.quant import QuantizedWeight

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # rms(error) / rms(expected)
CHECKED_LAYERS = 3
STEPS = 16  # of a block
PARTS_BATCHES = (1, 64)
# what --sweep tries: (rows of a program, warps) of in_proj and out_proj, int8, one row; (channels, warps, registers) of the state update
IN_TILES = ((8, 4), (16, 4), (16, 8), (32, 8))
OUT_TILES = ((4, 4), (8, 4), (8, 8), (16, 16))
MIX_TILES = ((64, 4, None), (32, 2, 168), (32, 4, 96))


@dataclasses.dataclass(frozen=True)
class Check:
    """A kind of model that is compared with the plain step, and the batches (see `wrong_results`) that it runs."""

    dtype: torch.dtype
    batches: tuple[str, ...]
    scheme: str | None = None
    ssm_dtype: torch.dtype = torch.float32


CHECKS = (
    Check(torch.float32, ("guided", "mixed")),
    Check(torch.bfloat16, ("one image", "one text", "guided", "mixed", "filtered", "many")),
    Check(torch.bfloat16, ("one image", "many"), ssm_dtype=torch.bfloat16),
    Check(torch.bfloat16, ("one image", "guided", "mixed"), "int8"),
    Check(torch.bfloat16, ("one text", "mixed"), "fp8"),
)


@dataclasses.dataclass(frozen=True)
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


def random_model(config: OmniMambaConfig, dtype: torch.dtype, device: str, scheme: str | None = None) -> OmniMambaModel:
    """A model made on the device, whose norms and LoRA are not those of initialisation, which hide mistakes."""
    torch.manual_seed(0)
    with torch.device(device):
        model = OmniMambaModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            elif name.endswith(("norm.weight", "norm_f.weight")):
                parameter.uniform_(0.5, 1.5)
    cast(model, dtype)
    model.eval().requires_grad_(False)
    if scheme is not None:
        quantize_model(model, scheme)
    return model


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


# ---- correctness


def wrong_results(config: OmniMambaConfig, check: Check, device: str) -> Iterator[tuple[str, str]]:
    """(path, what differs) between the fused step and the plain one in a model of few layers."""
    from omnimamba.engine.decoder import DecodeOptions, FusedDecoder

    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, n_layer=CHECKED_LAYERS))
    model = random_model(config, check.dtype, device, check.scheme)
    reference = random_model(config, check.dtype, device)
    cast(reference, torch.float32)  # the same rounded weights
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            reference.get_parameter(name).copy_(module.dequantize())
    drawn, greedy, guided = SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(guidance_scale=3.0)
    filtered = SamplingParams(top_k=50, top_p=0.9)

    def samples(*chosen: tuple[tuple[int, int], Task, SamplingParams]) -> list[DecodeSample]:
        return [DecodeSample(slots, task, 5 + i, params, stream_key(1, i), i, 9) for i, (slots, task, params) in enumerate(chosen)]

    batches = {
        "one image": samples(((8, 8), Task.T2I, drawn)),
        "one text": samples(((3, 3), Task.MMU, greedy)),
        "guided": samples(((6, 2), Task.T2I, guided)),
        "mixed": samples(((9, 4), Task.T2I, guided), ((7, 7), Task.MMU, drawn)),
        "filtered": samples(((1, 1), Task.T2I, filtered), ((0, 0), Task.MMU, filtered), ((5, 5), Task.MMU, greedy)),
        "many": samples(*(((slot, slot), Task.T2I if slot % 3 else Task.MMU, drawn) for slot in (10, 2, 7, 1, 0, 9, 5))),
    }
    for name in check.batches:
        batch = batches[name]
        runner, expected_runner = Runner(model, 11, ssm_dtype=check.ssm_dtype), Runner(reference, 11)
        for state in (runner.state, expected_runner.state):
            torch.manual_seed(2)
            state.conv.copy_(torch.randn(state.conv.shape, device=device).to(check.dtype))
            state.ssm.copy_(torch.randn(state.ssm.shape, device=device).to(check.ssm_dtype))
            state.position.copy_(torch.arange(11) * 7 % 13)
        decoder = FusedDecoder(model, runner.state, runner.image_table, options=DecodeOptions(max_steps=STEPS))
        path = decoder.path(decoder.bucket(len(rows_of(batch))).b)
        expected_runner.image_table.copy_(runner.image_table)
        before = runner.state.clone()
        decoder.logits(batch)  # makes the buffers
        for buffer in decoder.buffers():
            buffer.fill_(torch.nan)
        restore(runner.state, before)
        found = {task: logits.clone() for task, logits in decoder.logits(batch).items()}
        where = f"{check.scheme or check.dtype}, {name}"
        for wrong in compared(found, runner, expected_runner, batch, TOLERANCES[check.dtype]):
            yield path, f"{where}: {wrong}"
        restore(runner.state, before)
        tokens = decoder.run(batch, 1)
        for i, (task, expected) in enumerate(expected_tokens(found, batch)):
            if tokens[i] != [expected]:
                yield path, f"{where}: sample {i} ({task}) drew {tokens[i]}, the sampler {expected} from the same logits"


def wrong_requests(config: OmniMambaConfig, device: str) -> Iterator[str]:
    """What differs between the engine and the plain engine, in fp32 and few layers: tokens of a guided image and a text beside it."""
    config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, n_layer=CHECKED_LAYERS))
    model = random_model(config, torch.float32, device)
    image = dataclasses.replace(image_request(config, 1), sampling=SamplingParams(seed=0, guidance_scale=3.0, max_new_tokens=40))
    requests = [dataclasses.replace(image, null_ids=image.ids[::-1]), text_request(config, 25)]
    engines = [Engine(model, num_slots=3) for _ in range(2)]
    engines[1].runner.decoder = engines[1].runner.prefill_graphs = None
    for attempt in range(2):  # the second has its prompts read by captured graphs
        found, expected = ([samples[0].tokens for samples in engine.run(requests)] for engine in engines)
        if found != expected:
            same = [
                next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), None) for pair in zip(found, expected, strict=True)
            ]
            yield f"engine, run {attempt + 1}: tokens of image and text differ from these on: {same}"


def image_request(config: OmniMambaConfig, num_images: int) -> Request:
    """A caption of random ids."""
    ids = torch.arange(config.t2i_positions - config.num_image_tokens) * 7919 % config.base_vocab_size
    return Request(Task.T2I, tuple(ids.tolist()), sampling=SamplingParams(seed=0), num_samples=num_images)


def text_request(config: OmniMambaConfig, num_tokens: int) -> Request:
    """A question of random ids about no image, whose place is there."""
    ids = torch.arange(31) * 7919 % config.base_vocab_size
    return Request(Task.MMU, tuple(ids.tolist()), sampling=SamplingParams(seed=0, max_new_tokens=num_tokens))


def restore(state: MambaState, before: MambaState) -> None:
    for part in ("conv", "ssm", "position"):
        getattr(state, part).copy_(getattr(before, part))


def rows_of(batch: list[Any]) -> list[tuple[int, Any]]:
    """(slot, sample) of each row."""
    return [(slot, sample) for sample in batch for slot in dict.fromkeys(sample.slots)]


def compared(found: dict[Task, Tensor], runner: Runner, expected: Runner, batch: list[Any], tolerance: float) -> Iterator[str]:
    rows = rows_of(batch)
    slots = [slot for slot, _ in rows]
    logits = expected.decode(slots, [s.task for _, s in rows], [s.token for _, s in rows])
    pairs = {f"{task} logits": (found[task][[i for i, (_, s) in enumerate(rows) if s.task is task]], logits[task]) for task in logits}
    for part in ("ssm", "conv"):
        pairs |= {
            f"{part} state of layer {i}": (getattr(runner.state, part)[i], getattr(expected.state, part)[i]) for i in range(CHECKED_LAYERS)
        }
    for name, (value, wanted) in pairs.items():
        error = ((value.float() - wanted.float()).norm() / wanted.float().norm()).item()
        if not error <= tolerance:
            yield f"{name} off by {error:.1e}"
    if not torch.equal(runner.state.position, expected.state.position):
        yield f"positions {runner.state.position.tolist()}, expected {expected.state.position.tolist()}"


def expected_tokens(logits: dict[Task, Tensor], batch: list[Any]) -> list[tuple[Task, int]]:
    tokens, row = [], 0
    for s in batch:
        null = row + (s.slots[0] != s.slots[1])
        settings = SamplingRows.of([s.params], [s.key], [s.step], logits[s.task].device)
        scores = logits[s.task].float()
        tokens.append((s.task, int(sample(guide(scores[row : row + 1], scores[null : null + 1], settings.guidance_scale), settings))))
        row = null + 1
    return tokens


# ---- time


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], repeats: int, device: str, before: Callable[[], Any] = lambda: None) -> float:
    """Median time of `run`; `before` is not timed."""
    for _ in range(2):
        before()
        run()
    times = []
    for _ in range(repeats):
        before()
        if device == "cuda":
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start_time = time.perf_counter()
            run()
            times.append((time.perf_counter() - start_time) * 1e3)
    return statistics.median(times)


def read_bandwidth(device: str, num_bytes: int) -> float:
    """Bytes per second of summing `num_bytes`."""
    values = torch.ones(num_bytes // 4, device=device)
    return num_bytes / milliseconds(values.sum, 20, device) * 1e3


def step_bytes(decoder: Any, case: Case) -> int:
    """Bytes that a step of the case moves at least."""
    layers = decoder.layers
    weights = sum(
        t.nbytes for layer in layers for weight in (layer.in_proj, layer.out_proj) for t in (weight.values, weight.scale) if t is not None
    )
    weights += sum(layer.lora.A.nbytes // 2 + layer.lora.B.nbytes // 2 for layer in layers)
    weights += decoder.heads[case.task].values.nbytes
    states = sum(layer.conv[0].nbytes + layer.ssm[0].nbytes for layer in layers)
    return weights + 2 * states * case.rows * (1 + case.is_guided)


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
    start = time.perf_counter()
    for _ in range(repeats):
        decoder.run(batch, STEPS)
    synchronize(device)
    block_ms = (time.perf_counter() - start) / repeats / STEPS * 1e3
    num_bytes = step_bytes(decoder, case)
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
    seconds: list[tuple[float, float]] = []
    num_tokens = 0
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        engine.submit(request)
        events = []
        while not events:
            events = engine.step()
        first = time.perf_counter() - start
        num_tokens = len(events)
        while engine.has_work:
            num_tokens += len(engine.step())
        seconds.append((time.perf_counter() - start, first))
    best, first = min(seconds[1:])
    figures = {"s": best, "first token ms": first * 1e3, "tokens/s": num_tokens / best, "first run s": seconds[0][0]}
    return figures | {"first run, first token ms": seconds[0][1] * 1e3, "images/s": request.num_samples / best * (request.task is Task.T2I)}


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
        for ssm_dtype in (torch.float32, torch.bfloat16):
            for rows, warps, registers in MIX_TILES:
                name = f"x64, {ssm_dtype}, mix: {rows} channels, {warps} warps, {registers or 'any'} registers"
                choice = Launch(rows, 0, warps, 1, registers)
                yield run(model, Case(name, Task.T2I, 64, ssm_dtype), decode_mix=((torch.inf, choice),))[1:]
    finally:
        LAUNCHES.update(base)


# ruff: noqa: B023, the functions of `parts` are called before its loop goes on
def parts(model: OmniMambaModel, image_table: Tensor, device: str, repeats: int) -> Iterator[tuple[str, float, float]]:
    """(kernel, microseconds per layer, TB/s) of each kernel alone, run for all layers in one graph; batch 1 and 64."""
    from omnimamba.engine.decoder import FusedDecoder
    from omnimamba.ops.triton import decode as kernels

    config = model.config.backbone
    for b in PARTS_BATCHES:
        runner = Runner(model, b)
        decoder = FusedDecoder(model, runner.state, image_table)
        rows = decoder.fill(samples_of(Case("", Task.T2I, b))).rows
        x, y = (torch.randn(b, width, device=device) for width in (config.d_model, config.d_inner))
        u, gated, mixed = (
            torch.randn(b, width, device=device, dtype=model.dtype) for width in (config.d_model, config.d_inner, config.d_model)
        )
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
                "norm": (lambda l: kernels.norm(x, l.norm, u, eps=eps, addend=mixed, pdl=pdl), 2 * x.nbytes),
                "in_proj": (lambda l: torch.mm(u, l.packed.T, out=projected), decoder.layers[0].in_proj.values.nbytes),
                "gated norm": (
                    lambda l: kernels.norm(y, l.gated_norm, gated, eps=eps, shift=kernels.Shift(l.conv, rows.slots, newest), pdl=pdl),
                    y.nbytes,
                ),
                "out_proj": (lambda l: torch.mm(gated, l.out_proj.values.T, out=mixed), decoder.layers[0].out_proj.values.nbytes),
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--preset", choices=list(PRESETS), default="1.3b")
    parser.add_argument("--cases", nargs="+", metavar="WORD", help="only the cases whose name contains one of these")
    parser.add_argument("--sweep", action="store_true", help="try other launch choices")
    parser.add_argument("--parts", action="store_true", help="time each kernel by itself")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of 16 steps per case")
    parser.add_argument("--interpret", action="store_true", help="run on the CPU in Triton's interpreter, as a test of this script")
    arguments = parser.parse_args()
    device = "cpu" if arguments.interpret else "cuda"
    if importlib.util.find_spec("triton") is None or (device == "cuda" and not torch.cuda.is_available()):
        print("benchmarks/decode.py times GPU kernels: it needs a CUDA device and Triton, and found none", file=sys.stderr)
        return 2
    import triton

    started = time.perf_counter()
    config = preset(arguments.preset)
    failures: dict[str, list[str]] = {"vector": [], "matrix": [], "engine": []}
    try:
        for check in CHECKS:
            for path, wrong in wrong_results(config, check, device):
                failures[path].append(wrong)
        failures["engine"] += wrong_requests(config, device)
    except Exception as error:
        traceback.print_exc()
        failures = {path: [*wrong, repr(error)] for path, wrong in failures.items()}
    for path, wrong in failures.items():
        print(f"{path}: {len(wrong) or 'no'} differences from the plain path", *wrong, sep="\n  ", flush=True)
    bandwidth = read_bandwidth(device, 2**24 if arguments.interpret else 2**32)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "command": " ".join(sys.argv),
        "preset": arguments.preset,
        "wrong": failures,
        "read GB/s": bandwidth / 1e9,
        "cases": {},
        "parts": {},
    }
    print(", ".join(f"{name} {report[name]}" for name in ("device", "torch", "triton", "commit", "command", "preset")))
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
    text = json.dumps(report)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(f"\n{time.perf_counter() - started:.0f} s", *rows, text, sep="\n")
    return int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
