"""Times the kernels of training and prefill beside their plain PyTorch definitions, at the shapes of nano and of 1.3B.

    PYTHONPATH=src python3 benchmarks/ops.py --json out.json

Needs a CUDA device, torch and triton. Every kernel is first compared with its definition in fp32, outputs and gradients, on a part of
the batch; if one is off, nothing is timed and the exit code is 1. GB/s counts each input and output once, whatever is read again, and is
set beside the read bandwidth measured in the same run. Where the scan cuts its sequences into spans, its time in one span stands beside
it; `--sweep` tries other spans and launch choices there. The last line on stdout is JSON.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import torch
from _measure import milliseconds, read_bandwidth
from _report import add_json_option, begin, finish, lacks
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
    "1.3b piece": {"b": 1, "l": 4096, "h": 64, "p": 64, "n": 128, "chunk_size": 256},
    # chunks of 64: the definition's (q, q) matrices of 256 positions and their gradients would take tens of GB
    "1.3b 16K": {"b": 1, "l": 16_384, "h": 64, "p": 64, "n": 128, "chunk_size": 64},
    "1.3b 64K": {"b": 1, "l": 65_536, "h": 64, "p": 64, "n": 128, "chunk_size": 64},
}
INTERPRETED = {"interpreted": {"b": 1, "l": 513, "h": 1, "p": 16, "n": 16, "chunk_size": 64}}
# what --sweep tries for the scan's forward pass: (positions of a chunk, warps, stages), each with these spans; in one span a program
# takes half a head, and a chunk has 32 positions at most
SCAN_TILES = ((32, 4, 2), (32, 4, 3), (32, 8, 3), (64, 4, 2), (64, 8, 2), (64, 8, 3))
SCAN_SPANS = (1, 2, 4, 8, 16, 32)

Tensors = dict[str, Tensor]
Op = Callable[..., Tensor]  # of named tensors; the output whose gradient training computes


def cases(shape: dict[str, int], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensors, dict[str, Op]]]:
    """Name, inputs, definition ("plain") and kernels of each operator, with the layouts that a mixer gives them: slices of one tensor."""
    from omnimamba.ops import conv, norm, ssd
    from omnimamba.ops.triton import conv as conv_kernel
    from omnimamba.ops.triton import norm as norm_kernel
    from omnimamba.ops.triton import ssd as ssd_kernel

    b, l, h, p, n, chunk_size = shape.values()
    d_inner = h * p
    conv_dim = d_inner + 2 * n

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    projected = randn(b, l, d_inner + conv_dim + h)
    z, xBC, _ = projected.split((d_inner, conv_dim, h), -1)
    weights = {"weight": torch.randn(conv_dim, 4, device=device), "bias": torch.randn(conv_dim, device=device)}
    yield (
        "causal_conv1d",
        {"x": xBC} | weights,
        {"plain": lambda **t: conv.plain_causal_conv1d(**t)[0], "kernel": lambda **t: conv_kernel.causal_conv1d(**t)[0]},
    )

    x, B, C = randn(b, l, conv_dim).split((d_inner, n, n), -1)
    scan = {"x": x.unflatten(-1, (h, p)), "B": B.unflatten(-1, (1, n)), "C": C.unflatten(-1, (1, n))}
    scan |= {"dt": torch.rand(b, l, h, device=device) * 0.1, "A": -1 - 15 * torch.rand(h, device=device), "D": torch.ones(h, device=device)}
    paths: dict[str, Op] = {
        "plain": lambda **t: ssd.plain_ssd_chunk_scan(**t, chunk_size=chunk_size)[0],
        "kernel": lambda **t: ssd_kernel.ssd_chunk_scan(**t)[0],
    }
    if ssd_kernel.num_spans(b * h, l) > 1:
        paths["1 span"] = lambda **t: ssd_kernel.ssd_chunk_scan(**t, spans=1)[0]
    yield "ssd_chunk_scan", scan, paths

    yield (
        "gated_rms_norm",
        {"y": randn(b, l, d_inner), "z": z, "weight": torch.ones(d_inner, device=device)},
        {"plain": lambda **t: norm.plain_gated_rms_norm(**t, eps=EPS), "kernel": lambda **t: norm_kernel.gated_rms_norm(**t, eps=EPS)},
    )


def outputs_and_gradients(op: Op, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    inputs = {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}
    y = op(**inputs)
    torch.manual_seed(1)
    dy = torch.randn(y.shape, device=y.device).to(torch.bfloat16)
    grads = torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def wrong_results(tensors: Tensors, paths: dict[str, Op], dtype: torch.dtype) -> Iterator[str]:
    part = {name: t[:CHECKED_ROWS] if t.dim() > 2 else t for name, t in tensors.items()}
    # the convolution's definition rounds its weights to x's dtype
    part = {name: t.to(dtype).to(t.dtype) if name in ("weight", "bias") else t for name, t in part.items()}
    expected = outputs_and_gradients(paths["plain"], part, torch.float32)
    for path in paths.keys() - {"plain"}:
        found = outputs_and_gradients(paths[path], part)
        errors = {name: relative_error(found[name], value) for name, value in expected.items()}
        yield from (f"{path}: {name} is off by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCES[dtype])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def num_bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def timed(op: Op, tensors: Tensors, bandwidth: float, repeats: int, device: str) -> dict[str, float] | str:
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
            ms = milliseconds(run, repeats, device)
            figures |= {f"{name} ms": ms, f"{name} GB/s": moved / ms / 1e6, f"{name} share": moved / ms * 1e3 / bandwidth}
    except torch.cuda.OutOfMemoryError:
        return "out of memory"
    finally:
        torch.cuda.empty_cache()
    return figures


@torch.no_grad()
def sweep(shape: dict[str, int], dtype: torch.dtype, device: str, repeats: int) -> Iterator[tuple[str, float | str]]:
    """Milliseconds of the scan's forward pass, or why there are none, with each launch choice and number of spans."""
    from omnimamba.ops.triton import ssd as ssd_kernel
    from omnimamba.ops.triton.launch import LAUNCHES, Launch

    base = dict(LAUNCHES)
    tensors, paths = next((tensors, paths) for op, tensors, paths in cases(shape, dtype, device) if op == "ssd_chunk_scan")
    expected = paths["kernel"](**tensors).float()
    for rows, warps, stages in SCAN_TILES:
        for name in ("ssd_forward", "ssd_spans"):
            LAUNCHES[name if dtype == torch.bfloat16 else f"{name}_fp32"] = ((torch.inf, Launch(rows, 0, warps, stages)),)
        for spans in SCAN_SPANS:

            def scan(spans: int = spans) -> Tensor:
                return ssd_kernel.ssd_chunk_scan(**tensors, spans=spans)[0]

            try:
                error = relative_error(scan(), expected)
                figure = milliseconds(scan, repeats, device) if error <= TOLERANCES[dtype] else f"off by {error:.1e}"
            except Exception as failure:  # a tile too large for the GPU
                figure = f"{type(failure).__name__}: {str(failure)[:100]}"
            yield f"{rows} positions, {warps} warps, {stages} stages, {spans} spans", figure
    LAUNCHES.update(base)


