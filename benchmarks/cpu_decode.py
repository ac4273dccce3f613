"""Times prefill and decode on the CPU at the shape of the 1.3B model, random weights, one sequence, beside transformers' Mamba-2.

    PYTHONPATH=src python3 benchmarks/cpu_decode.py --json out.json

Ours runs through the engine, from a request to sampled tokens; transformers through its model with a cache, greedy. A case is timed in
short repeats and the best one counts, since other programs may use the cores: the load is printed. Bytes per token count every weight
that a step reads once, the state read and written once; their rate stands beside the read bandwidth, the better of two measurements
around each case. At most
about 6 GB of memory: models are made tensor by tensor in the type that they run in. llama.cpp is not run: llama-cpp-python is compiled
when it is installed. The last line on stdout is JSON.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# as the command line does; both are read when the libraries are loaded
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor, nn

from omnimamba.config import OmniMambaConfig, Quantization, Task, preset
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.model import weights
from omnimamba.model.omnimamba import OmniMambaModel, cast
from omnimamba.model.quantize import parameters
from omnimamba.model.state import MambaState
from omnimamba.ops.quant import QuantizedWeight, quantize

CASES = ("float32", "bfloat16", "int8", "fp8", "int4", "transformers")
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


def bytes_per_token(model: nn.Module, config: OmniMambaConfig, task: Task) -> int:
    """Read and written by a step of one sequence: backbone, the LoRA and the head of the task, the state twice."""
    head = "image_embedding" if task is Task.T2I else "text_embedding"
    other_lora = tuple(f".{other}" for other in Task if other is not task)
    read = sum(num for name, _, num in parameters(model) if name.startswith(("backbone.", head)) and not name.endswith(other_lora))
    return read + 2 * MambaState.zeros(config.backbone, 1, device="meta").bytes_per_slot


def read_bandwidth() -> float:
    """Bytes per second of summing 256 MiB, the best of 20."""
    values = torch.ones(2**26)
    return values.nbytes / best(values.sum, 20)


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
        figures[f"{task} decode GB/s"] = bytes_per_token(model, config, task) * rate / 1e9
    request = Request(Task.MMU, tuple(range(100, 100 + prompt_length)), sampling=SamplingParams(seed=0, max_new_tokens=1))
    figures["prefill tokens/s"] = prompt_length / best(lambda: engine.run([request]), max(2, repeats // 4))
    return figures


@torch.no_grad()
def transformers_figures(config: OmniMambaConfig, prompt_length: int, repeats: int) -> dict[str, Any]:
    """The same rates of transformers' Mamba-2 in bf16 with the text head; it has no LoRA."""
    from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM

    backbone = config.backbone
    theirs = Mamba2Config(
        num_heads=backbone.nheads,
        head_dim=backbone.headdim,
        hidden_size=backbone.d_model,
        state_size=backbone.d_state,
        num_hidden_layers=backbone.n_layer,
        expand=backbone.expand,
        conv_kernel=backbone.d_conv,
        n_groups=backbone.ngroups,
        chunk_size=backbone.chunk_size,
        vocab_size=config.text_vocab_size,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model: Any = Mamba2ForCausalLM(theirs)
    model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.fill_(STD)
    cache = DynamicCache(config=theirs)
    model(torch.full((1, 16), 100), cache=cache, use_cache=True)

    def steps() -> Iterator[None]:
        token = torch.full((1, 1), 100)
        while True:
            token = model(token, cache=cache, use_cache=True).logits.argmax(-1)
            yield

    rate = best_rate(steps(), repeats)
    moved = sum(p.nbytes for p in model.parameters()) + 2 * MambaState.zeros(backbone, 1, device="meta").bytes_per_slot
    prompt = torch.full((1, prompt_length), 100)
    prefill = best(lambda: model(prompt, cache=DynamicCache(config=theirs), use_cache=True, logits_to_keep=1), 2)
    return {
        "weights GB": sum(p.nbytes for p in model.parameters()) / 1e9,
        "mmu decode tokens/s": rate,
        "mmu decode GB/s": moved * rate / 1e9,
        "prefill tokens/s": prompt_length / prefill,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefill and decode on the CPU: float, quantised, and transformers' Mamba-2.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["bfloat16", "int8", "int4", "transformers"])
    parser.add_argument("--preset", default="1.3b", help="whose language model is timed, without towers")
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=12)
    arguments = parser.parse_args()
    config = dataclasses.replace(preset(arguments.preset), towers={})
    report: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": " ".join(sys.argv),
        "load before": os.getloadavg()[0],
        "cases": {},
    }
    for case in arguments.cases:
        measure = transformers_figures if case == "transformers" else lambda *sizes, case=case: ours(sizes[0], case, *sizes[1:])
        bandwidth = read_bandwidth()
        figures = measure(config, arguments.prompt_length, arguments.repeats)
        figures["read GB/s"] = max(bandwidth, read_bandwidth()) / 1e9
        for task in (task for task in Task if f"{task} decode GB/s" in figures):
            figures[f"{task} decode share"] = figures[f"{task} decode GB/s"] / figures["read GB/s"]
        report["cases"][case] = figures
        print(case, *(f"{name} {value:.3g}" for name, value in figures.items()), f"load {os.getloadavg()[0]:.1f}", sep="   ", flush=True)
        gc.collect()
    text = json.dumps(report)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
