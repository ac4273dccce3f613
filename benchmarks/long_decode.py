"""Long sequences beside other systems, in one run, random weights: time per token and memory at many lengths, seconds for many tokens.

    PYTHONPATH=src python3 benchmarks/long_decode.py --json out.json

- omnimamba at the 1.3B shape, painting beyond an image's end (its last position repeats), through the engine: first a request of --tokens
  tokens, really decoded, then 64 tokens from a state that is set to each of --lengths positions, not decoded up to there.
- A transformer of Show-o's shape without a cache, as Show-o generates: each token is a pass over all positions so far. Measured in bf16
  in the quickest way, and as its code calls the model; either is summed over --tokens lengths, linear between those that are measured
  (which adds less than 0.5 %, since the curve bends upwards).
- A transformer of JanusFlow's shape with a cache that grows, and with a static one as a CUDA graph and compiled. Caches are filled with
  random numbers up to each length. A static cache costs each token what its whole size costs.
- transformers' Mamba-2 at the 1.3B shape in bf16, launched from Python (without mamba_ssm it takes its plain PyTorch path), and mamba_ssm
  where it can be imported.

Memory is the peak of tensors while decoding, in GB (10^9 bytes), of language models alone; the whole model, with towers and VQ tokenizer,
is one more case. What is not installed, or does not fit in memory, is reported and the rest goes on. On a GPU the kernels are first
compared with the plain path; nothing is timed if they differ, and the exit code is 1. The last line on stdout is JSON.
"""

import argparse
import dataclasses
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import _peers as peers
import numpy as np
import torch
from _decode_checks import Check, differences
from _measure import Memory, milliseconds, read_bandwidth
from _model import image_request, random_bundle, random_model, step_bytes, text_request, timed_request
from _report import add_json_option, begin, finish, lacks, save, version

from omnimamba.config import OmniMambaConfig, Task, preset
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.model.quantize import parameters
from omnimamba.model.state import MambaState

LENGTHS = (1024, 4096, 16384, 65536, 100_000, 131_072)
COMPILED_LENGTHS = (16384, 100_000)  # each takes a minute to compile
STEPS = 64
WARM_UP_TOKENS = 32
CHECKS = tuple(Check(torch.bfloat16, ("one image",), scheme) for scheme in (None, "int8", "fp8"))
AIM_TOKENS, SPEED_AIMS = 16384, {"omnimamba, bf16": 95.0, "omnimamba, int8": 119.2, "omnimamba, fp8": 119.2}  # times Show-o's shape
FIRST_FLAT, LAST_FLAT, FAR = 4096, 131_072, 100_000  # lengths of the aims

Figures = dict[str, Any]
Points = dict[int, Figures]
"""By length: "ms" per token and "GB", or an "error"."""


@dataclasses.dataclass(frozen=True)
class Settings:
    config: OmniMambaConfig
    is_tiny: bool
    device: str
    lengths: tuple[int, ...]
    num_tokens: int
    repeats: int
    bandwidth: float
    """Bytes per second."""

    def shape(self, shape: dict[str, Any]) -> dict[str, Any]:
        return shape | peers.TINY if self.is_tiny else shape


# ---- from points to figures


def total_seconds(points: Points, num_tokens: int) -> float:
    """Seconds for tokens 1 to num_tokens, linear between the measured lengths and constant before the first.

    ValueError if no length as large as num_tokens was measured.
    """
    measured = {length: point["ms"] for length, point in sorted(points.items()) if "ms" in point}
    if not measured or max(measured) < num_tokens:
        raise ValueError(f"{num_tokens} tokens end beyond the last measured length, {max(measured, default=None)}; measure up to there")
    return float(np.interp(np.arange(1, num_tokens + 1), list(measured), list(measured.values())).sum()) / 1e3


def seconds_for(points: Points, totals: Iterable[int], growth: str) -> dict[int, float]:
    """Seconds for so many tokens, where the measured lengths reach so far.

    growth says what a token costs: that of its `position`, that of the whole cache's `size`, or the same at all lengths (`none`).
    """
    measured = {length: point["ms"] for length, point in points.items() if "ms" in point}
    if growth == "none":
        return {num: num * min(measured.values()) / 1e3 for num in totals if measured}
    if growth == "size":
        return {num: num * measured[num] / 1e3 for num in totals if num in measured}
    return {num: total_seconds(points, num) for num in totals if num <= max(measured, default=0)}


