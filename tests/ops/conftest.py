"""The device of the kernel tests and how they compare.

Each kernel test runs in Triton's interpreter on the CPU and, marked `gpu`, on a GPU. The interpreter must be chosen before Triton is
imported, so its tests exist only in a process started with TRITON_INTERPRET=1: `test_triton_interpreter.py` starts one for each file.
"""

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from omnimamba.config import OmniMambaConfig
from omnimamba.model.omnimamba import OmniMambaModel

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICES = ["cpu"] if IS_INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel_device" in metafunc.fixturenames:
        metafunc.parametrize("kernel_device", KERNEL_DEVICES, scope="session")


@pytest.fixture(autouse=True)
def interpreter_rounds_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter truncates fp32 to bf16; a GPU rounds to nearest, which halves the errors and leaves no bias."""
    if not IS_INTERPRETED:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty returns NaN: what a kernel leaves unwritten shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.requires_grad else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@pytest.fixture(scope="session")
def random_model() -> Callable[..., OmniMambaModel]:
    return model_of_random_numbers


def model_of_random_numbers(config: OmniMambaConfig, initial: Sequence[str] = ("A_log", "dt_bias")) -> OmniMambaModel:
    """All parameters but those named `initial` are not those of initialisation, which hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # A_log, dt_bias
        model = OmniMambaModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] not in initial:
                scale = 0.5 if "norm" in name or parameter.dim() == 1 else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("norm" in name))
    return model


@pytest.fixture
def compare() -> Callable[..., None]:
    return compare_ops


@pytest.fixture(name="assert_near")
def fixture_of_assert_near() -> Callable[..., None]:
    return assert_near


@pytest.fixture(name="inputs")
def fixture_of_scan_inputs() -> Callable[..., dict[str, Tensor]]:
    return scan_inputs


def scan_inputs(
    device: str | torch.device, dtype: torch.dtype, b: int, l: int, *, h: int = 4, p: int = 32, g: int = 1, n: int = 16,
    has_initial: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """Step sizes and decays as a mixer starts from, and some ten times larger; x first, whose dtype is the products'."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (b, l, h, p), "B": (b, l, g, n), "C": (b, l, g, n)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["dt"] = torch.rand((b, l, h), generator=generator).pow(3)
    tensors["A"] = -(1 + 15 * torch.rand(h, generator=generator))
    tensors["D"] = torch.randn(h, generator=generator)
    if has_initial:
        tensors["initial_state"] = torch.randn((b, h, p, n), generator=generator)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def compare_ops(kernel: Callable, plain: Callable, tensors: dict[str, Tensor], *, plain_dtype: torch.dtype = torch.float32) -> None:
    """Outputs and gradients of two functions of the same named tensors, `plain` in `plain_dtype`.

    fp32: max |error| <= 1e-5 max |expected|. Half precision is compared with the same rounded inputs in fp32: rms(error) <= 1e-2
    rms(expected) in bf16, 2e-3 in fp16.
    """
    dtype = next(iter(tensors.values())).dtype
    arguments = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    expected_arguments = {name: tensor.detach().to(plain_dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}
    outs, expected_outs = kernel(**arguments), plain(**expected_arguments)
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(out.shape, generator=generator).to(dtype).to(out.device) for out in outs]
    torch.autograd.backward(outs, [way.to(out.dtype) for out, way in zip(outs, ways, strict=True)])
    torch.autograd.backward(expected_outs, [way.to(out.dtype) for out, way in zip(expected_outs, ways, strict=True)])
    pairs = {f"output {i}": pair for i, pair in enumerate(zip(outs, expected_outs, strict=True))}
    pairs |= {f"gradient of {name}": (arguments[name].grad, expected_arguments[name].grad) for name in tensors}
    for name, (found, expected) in pairs.items():
        assert found is not None and expected is not None, name
        assert found.shape == expected.shape, name
        assert_near(found, expected, name, dtype)
    for name, tensor in tensors.items():
        assert torch.equal(arguments[name], tensor), f"{name} was changed"


def assert_near(found: Tensor, expected: Tensor, name: str, dtype: torch.dtype) -> None:
    error, expected = found.double() - expected.double(), expected.double()
    if dtype == torch.float32:
        ratio, tolerance = error.abs().max() / expected.abs().max(), 1e-5
    else:
        ratio, tolerance = error.norm() / expected.norm(), {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert ratio <= tolerance, f"{name}: {ratio}"  # not so for NaN
