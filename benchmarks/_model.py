"""What the benchmarks run: models of random weights in a preset's shape, requests to them, and what a step of decoding moves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from _measure import synchronize
from torch import nn

from omnimamba.config import OmniMambaConfig, Task
from omnimamba.engine.engine import Engine
from omnimamba.engine.request import Request, SamplingParams
from omnimamba.model.omnimamba import OmniMambaModel, cast
from omnimamba.model.quantize import parameters, quantize_model
from omnimamba.model.state import MambaState

if TYPE_CHECKING:
    from omnimamba.model.weights import Bundle


def random_model(config: OmniMambaConfig, dtype: torch.dtype, device: str, scheme: str | None = None) -> OmniMambaModel:
    """A language model made on the device, whose norms and LoRA are not those of initialisation, which hide mistakes."""
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


def random_bundle(config: OmniMambaConfig, dtype: torch.dtype, device: str, tokenizer_file: Path | None = None) -> Bundle:
    """The same with towers and VQ tokenizer."""
    from omnimamba.model.vision import VisionTowers  # needs timm, which decoding does not
    from omnimamba.model.vq import VQModel
    from omnimamba.model.weights import Bundle

    model = random_model(config, dtype, device)
    with torch.device("meta"):
        unread = VisionTowers(config.towers).unread()
    with torch.device(device):
        encoders: list[nn.Module] = [VisionTowers(config.towers), VQModel(config.vq)]
    for name, parameter in encoders[0].named_parameters():
        if name in unread:  # as `weights.build` leaves it
            parameter.data = parameter.data.cpu()
    vision, vq = (cast(encoder.eval().requires_grad_(False), dtype) for encoder in encoders)
    assert isinstance(vision, VisionTowers) and isinstance(vq, VQModel)
    return Bundle(config, model, vision, vq, tokenizer_file)


def image_request(config: OmniMambaConfig, num_images: int) -> Request:
    """A caption of random ids."""
    ids = torch.arange(config.t2i_prompt_length) * 7919 % config.base_vocab_size
    return Request(Task.T2I, tuple(ids.tolist()), sampling=SamplingParams(seed=0), num_samples=num_images)


def text_request(config: OmniMambaConfig, num_tokens: int) -> Request:
    """A question of random ids about no image, whose place is there."""
    ids = torch.arange(31) * 7919 % config.base_vocab_size
    return Request(Task.MMU, tuple(ids.tolist()), sampling=SamplingParams(seed=0, max_new_tokens=num_tokens))


def timed_request(engine: Engine, request: Request, device: str) -> tuple[float, float, int]:
    """Seconds to the end of a request, seconds to its first token, and the number of its tokens; prompt and host included."""
    synchronize(device)
    start = time.perf_counter()
    engine.submit(request)
    first, num_tokens = 0.0, 0
    while engine.has_work:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            num_tokens += 1
        if num_tokens and not first:
            first = time.perf_counter() - start
    return time.perf_counter() - start, first, num_tokens


def step_bytes(model: OmniMambaModel, state: MambaState, task: Task, num_rows: int = 1) -> int:
    """Bytes that a step of `num_rows` sequences moves at least: weights and states read once, states written once.

    Weights are those of the backbone with the task's LoRA pair, and of the task's head. state: of any number of slots.
    """
    head = "image_embedding" if task is Task.T2I else "text_embedding"
    other_lora = tuple(f".{other}" for other in Task if other is not task)
    read = sum(num for name, _, num in parameters(model) if name.startswith(("backbone.", head)) and not name.endswith(other_lora))
    return read + 2 * num_rows * state.bytes_per_slot
