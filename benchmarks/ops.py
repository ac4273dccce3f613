"""Times the kernels of training and prefill beside their plain PyTorch definitions, at the shapes of nano and of 1.3B.

    PYTHONPATH=src python3 benchmarks/ops.py --json out.json

Needs a CUDA device, torch and triton. Every kernel is first compared with its definition in fp32, outputs and gradients, on a part of
the batch; if one is off, nothing is timed and the exit code is 1. GB/s counts each input and output once, whatever is read again, and is
set beside the read bandwidth measured in the same run. The last line on stdout is JSON.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _git import commit
from torch import Tensor

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # rms(error) / rms(expected)
CHECKED_ROWS = 4
EPS = 1e-5
SHAPES: dict[str, dict[str, int]] = {
    "nano T2I": {"b": 256, "l": 293, "h": 8, "p": 64, "n": 64, "chunk_size": 64},
    "nano MMU": {"b": 512, "l": 64, "h": 8, "p": 64, "n": 64, "chunk_size": 64},
    "1.3b T2I": {"b": 48, "l": 329, "h": 64, "p": 64, "n": 128, "chunk_size": 256},
    "1.3b MMU": {"b": 3, "l": 1000, "h": 64, "p": 64, "n": 128, "chunk_size": 256},
    "1.3b prefill": {"b": 1, "l": 760, "h": 64, "p": 64, "n": 128, "chunk_size": 256},
}

Tensors = dict[str, Tensor]
Op = Callable[..., Tensor]  # of named tensors; the output whose gradient training computes


def cases(shape: dict[str, int], dtype: torch.dtype) -> Iterator[tuple[str, Tensors, Op, Op]]:
    """Name, inputs, kernel and definition of each operator, with the layouts that a mixer gives them: slices of in_proj's output."""
    from omnimamba.ops import conv, norm, ssd
    from omnimamba.ops.triton import conv as conv_kernel
    from omnimamba.ops.triton import norm as norm_kernel
    from omnimamba.ops.triton import ssd as ssd_kernel

    b, l, h, p, n, chunk_size = shape.values()
    d_inner = h * p
    conv_dim = d_inner + 2 * n

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=dtype)

    projected = randn(b, l, d_inner + conv_dim + h)
    z, xBC, _ = projected.split((d_inner, conv_dim, h), -1)
    weights = {"weight": torch.randn(conv_dim, 4, device="cuda"), "bias": torch.randn(conv_dim, device="cuda")}
    yield (
        "causal_conv1d",
        {"x": xBC} | weights,
        lambda **t: conv_kernel.causal_conv1d(**t)[0],
        lambda **t: conv.plain_causal_conv1d(**t)[0],
    )

    x, B, C = randn(b, l, conv_dim).split((d_inner, n, n), -1)
    scan = {"x": x.unflatten(-1, (h, p)), "B": B.unflatten(-1, (1, n)), "C": C.unflatten(-1, (1, n))}
    scan |= {"dt": torch.rand(b, l, h, device="cuda") * 0.1, "A": -1 - 15 * torch.rand(h, device="cuda"), "D": torch.ones(h, device="cuda")}
    yield (
        "ssd_chunk_scan",
        scan,
        lambda **t: ssd_kernel.ssd_chunk_scan(**t)[0],
        lambda **t: ssd.plain_ssd_chunk_scan(**t, chunk_size=chunk_size)[0],
    )

    yield (
        "gated_rms_norm",
        {"y": randn(b, l, d_inner), "z": z, "weight": torch.ones(d_inner, device="cuda")},
        lambda **t: norm_kernel.gated_rms_norm(**t, eps=EPS),
        lambda **t: norm.plain_gated_rms_norm(**t, eps=EPS),
    )


