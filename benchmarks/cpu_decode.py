"""Times prefill and decode on the CPU at the shape of the 1.3B model, random weights, one sequence, beside other systems.

    PYTHONPATH=src python3 benchmarks/cpu_decode.py --json out.json

Ours runs through the engine, from a request to sampled tokens; transformers' Mamba-2 and llama.cpp through their models with a cache. A
case is timed in short repeats and the best one counts, since other programs may use the cores: the load is printed. Bytes per token count
every weight that a step reads once, the state read and written once; their rate stands beside the read bandwidth, the better of two
measurements around each case. At most about 6 GB of memory: models are made tensor by tensor in the type that they run in. llama.cpp runs
if llama-cpp-python and gguf are installed (`pip install llama-cpp-python gguf` compiles it), and is named as missing if not. The last line
on stdout is JSON.
"""

import argparse
import dataclasses
import gc
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# as the command line does; both are read when the libraries are loaded
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import _llama_cpp
import torch
from _measure import read_bandwidth
from _model import step_bytes
from _peers import causal_model, mamba2_decoding, mamba2_shape, num_bytes
from _report import add_json_option, begin, finish
from torch import Tensor

from omnimamba.config import OmniMambaConfig, Quantization, Task, preset
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.model import weights
from omnimamba.model.omnimamba import OmniMambaModel, cast
from omnimamba.model.quantize import parameters
from omnimamba.model.state import MambaState
from omnimamba.ops.quant import QuantizedWeight, quantize

CASES = ("float32", "bfloat16", "int8", "fp8", "int4", "transformers", "llama.cpp Q8_0", "llama.cpp Q4_0")
REPEAT_TOKENS = 8
STD = 0.02


def random_model(config: OmniMambaConfig, case: str) -> OmniMambaModel:
    """A model of random weights without ever holding it in fp32. Equal shapes get copies of equal weights."""
    scheme = Quantization(case) if case in list(Quantization) else None
    config = dataclasses.replace(config, quantization=scheme)
    model = cast(weights.outline("model", config), weights.DTYPES.get(case, torch.float32)).eval().requires_grad_(False)
    assert isinstance(model, OmniMambaModel)
    generator = torch.Generator().manual_seed(0)
    made: dict[Any, Any] = {}
    values: dict[str, Tensor] = {}
    for name, like in model.state_dict().items():
        path, _, part = name.rpartition(".")
        owner = model.get_submodule(path) if path and part in ("values", "scale") else None
        if isinstance(owner, QuantizedWeight):
            if owner.shape not in made:
                made[owner.shape] = quantize(torch.randn(owner.shape, generator=generator) * STD, owner.scheme)
            values[name] = getattr(made[owner.shape], part).clone()
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            values[name] = torch.ones_like(like, device="cpu")
        else:
            if (like.shape, like.dtype) not in made:
                made[like.shape, like.dtype] = (torch.randn(like.shape, generator=generator) * STD).to(like.dtype)
            values[name] = made[like.shape, like.dtype].clone()
    model.load_state_dict(values, assign=True)
    return model


def best(run: Callable[[], Any], repeats: int) -> float:
    """Seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def best_rate(steps: Iterator[Any], repeats: int) -> float:
    """Steps per second in the best of `repeats` runs of REPEAT_TOKENS steps, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(REPEAT_TOKENS):
            next(steps)
        times.append(time.perf_counter() - start)
    return REPEAT_TOKENS / min(times[1:])