def line(figures: dict[str, float] | str) -> str:
    if isinstance(figures, str):
        return figures
    return "   ".join(
        f"{name} {figures[f'{name} ms']:8.3f} ms {figures[f'{name} GB/s']:7.0f} GB/s {figures[f'{name} share']:4.0%}"
        for name in ("forward", "forward+backward")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Kernels of training and prefill against their plain PyTorch definitions.")
    add_json_option(parser)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--sweep", action="store_true", help="try other launch choices of the scan")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--interpret", action="store_true", help="a tiny shape on the CPU in Triton's interpreter, as a test")
    arguments = parser.parse_args()
    device = "cpu" if arguments.interpret else "cuda"
    if lacks(device, triton=True):
        return 2
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    shapes = INTERPRETED if arguments.interpret else {name: SHAPES[name] for name in arguments.shapes}
    from omnimamba.ops.triton import ssd, ssd_tiles

    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    failures = []
    full_grid = ssd_tiles.FULL_GRID
    for ssd_tiles.FULL_GRID in (full_grid, 1):  # few rows are split over more programs than the batch that is timed: check both ways
        for shape, sizes in shapes.items():
            for op, tensors, paths in cases(sizes | {"b": min(sizes["b"], CHECKED_ROWS)}, dtype, device):
                failures += [f"{shape}: {op}: {wrong}" for wrong in wrong_results(tensors, paths, dtype)]
    ssd_tiles.FULL_GRID = full_grid
    if failures:
        print("nothing is timed, results are wrong:", *failures, sep="\n", file=sys.stderr)
        return 1

    report = begin(device, dtype=arguments.dtype)
    bandwidth = read_bandwidth(device)
    report |= {"read GB/s": bandwidth / 1e9, "cases": []}
    print(f"kernels equal their definitions; read bandwidth {bandwidth / 1e9:.0f} GB/s")
    for shape, sizes in shapes.items():
        print(f"{shape}: {sizes}")
        for op, tensors, paths in cases(sizes, dtype, device):
            for path, run in paths.items():
                figures = timed(run, tensors, bandwidth, arguments.repeats, device)
                print(f"  {op:15} {path:7} {line(figures)}", flush=True)
                report["cases"].append({"shape": shape, "op": op, "path": path, "figures": figures})
    if arguments.sweep:
        report["sweep"] = {}
        for shape, sizes in shapes.items():
            if ssd.num_spans(sizes["b"] * sizes["h"], sizes["l"]) > 1:
                print(f"{shape}, the scan forwards")
                report["sweep"][shape] = {}
                for choice, figure in sweep(sizes, dtype, device, arguments.repeats):
                    print(f"  {choice}: {figure if isinstance(figure, str) else f'{figure:.3f} ms'}", flush=True)
                    report["sweep"][shape][choice] = figure
    finish(report, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
