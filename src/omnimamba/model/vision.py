"""Frozen image encoders of the understanding path, built by timm: patch features of all towers side by side.

The released model joins DINOv2 and SigLIP as Prismatic VLMs do (arXiv:2402.07865, section 4.3): the second-to-last block's patch
tokens of each, without final norm and without class or register tokens, concatenated per patch.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Self

import timm
import torch
from torch import Tensor, nn

from omnimamba.config import TowerConfig
from omnimamba.model.batch import doubled_if_alone


class VisionTowers(nn.Module):
    """Pixels to features [b, num_tokens, vision_dim] of towers with random weights; names below `towers.NAME.` are timm's own.

    The towers are used frozen, so `train()` leaves them in eval mode (no dropout, no drop path). Whoever trains one calls `train()`
    on it directly. Gradients are not switched off: a loss on the features can reach the pixels.
    """

    def __init__(self, towers: Mapping[str, TowerConfig]) -> None:
        super().__init__()
        self.configs = dict(towers)
        self.towers = nn.ModuleDict({name: build_tower(name, tower) for name, tower in towers.items()})
        self.towers.eval()

    def train(self, mode: bool = True) -> Self:
        """This module; sets its own flag, the towers stay in eval mode."""
        super().train(mode)
        self.towers.eval()
        return self

    def forward(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Features [b, num_tokens, vision_dim]. pixels: a normalised [b, 3, s, s] per tower, s its image_size.

        On a CPU, those of an image are the same to the last bit whatever else is in the batch.
        """
        self._check(pixels)
        tokens = []
        for name, tower in self.towers.items():
            batch = pixels[name] if takes_image_size(tower) else doubled_if_alone(pixels[name])
            (features,) = intermediates(tower, batch, [self.configs[name].layer])
            rows = features[: len(pixels[name])].flatten(2).mT  # [b, c, h, w] to [b, h*w, c]
            tokens.append(torch.cat([rows, rows.mean(1, keepdim=True)], 1) if self.configs[name].mean_token else rows)
        return torch.cat(tokens, dim=-1)

    def feature_maps(self, pixels: Mapping[str, Tensor]) -> list[Tensor]:
        """Maps [b, c, h, w] after each stage (ConvNets) or block (ViTs) up to `layer`, of all towers: input of a perceptual loss."""
        self._check(pixels)
        maps = []
        for name, tower in self.towers.items():
            depth = num_layers(tower)
            maps += intermediates(tower, pixels[name], list(range(self.configs[name].layer % depth + 1)))
        return maps

    def unread(self) -> set[str]:
        """Names of the parameters that no feature depends on, those of the layers after the one whose output is taken.

        For towers on the meta device: they have no gradient there, and nothing is computed.
        """
        sizes = {name: tower.image_size for name, tower in self.configs.items()}
        with torch.enable_grad():
            features = self({name: torch.empty(1, 3, size, size, device="meta") for name, size in sizes.items()})
            gradients = torch.autograd.grad(features.sum(), list(self.parameters()), allow_unused=True)
        return {name for (name, _), gradient in zip(self.named_parameters(), gradients, strict=True) if gradient is None}

    def _check(self, pixels: Mapping[str, Tensor]) -> None:
        if not self.towers:
            raise ValueError("there are no vision towers in this config, so no image can be read; use a config with `towers`")
        if pixels.keys() != self.configs.keys():
            raise ValueError(f"pixels are for towers {', '.join(pixels) or 'none'}; pass one entry for each of {', '.join(self.configs)}")
        for name, tower in self.configs.items():
            size = tower.image_size
            if pixels[name].dim() != 4 or pixels[name].shape[1:] != (3, size, size):
                raise ValueError(f"pixels[{name!r}] have shape {list(pixels[name].shape)}; pass [b, 3, {size}, {size}]")


def build_tower(name: str, config: TowerConfig) -> nn.Module:
    """The timm model of a tower. ValueError if its features do not have the layer, num_tokens and dim that the config says."""
    if not timm.is_model(config.timm_name):
        raise ValueError(f"tower {name}: timm {timm.__version__} has no model {config.timm_name!r}; timm.list_models() lists them")
    kwargs = dict(config.timm_kwargs)
    with torch.device("meta"):
        outline = timm.create_model(config.timm_name, pretrained=False, num_classes=0, **kwargs)
    if not hasattr(outline, "forward_intermediates"):
        raise ValueError(f"tower {name}: {config.timm_name} cannot give features of a layer; choose a ViT or a ConvNet of timm's")
    if takes_image_size(outline):
        kwargs.setdefault("img_size", config.image_size)
    depth = num_layers(outline)
    if not -depth <= config.layer < depth:
        raise ValueError(f"tower {name}: layer={config.layer}, but {config.timm_name} has {depth} layers; pass {-depth} to {depth - 1}")
    model = timm.create_model(config.timm_name, pretrained=False, num_classes=0, **kwargs)
    num_tokens, dim = feature_shape(model, config)
    if (num_tokens, dim) != (config.num_tokens, config.dim):
        raise ValueError(
            f"tower {name}: {config.timm_name} gives num_tokens={num_tokens}, dim={dim} at {config.image_size} pixels, but its config says "
            f"num_tokens={config.num_tokens}, dim={config.dim}; correct the config"
        )
    return model


def takes_image_size(model: nn.Module) -> bool:
    """Whether the model's class has an `img_size`, as those with a position table do; convolutional ones take any size."""
    return any("img_size" in inspect.signature(cls.__init__).parameters for cls in type(model).__mro__)


def num_layers(model: Any) -> int:
    """Blocks of a ViT, stages of a ConvNet: what `TowerConfig.layer` counts."""
    return len(model.feature_info)


def intermediates(model: Any, pixels: Tensor, layers: list[int]) -> list[Tensor]:
    """Maps [b, c, h, w] after the given layers, without final norm and prefix tokens; no later layer runs."""
    pixels = pixels.to(next(model.parameters()).dtype)
    return model.forward_intermediates(pixels, indices=layers, intermediates_only=True, output_fmt="NCHW", norm=False, stop_early=True)


class _Features(nn.Module):
    """Feature extraction as a module, so that it can run with other tensors in place of the parameters."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, pixels: Tensor) -> Tensor:
        return intermediates(self.model, pixels, [self.layer])[0]


@torch.no_grad()
def feature_shape(model: nn.Module, config: TowerConfig) -> tuple[int, int]:
    """(num_tokens, dim) of the tower's output, found on the meta device: nothing is computed."""
    extractor = _Features(model, config.layer)
    shapes = {key: value.to("meta") for key, value in (*extractor.named_parameters(), *extractor.named_buffers())}
    pixels = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    _, dim, h, w = torch.func.functional_call(extractor, shapes, (pixels,)).shape
    return h * w + config.mean_token, dim