def at_lengths(lengths: Iterable[int], measure: Callable[[int], Figures]) -> Points:
    """What is measured at each length, up to the first that fails."""
    points: Points = {}
    for length in lengths:
        try:
            points[length] = measure(length)
        except torch.OutOfMemoryError:
            points[length] = {"error": "out of memory"}
            break
        except Exception as error:  # what was measured before counts
            traceback.print_exc()
            points[length] = {"error": repr(error)}
            break
    return points


# ---- systems


def omnimamba(settings: Settings, scheme: str | None) -> Figures:
    config, device = settings.config, settings.device
    memory = Memory(device)
    model = random_model(config, torch.bfloat16, device, scheme)
    memory.restart()
    engine = Engine(model, num_slots=1)
    state = MambaState.zeros(config.backbone, 1)
    state.ssm.normal_()

    def painting(num_tokens: int) -> Request:
        sampling = SamplingParams(seed=0, max_new_tokens=num_tokens, past_last_position="clamp")
        return dataclasses.replace(image_request(config, 1), sampling=sampling)

    def at(length: int) -> Figures:
        memory.restart()
        state.position.fill_(length)
        request = dataclasses.replace(painting(STEPS + 1), ids=(peers.TOKEN_ID,), state=state)
        runs = [timed_request(engine, request, device) for _ in range(2 + settings.repeats)][2:]
        seconds = statistics.median(total - first for total, first, _ in runs)
        return {"ms": seconds / STEPS * 1e3, "GB": memory.peak()}

    for _ in range(2):
        timed_request(engine, painting(WARM_UP_TOKENS), device)
    figures: Figures = {"weights GB": sum(num for *_, num in parameters(model)) / 1e9, "growth": "position"}
    seconds, _, num_tokens = timed_request(engine, painting(settings.num_tokens), device)
    figures["request"] = {"tokens": num_tokens, "s": seconds, "GB": memory.peak()}  # with the capture of all graphs
    points = figures["by length"] = at_lengths(settings.lengths, at)
    moved = step_bytes(model, engine.runner.state, Task.T2I)
    step_ms = statistics.mean(point["ms"] for point in points.values() if "ms" in point)
    return figures | {"MB per step": moved / 1e6, "share": moved / step_ms * 1e3 / settings.bandwidth}


