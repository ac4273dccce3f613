"""Small models in which no term is trivially zero or one."""

import pytest
import torch
from torch import nn

from omnimamba.config import BackboneConfig, LoraConfig
from omnimamba.model.mamba2 import Mamba2Backbone


@torch.no_grad()
def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode, with what initialisation leaves zero, one or tiny redrawn in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "lora_B" in name:
            parameter.copy_(0.1 * noise)
        elif name.endswith(("norm.weight", "norm_f.weight", ".D")):
            parameter.copy_(1 + 0.3 * noise)
        elif "embedding" in name or "positions" in name:
            parameter.copy_(0.5 * noise)
        elif name.endswith("A_log"):  # the ranges of trained models, which start as mamba_ssm's do
            parameter.copy_((1 + 15 * noise.sigmoid()).log())
        elif name.endswith("dt_bias"):
            dt = 1e-3 * 100 ** noise.sigmoid()
            parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif parameter.dim() > 1:
            parameter.copy_(noise * parameter.shape[1] ** -0.5)
        else:
            parameter.copy_(0.1 * noise)
    return module.eval()


@pytest.fixture(scope="session", name="redraw")
def redraw_fixture():
    return redraw


@pytest.fixture(scope="session")
def backbone() -> Mamba2Backbone:
    """Two layers with the published chunk size."""
    config = BackboneConfig(d_model=32, n_layer=2, d_state=16, headdim=16)
    return redraw(Mamba2Backbone(config, LoraConfig()))