def outputs_and_gradients(op: Op, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    inputs = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}
    y = op(**inputs)
    torch.manual_seed(1)
    dy = torch.randn(y.shape, device=y.device).to(torch.bfloat16)
    grads = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def wrong_results(tensors: Tensors, kernel: Op, plain: Op, dtype: torch.dtype) -> list[str]:
    part = {name: t[:CHECKED_ROWS] if t.dim() > 2 else t for name, t in tensors.items()}
    # the convolution's definition rounds its weights to x's dtype
    part = {name: t.to(dtype).to(t.dtype) if name in ("weight", "bias") else t for name, t in part.items()}
    found, expected = outputs_and_gradients(kernel, part), outputs_and_gradients(plain, part, torch.float32)
    errors = {name: ((found[name].float() - value).norm() / value.norm()).item() for name, value in expected.items()}
    return [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCES[dtype]]


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def read_bandwidth(repeats: int) -> float:
    """Bytes per second of summing 4 GiB."""
    values = torch.ones(2**30, device="cuda")
    return 2**32 / milliseconds(values.sum, repeats) * 1e3


def num_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def timed(op: Op, tensors: Tensors, bandwidth: float, repeats: int) -> dict[str, float] | str:
    """Times of the forward pass alone and with the backward pass, or why there are none."""
    inputs = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    with torch.no_grad():
        y = op(**inputs)
    dy = torch.randn_like(y)
    forward_bytes = num_bytes(*inputs.values(), y)
    both_bytes = 2 * forward_bytes + num_bytes(*inputs.values())

    def forward() -> None:
        with torch.no_grad():
            op(**inputs)

    def both() -> None:
        torch.autograd.grad(op(**inputs), list(inputs.values()), dy)

    figures = {}
    try:
        for name, run, moved in (("forward", forward, forward_bytes), ("forward+backward", both, both_bytes)):
            ms = milliseconds(run, repeats)
            figures |= {f"{name} ms": ms, f"{name} GB/s": moved / ms / 1e6, f"{name} share": moved / ms * 1e3 / bandwidth}
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    finally:
        torch.cuda.empty_cache()
    return figures


def line(figures: dict[str, float] | str) -> str:
    if isinstance(figures, str):
        return figures
    return "   ".join(
        f"{name} {figures[f'{name} ms']:8.3f} ms {figures[f'{name} GB/s']:7.0f} GB/s {figures[f'{name} share']:4.0%}"
        for name in ("forward", "forward+backward")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Kernels of training and prefill against their plain PyTorch definitions.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        print("benchmarks/ops.py times GPU kernels: it needs a CUDA device and Triton, and found none", file=sys.stderr)
        return 2
    import triton

    from omnimamba.ops.triton import ssd as ssd_kernel

    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    failures = []
    full_grid = ssd_kernel.FULL_GRID
    for ssd_kernel.FULL_GRID in (full_grid, 1):  # few rows are split over more programs than the batch that is timed: check both ways
        for shape in arguments.shapes:
            sizes = SHAPES[shape]
            for op, tensors, kernel, plain in cases(sizes | {"b": min(sizes["b"], CHECKED_ROWS)}, dtype):
                failures += [f"{shape}: {op}: {wrong}" for wrong in wrong_results(tensors, kernel, plain, dtype)]
    ssd_kernel.FULL_GRID = full_grid
    if failures:
        print("nothing is timed, results are wrong:", *failures, sep="\n", file=sys.stderr)
        return 1

    bandwidth = read_bandwidth(arguments.repeats)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "command": " ".join(sys.argv),
        "dtype": arguments.dtype,
        "read GB/s": bandwidth / 1e9,
        "cases": [],
    }
    print(", ".join(f"{name} {report[name]}" for name in ("device", "torch", "triton", "commit", "command", "dtype")))
    print(f"kernels equal their definitions; read bandwidth {bandwidth / 1e9:.0f} GB/s")
    for shape in arguments.shapes:
        print(f"{shape}: {SHAPES[shape]}")
        for op, tensors, kernel, plain in cases(SHAPES[shape], dtype):
            for path, run in (("plain", plain), ("kernel", kernel)):
                figures = timed(run, tensors, bandwidth, arguments.repeats)
                print(f"  {op:15} {path:7} {line(figures)}", flush=True)
                report["cases"].append({"shape": shape, "op": op, "path": path, "figures": figures})
    text = json.dumps(report)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
