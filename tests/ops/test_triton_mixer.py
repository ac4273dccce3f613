"""A whole mixer on the kernels against the same mixer on the plain path: the layouts, dtypes and lengths that training really passes."""

from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")

from omnimamba.config import PRESETS, Task
from omnimamba.model.mamba2 import Mamba2Mixer, RMSNorm
from omnimamba.ops import conv, norm, ssd

NUM_DRAWS = 6

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def outputs_and_gradients(mixer, pre_norm, u, **states):
    u = u.detach().requires_grad_()
    outs = mixer(pre_norm(u), Task.MMU, **states)
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outs]
    parameters = {name: p for name, p in mixer.named_parameters() if "t2i" not in name.lower()} | {"pre_norm": pre_norm.weight, "u": u}
    grads = torch.autograd.grad(outs, list(parameters.values()), ways, allow_unused=True)
    return dict(zip(("y", "conv state", "ssm state"), outs, strict=True)) | dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("lengths", [None, [20, 7]])
@pytest.mark.parametrize("has_state", [False, True])
def test_mixer(kernel_device, monkeypatch, lengths, has_state):
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    mixer = Mamba2Mixer(config.backbone, config.lora).to(kernel_device).eval()
    pre_norm = RMSNorm(config.backbone.d_model, config.backbone.norm_eps).to(kernel_device)
    u = torch.randn(2, 20, config.backbone.d_model, device=kernel_device)
    given = {"lengths": None if lengths is None else torch.tensor(lengths, device=kernel_device)}
    if has_state:
        given["conv_state"] = torch.randn(2, config.backbone.conv_dim, config.backbone.d_conv, device=kernel_device)
        sizes = config.backbone.nheads, config.backbone.headdim, config.backbone.d_state
        given["ssm_state"] = torch.randn(2, *sizes, device=kernel_device)
    results = []
    for is_kernel in (True, False):
        for module in (conv, norm, ssd):
            monkeypatch.setattr(module, "runs_kernel", lambda x, is_kernel=is_kernel: is_kernel)
        results.append(outputs_and_gradients(mixer, pre_norm, u, **given))
    for name, expected in results[1].items():
        found = results[0][name]
        assert (found is None) == (expected is None), name
        if expected is not None and expected.any():
            error = (found - expected).abs().max() / expected.abs().max()
            assert error <= 1e-5, f"{name}: {error}"


def test_under_autocast(kernel_device, monkeypatch):
    """The dtypes of the plain path, and errors against fp32 not much above its errors, over draws: some gradients have four numbers."""
    config = PRESETS["tiny"]
    relative = defaultdict[str, list[list[float]]](list)
    for seed in range(NUM_DRAWS):
        torch.manual_seed(seed)
        mixer = Mamba2Mixer(config.backbone, config.lora).to(kernel_device).eval()
        pre_norm = RMSNorm(config.backbone.d_model, config.backbone.norm_eps).to(kernel_device)
        u = torch.randn(2, 20, config.backbone.d_model, device=kernel_device)
        results = {}
        for path, is_kernel, is_bf16 in (("kernel", True, True), ("plain", False, True), ("fp32", False, False)):
            for module in (conv, norm, ssd):
                monkeypatch.setattr(module, "runs_kernel", lambda x, is_kernel=is_kernel: is_kernel)
            with torch.autocast(kernel_device, dtype=torch.bfloat16, enabled=is_bf16):
                results[path] = outputs_and_gradients(mixer, pre_norm, u)
        for name, expected in results["fp32"].items():
            found, plain = results["kernel"][name], results["plain"][name]
            if expected is not None and expected.any():
                assert found.dtype == plain.dtype, name
                size = expected.double().norm()
                relative[name].append([((m.double() - expected.double()).norm() / size).item() for m in (found, plain)])
    for name, errors in relative.items():
        error, plain_error = torch.tensor(errors).square().mean(0).sqrt().tolist()
        assert error <= 1.5 * plain_error + 2e-3, f"{name}: {error}, plain {plain_error}"
