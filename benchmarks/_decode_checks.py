"""Whether decoding with the fused kernels is right: steps and tokens against those of the plain path.

A benchmark of the kernels calls this first and times nothing that is wrong. Models of few layers; several slots out of order, padding
rows, both tasks in one batch, poisoned buffers; one and two rows by the kernel of a whole step and by the vector kernels, more by matrix
products, eight of them by the kernels for Hopper where they fit.
"""

import dataclasses
import itertools
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from _model import image_request, random_model, text_request
from torch import Tensor

from omnimamba.config import OmniMambaConfig, Task
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import SamplingParams
from omnimamba.engine.runner import DecodeSample, Runner
from omnimamba.engine.sampler import SamplingRows, guide, sample, stream_key
from omnimamba.model.omnimamba import cast
from omnimamba.model.state import MambaState
from omnimamba.ops.quant import QuantizedWeight

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # rms(error) / rms(expected)
CHECKED_LAYERS = 3


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


def differences(config: OmniMambaConfig, device: str, checks: Sequence[Check] = CHECKS) -> dict[str, list[str]]:
    """What differs from the plain path, by the kernels of a step (see `FusedDecoder.path`) and in the whole engine; printed, too."""
    found: dict[str, list[str]] = {"one launch": [], "vector": [], "matrix": [], "hopper": [], "engine": []}
    try:
        for check in checks:
            for path, wrong in wrong_results(config, check, device):
                found[path].append(wrong)
        found["engine"] += wrong_requests(config, device)
    except Exception as error:
        traceback.print_exc()
        found = {path: [*wrong, repr(error)] for path, wrong in found.items()}
    for path, wrong in found.items():
        print(f"{path}: {len(wrong) or 'no'} differences from the plain path", *wrong, sep="\n  ", flush=True)
    return found


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
    checked: set[tuple[str, str]] = set()  # batches, and how they were computed
    for name, use_one_launch in itertools.product(check.batches, (None, False)):
        batch = batches[name]
        runner, expected_runner = Runner(model, 11, ssm_dtype=check.ssm_dtype), Runner(reference, 11)
        for state in (runner.state, expected_runner.state):
            torch.manual_seed(2)
            state.conv.copy_(torch.randn(state.conv.shape, device=device).to(check.dtype))
            state.ssm.copy_(torch.randn(state.ssm.shape, device=device).to(check.ssm_dtype))
            state.position.copy_(torch.arange(11) * 7 % 13)
        options = DecodeOptions(max_steps=1, use_one_launch=use_one_launch)
        decoder = FusedDecoder(model, runner.state, runner.image_table, options=options)
        path = decoder.path(decoder.bucket(len(rows_of(batch))).b)
        if (name, path) in checked:
            continue
        checked.add((name, path))
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