def ours(config: OmniMambaConfig, case: str, prompt_length: int, repeats: int) -> dict[str, Any]:
    """Rates of decoding both tasks and of reading a prompt."""
    model = random_model(config, case)
    engine = Engine(model, num_slots=1)
    figures: dict[str, Any] = {"weights GB": sum(num for *_, num in parameters(model)) / 1e9}
    for task in Task:
        prompt = tuple(range(100, 100 + (config.t2i_prompt_length if task is Task.T2I else 16)))
        sampling = SamplingParams(seed=0, max_new_tokens=(repeats + 1) * REPEAT_TOKENS + 1)
        events = engine.stream([Request(task, prompt, sampling=sampling)])
        next(events)
        rate = best_rate(events, repeats)
        events.close()
        figures[f"{task} decode tokens/s"] = rate
        figures[f"{task} decode GB/s"] = step_bytes(model, engine.runner.state, task) * rate / 1e9
    request = Request(Task.MMU, tuple(range(100, 100 + prompt_length)), sampling=SamplingParams(seed=0, max_new_tokens=1))
    figures["prefill tokens/s"] = prompt_length / best(lambda: engine.run([request]), max(2, repeats // 4))
    return figures


def transformers_figures(config: OmniMambaConfig, prompt_length: int, repeats: int) -> dict[str, Any]:
    """The same rates of transformers' Mamba-2 in bf16 with the text head; it has no LoRA."""
    model = causal_model(mamba2_shape(config.backbone, config.text_vocab_size), "cpu")
    decoding = mamba2_decoding(model)
    rate = best_rate((decoding.step() for _ in itertools.count()), repeats)
    moved = num_bytes(model) + 2 * MambaState.zeros(config.backbone, 1, device="meta").bytes_per_slot
    return {
        "weights GB": num_bytes(model) / 1e9,
        "mmu decode tokens/s": rate,
        "mmu decode GB/s": moved * rate / 1e9,
        "prefill tokens/s": prompt_length / best(lambda: mamba2_decoding(model, prompt_length), 2),
    }


def llama_cpp_figures(config: OmniMambaConfig, kind: str, repeats: int) -> dict[str, Any]:
    """The rate of decoding of llama.cpp with the text head; it has no LoRA."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mamba2.gguf"
        _llama_cpp.write_model(path, config.backbone, config.text_vocab_size, kind)
        rate = _llama_cpp.tokens_per_second(path, REPEAT_TOKENS, repeats, torch.get_num_threads())
        size = path.stat().st_size
    moved = size + 2 * MambaState.zeros(config.backbone, 1, device="meta").bytes_per_slot
    return {
        "weights GB": size / 1e9,
        "mmu decode tokens/s": rate,
        "mmu decode GB/s": moved * rate / 1e9,
    }


def figures_of(config: OmniMambaConfig, case: str, prompt_length: int, repeats: int) -> dict[str, Any]:
    if case == "transformers":
        return transformers_figures(config, prompt_length, repeats)
    if case.startswith("llama.cpp"):
        return llama_cpp_figures(config, case.split()[1], repeats)
    return ours(config, case, prompt_length, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill and decode on the CPU: float, quantised, and other systems.")
    add_json_option(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[case for case in CASES if case not in ("float32", "fp8")])
    parser.add_argument("--preset", default="1.3b", help="whose language model is timed, without towers")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    config = dataclasses.replace(preset(arguments.preset), towers={})
    report = begin("cpu", **{"load before": os.getloadavg()[0]})
    report["cases"] = {}
    for case in arguments.cases:
        if case.startswith("llama.cpp") and not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
            print(f"{case}: not run, llama-cpp-python or gguf is not installed", flush=True)
            continue
        bandwidth = read_bandwidth("cpu")
        figures = figures_of(config, case, arguments.prompt_length, arguments.repeats)
        figures["read GB/s"] = max(bandwidth, read_bandwidth("cpu")) / 1e9
        for task in (task for task in Task if f"{task} decode GB/s" in figures):
            figures[f"{task} decode share"] = figures[f"{task} decode GB/s"] / figures["read GB/s"]
        report["cases"][case] = figures
        print(case, *(f"{name} {value:.3g}" for name, value in figures.items()), f"load {os.getloadavg()[0]:.1f}", sep="   ", flush=True)
        gc.collect()
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
