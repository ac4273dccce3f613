"""Quantised models: which weights a scheme of `ops/quant.py` replaces, in a model and among the tensors of a file.

in_proj, out_proj and the two embeddings, which are the heads too: all that decoding reads. What is small or runs once per prompt stays
float: LoRA pairs, convolutions, norms, A_log, D, dt_bias, positions and MLPs. A LoRA pair is never merged: its sum with a weight of few
bits would be rounded to them, and two tasks would need two copies.

`scheme` is a `config.Quantization` everywhere. In a state dict NAME.weight becomes NAME.weight.values and NAME.weight.scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from omnimamba.ops.quant import QuantizedWeight, linear, quantize

QUANTIZED = re.compile(r"(text_embedding|image_embedding|backbone\.layers\.\d+\.mixer\.(in_proj|out_proj))\.weight")
"""Names of the parameters that are replaced."""


class QuantizedLinear(nn.Module):
    """Linear layer without bias."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class QuantizedEmbedding(nn.Module):
    """Rows of a quantised table, in fp32."""

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids)


def quantize_model(model: nn.Module, scheme: str) -> None:
    """Replaces the parameters named by QUANTIZED in place. ValueError if the scheme does not fit one of them."""
    for name, parameter in list(model.named_parameters()):
        if not QUANTIZED.fullmatch(name):
            continue
        path = name.removesuffix(".weight")
        module, weight = model.get_submodule(path), named(name, parameter, scheme)
        if isinstance(module, nn.Linear):
            model.set_submodule(path, QuantizedLinear(weight))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(path, QuantizedEmbedding(weight))
        else:
            del module.weight
            module.weight = weight


def quantize_tensors(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """The tensors that the quantised model has in place of `tensors`."""
    result: dict[str, Tensor] = {}
    for name in tensors:
        if QUANTIZED.fullmatch(name):
            result |= {f"{name}.{part}": tensor for part, tensor in named(name, tensors[name], scheme).state_dict().items()}
        else:
            result[name] = tensors[name]
    return result


def named(name: str, tensor: Tensor, scheme: str) -> QuantizedWeight:
    try:
        return quantize(tensor, scheme)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def parameters(module: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Name, count of numbers and bytes of each parameter, quantised ones included."""
    for name, parameter in module.named_parameters():
        yield name, parameter.numel(), parameter.nbytes
    for name, weight in module.named_modules():
        if isinstance(weight, QuantizedWeight):
            n, k = weight.shape
            yield name, n * k, weight.values.nbytes + weight.scale.nbytes
