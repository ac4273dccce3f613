"""Models of other systems with random weights, built by transformers (or mamba_ssm), and steps of decoding with them.

A step starts from a past of the wanted length that is put into its cache directly: its values do not change the time. transformers
has renamed the cache's argument several times, so its name is looked up.
"""

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnimamba.config import BackboneConfig

TOKEN_ID = 7
PROMPT_LENGTH = 16  # of systems whose time does not depend on it
# Phi-1.5 with Show-o's vocabulary (github.com/showlab/Show-o, configs/showo_demo.yaml)
SHOW_O = {
    "model_type": "phi",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.5,
    "vocab_size": 58498,
}
# DeepSeek-LLM 1.3B, the language model of JanusFlow-1.3B (its config.json)
JANUSFLOW = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 102400,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
"""Replaces the sizes of a shape where a benchmark itself is tested."""


def causal_model(shape: dict[str, Any], device: str) -> Any:
    """A transformers model in bf16 for inference."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def num_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def mamba2_shape(config: BackboneConfig, vocab_size: int) -> dict[str, Any]:
    """The backbone with one tied head as a shape of transformers' Mamba-2; it has no LoRA."""
    return {
        "model_type": "mamba2",
        "num_heads": config.nheads,
        "head_dim": config.headdim,
        "hidden_size": config.d_model,
        "state_size": config.d_state,
        "num_hidden_layers": config.n_layer,
        "expand": config.expand,
        "conv_kernel": config.d_conv,
        "n_groups": config.ngroups,
        "chunk_size": config.chunk_size,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
    }


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword arguments of a forward pass that goes on from the cache and extends it."""
    names = inspect.signature(model.forward).parameters
    return {next(name for name in ("cache", "past_key_values", "cache_params") if name in names): cache, "use_cache": True}


class Decoding:
    """Decodes greedily with a model and a cache, one token a step."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model = model
        self.token = torch.full((1, 1), TOKEN_ID, device=model.device)
        self.arguments = with_cache(model, cache)

    @torch.no_grad()
    def step(self) -> None:
        self.token.copy_(self.model(self.token, **self.arguments).logits[:, -1:].argmax(-1))

    @torch.no_grad()
    def prefill(self, length: int) -> None:
        self.model(self.token.expand(1, length), logits_to_keep=1, **self.arguments)


def full_pass(model: Any, length: int, *, is_published: bool) -> Callable[[], Tensor]:
    """A step without a cache: all `length` positions are read for the next token.

    The quickest way: a causal kernel, logits of the last position only. is_published: as Show-o's mmu_generate calls its model, with
    a mask [length, length] and logits of all positions.
    """
    ids = torch.full((1, length), TOKEN_ID, device=model.device)
    arguments: dict[str, Any] = {"logits_to_keep": 1}
    if is_published:
        mask = torch.full((length, length), torch.finfo(model.dtype).min, dtype=model.dtype, device=model.device).triu(1)
        arguments = {"attention_mask": mask[None, None]}

    @torch.no_grad()
    def run() -> Tensor:
        return model(ids, use_cache=False, **arguments).logits[:, -1].argmax(-1)

    return run


def past(model: Any, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, heads, length, head_dim] of a layer."""
    config = model.config
    shape = (1, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    keys, values = (torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2))
    return keys, values


def dynamic_decoding(model: Any, length: int) -> Decoding:
    """A cache of `length` positions that grows by one a step."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer_idx in range(model.config.num_hidden_layers):
        cache.update(*past(model, length), layer_idx)
    return Decoding(model, cache)


def static_decoding(model: Any, length: int) -> tuple[Decoding, Callable[[], None]]:
    """A cache with room for `length` positions, and what empties its last place again, which each step fills."""
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=length)
    for layer_idx in range(model.config.num_hidden_layers):
        cache.update(*past(model, length - 1), layer_idx)

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length - 1)

    return Decoding(model, cache), rewind


def captured(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compiled(decoding: Decoding, rewind: Callable[[], None]) -> Callable[[], None]:
    """The step as torch.compile makes it for a static cache: without graph breaks, replayed as a CUDA graph."""
    decoding.model = torch.compile(decoding.model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    decoding.step()
    rewind()
    return decoding.step


def mamba2_decoding(model: Any, prompt_length: int = PROMPT_LENGTH) -> Decoding:
    """transformers' Mamba-2 after a prompt; its time does not depend on the length."""
    from transformers import DynamicCache

    decoding = Decoding(model, DynamicCache(config=model.config))
    decoding.prefill(prompt_length)
    return decoding


def mamba_ssm_milliseconds(config: BackboneConfig, vocab_size: int, device: str, num_tokens: int) -> float:
    """Per token of mamba_ssm's own generation with its CUDA graph, kept from a first run. ImportError without the package."""
    from mamba_ssm.models.config_mamba import MambaConfig  # pyright: ignore[reportMissingImports]
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # pyright: ignore[reportMissingImports]

    layer = {"layer": "Mamba2", "d_state": config.d_state, "headdim": config.headdim, "expand": config.expand}
    theirs = MambaConfig(d_model=config.d_model, n_layer=config.n_layer, vocab_size=vocab_size, ssm_cfg=layer, tie_embeddings=True)
    model = MambaLMHeadModel(theirs, device=device, dtype=torch.bfloat16).eval()
    ids = torch.full((1, PROMPT_LENGTH), TOKEN_ID, device=device)
    times = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, max_length=PROMPT_LENGTH + num_tokens, cg=True, top_k=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[-1] / num_tokens * 1e3