def show_o(settings: Settings, is_published: bool) -> Figures:
    memory = Memory(settings.device)
    model = peers.causal_model(settings.shape(peers.SHOW_O), settings.device)
    lengths = [max(1, settings.num_tokens // 64), *(settings.num_tokens * i // 8 for i in range(1, 9))]

    def at(length: int) -> Figures:
        memory.restart()
        run = peers.full_pass(model, length, is_published=is_published)
        return {"ms": milliseconds(run, settings.repeats, settings.device), "GB": memory.peak()}

    return {"weights GB": peers.num_bytes(model) / 1e9, "growth": "position", "by length": at_lengths(lengths, at)}


def janusflow_dynamic(settings: Settings) -> Figures:
    memory = Memory(settings.device)
    model = peers.causal_model(settings.shape(peers.JANUSFLOW), settings.device)

    def at(length: int) -> Figures:
        decoding = peers.dynamic_decoding(model, length)
        memory.restart()
        return {"ms": milliseconds(decoding.step, settings.repeats, settings.device), "GB": memory.peak()}

    return {"weights GB": peers.num_bytes(model) / 1e9, "growth": "position", "by length": at_lengths(settings.lengths, at)}


def janusflow_static(settings: Settings, is_compiled: bool) -> Figures:
    memory = Memory(settings.device)
    model = peers.causal_model(settings.shape(peers.JANUSFLOW), settings.device)

    def at(length: int) -> Figures:
        decoding, rewind = peers.static_decoding(model, length)
        memory.restart()
        step = decoding.step
        if is_compiled:
            step = peers.compiled(decoding, rewind)
        elif settings.device == "cuda":
            step = peers.captured(step, rewind)
        return {"ms": milliseconds(step, settings.repeats, settings.device, rewind), "GB": memory.peak()}

    lengths = [length for length in settings.lengths if length in COMPILED_LENGTHS or not is_compiled]
    return {"weights GB": peers.num_bytes(model) / 1e9, "growth": "size", "by length": at_lengths(lengths, at)}


def transformers_mamba2(settings: Settings) -> Figures:
    memory = Memory(settings.device)
    model = peers.causal_model(peers.mamba2_shape(settings.config.backbone, settings.config.text_vocab_size), settings.device)
    memory.restart()
    decoding = peers.mamba2_decoding(model)
    ms = milliseconds(decoding.step, settings.repeats, settings.device)
    points = {peers.PROMPT_LENGTH: {"ms": ms, "GB": memory.peak()}}
    return {"weights GB": peers.num_bytes(model) / 1e9, "growth": "none", "by length": points}


def mamba_ssm(settings: Settings) -> Figures:
    memory = Memory(settings.device)
    config = settings.config
    ms = peers.mamba_ssm_milliseconds(config.backbone, config.text_vocab_size, settings.device, STEPS)
    return {"growth": "none", "by length": {peers.PROMPT_LENGTH: {"ms": ms, "GB": memory.peak()}}}


def whole_model(settings: Settings) -> Figures:
    """Memory with towers and VQ tokenizer while a question about an image is answered and an image painted."""
    config, device = settings.config, settings.device
    memory = Memory(device)
    bundle = random_bundle(config, torch.bfloat16, device)
    assert bundle.vision is not None and bundle.vq is not None
    memory.restart()
    weights = [p for part in (bundle.model, bundle.vision, bundle.vq) for p in part.parameters() if p.device.type == device]
    figures: Figures = {"weights GB": sum(p.nbytes for p in weights) / 1e9}
    engine = Engine(bundle.model, num_slots=1)
    figures["idle GB"] = memory.now()  # with the state pool and the table of image embeddings
    size = {name: tower.image_size for name, tower in config.towers.items()}
    for _ in range(2):  # the second time, prompts are read by captured graphs
        with torch.no_grad():
            features = bundle.vision({name: torch.randn(1, 3, s, s, device=device) for name, s in size.items()})
            question = dataclasses.replace(text_request(config, WARM_UP_TOKENS), features=features[0])
            engine.run([question])
            tokens = engine.run([image_request(config, 1)])[0][0].tokens
            bundle.vq.decode_ids(torch.tensor([tokens], device=device))
    return figures | {"GB": memory.peak()}


SHOW_O = "Show-o shape, no cache"
DYNAMIC, STATIC, COMPILED = (f"JanusFlow shape, {kind}" for kind in ("growing cache", "static cache, CUDA graph", "static cache, compiled"))
WHOLE = "whole model"
SYSTEMS: dict[str, Callable[[Settings], Figures]] = {
    "omnimamba, bf16": lambda settings: omnimamba(settings, None),
    "omnimamba, int8": lambda settings: omnimamba(settings, "int8"),
    "omnimamba, fp8": lambda settings: omnimamba(settings, "fp8"),
    WHOLE: whole_model,
    SHOW_O: lambda settings: show_o(settings, False),
    f"{SHOW_O}, as published": lambda settings: show_o(settings, True),
    DYNAMIC: janusflow_dynamic,
    "transformers' Mamba-2": transformers_mamba2,
    "mamba_ssm": mamba_ssm,
    STATIC: lambda settings: janusflow_static(settings, False),
    COMPILED: lambda settings: janusflow_static(settings, True),  # last: it takes longest
}


def measured(system: Callable[[Settings], Figures], settings: Settings) -> Figures:
    """The figures of a system, or an "error" that says why there are none."""
    try:
        figures = system(settings)
    except ImportError as error:
        return {"error": f"not installed: {error.name or error}"}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # one failing system must not cost the others
        traceback.print_exc()
        return {"error": repr(error)}
    if "by length" in figures:
        totals = sorted({*settings.lengths, settings.num_tokens})
        figures["seconds for"] = seconds_for(figures["by length"], totals, figures["growth"])
    return figures


# ---- ratios


class Ratio(NamedTuple):
    name: str
    value: float
    aim: float | None


def ratios(cases: dict[str, Figures], num_tokens: int) -> Iterator[Ratio]:
    """Other systems against ours, where both were measured, and what is to be flat or small."""
    ours = {name: figures for name, figures in cases.items() if name.startswith("omnimamba") and "error" not in figures}
    for name, figures in ours.items():
        for other, theirs in cases.items():
            seconds = theirs.get("seconds for", {}).get(num_tokens)
            if other not in ours and seconds is not None:
                aim = SPEED_AIMS[name] if (other, num_tokens) == (SHOW_O, AIM_TOKENS) else None
                yield Ratio(f"{num_tokens} tokens: {other} / {name}", seconds / figures["request"]["s"], aim)
        taken = {length: max(point["GB"], figures["request"]["GB"]) for length, point in figures["by length"].items() if point.get("GB")}
        for other in (DYNAMIC, STATIC):
            theirs = cases.get(other, {}).get("by length", {}).get(FAR, {}).get("GB")
            if theirs and FAR in taken:
                yield Ratio(f"memory at {FAR} positions: {name} less than {other}", 1 - taken[FAR] / theirs, 0.8)
        flat = [point["GB"] for length, point in figures["by length"].items() if FIRST_FLAT <= length <= LAST_FLAT and point.get("GB")]
        if len(flat) > 1:
            yield Ratio(f"memory from {FIRST_FLAT} to {LAST_FLAT} positions, largest over smallest: {name}", max(flat) / min(flat), 1.01)
    if cases.get(WHOLE, {}).get("GB"):
        yield Ratio("whole model, GB", cases[WHOLE]["GB"], 4.8)


def lines(name: str, figures: Figures) -> Iterable[str]:
    if "error" in figures:
        yield f"{name}: {figures['error']}"
        return
    known = ("weights GB", "idle GB", "GB", "share", "MB per step")
    yield ", ".join([name, *(f"{key} {figures[key]:.3f}" for key in known if figures.get(key) is not None)])
    if "request" in figures:
        request = figures["request"]
        yield f"  {request['tokens']} tokens decoded in {request['s']:.2f} s, {request['tokens'] / request['s']:.0f} tokens/s"
    for length, point in figures.get("by length", {}).items():
        gb = "" if point.get("GB") is None else f" {point['GB']:7.2f} GB"
        yield f"  at {length:7} {point['error']}" if "error" in point else f"  at {length:7} {point['ms']:9.3f} ms{gb}"
    for num, seconds in figures.get("seconds for", {}).items():
        yield f"  {num:7} tokens {seconds:10.2f} s"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Long sequences beside other systems, random weights.")
    add_json_option(parser)
    parser.add_argument("--preset", choices=["1.3b", "tiny"], default="1.3b", help="tiny: all systems tiny, as a test of this script")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cases", nargs="+", metavar="WORD", help="only the systems whose name contains one of these")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    device = arguments.device
    if lacks(device):
        return 2
    started = time.perf_counter()
    config = preset(arguments.preset)
    report = begin(device, transformers=version("transformers"), mamba_ssm=version("mamba_ssm"), preset=arguments.preset)
    if device == "cuda":
        report["wrong"] = differences(config, device, CHECKS)
        if any(report["wrong"].values()):
            print("nothing is timed, results are wrong", file=sys.stderr)
            return 1
    bandwidth = read_bandwidth(device)
    print(f"read bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
    lengths = tuple(sorted(arguments.lengths))
    settings = Settings(config, arguments.preset == "tiny", device, lengths, arguments.tokens, arguments.repeats, bandwidth)
    report |= {"read GB/s": bandwidth / 1e9, "tokens": arguments.tokens, "cases": {}}
    for name, system in SYSTEMS.items():
        if arguments.cases and not any(word in name for word in arguments.cases):
            continue
        figures = report["cases"][name] = measured(system, settings)
        save(report, arguments.json)  # a run that is cut short keeps what it has
        print(*lines(name, figures), f"  ({time.perf_counter() - started:.0f} s)", sep="\n", flush=True)
    found = list(ratios(report["cases"], arguments.tokens))
    report["ratios"] = [ratio._asdict() for ratio in found]
    for name, value, aim in found:
        print(f"{name}: {value:.4g}" + (f" (aim {aim:g})" if aim else ""))
    finish(report, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
