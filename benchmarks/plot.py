"""Draws the figures of benchmarks/results as PNG files for the README and docs/performance.md.

    python benchmarks/plot.py

A plot is named after what it shows and where it was measured: `batch-h100.png` comes from `decode-h100.json`. Plots whose benchmark has
no results yet are named as skipped. A system has the same colour in all of them.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks/results", ROOT / "docs/images"
INK, GREY, GRID = "#222222", "#9a9a9a", "#e4e4e4"
COLOURS = {
    "omnimamba, fp32": "#0b2f5c",
    "omnimamba, bf16": "#1f5fa8",
    "omnimamba, int8": "#4b9be0",
    "omnimamba, fp8": "#5cc3d6",
    "omnimamba, int4": "#a8cdf0",
    "transformers' Mamba-2": "#2e9e62",
    "mamba_ssm": "#9bb53c",
    "llama.cpp": "#8e5ea2",
    "Show-o shape, no cache": "#c8322b",
    "Show-o shape, no cache, as published": "#e8948f",
    "JanusFlow shape, growing cache": "#e69a17",
    "JanusFlow shape, static cache, CUDA graph": "#b5720a",
    "JanusFlow shape, static cache, compiled": "#6e4506",
}
CPU_SYSTEMS: dict[str, str] = {"float32": "omnimamba, fp32", "bfloat16": "omnimamba, bf16", "transformers": "transformers' Mamba-2"}
CPU_SYSTEMS |= {scheme: f"omnimamba, {scheme}" for scheme in ("int8", "fp8", "int4")}
"""Cases of cpu_decode.py that are not called as elsewhere."""
TIMED_OPS = ("causal_conv1d", "ssd_chunk_scan", "gated_rms_norm")  # of ops.py today; an older file may hold more

Report = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]


# ---- what is drawn


def images_by_batch(report: Report) -> Series:
    """(batch, images/s) by the type of the state, of a report of decode.py."""
    series: Series = {}
    for name, figures in report["cases"].items():
        found = re.fullmatch(r"T2I(?: x\d+)?(?:, (bf16) state)?", name)
        if found and "error" not in figures:
            series.setdefault(found[1] or "fp32", []).append((figures["rows"], figures["images/s"]))
    return {name: sorted(points) for name, points in series.items()}


def shares(report: Report) -> list[tuple[str, float, str]]:
    """(case, share of the read bandwidth, system) of a report of decode.py."""
    rows = []
    for name, figures in report["cases"].items():
        scheme = next((scheme for scheme in ("int8", "fp8", "int4") if f", {scheme}" in name), "bf16")
        if "error" not in figures:
            rows.append((name.replace("T2I", "painting"), figures["share"], f"omnimamba, {scheme}"))
    return rows


def by_length(report: Report, key: str) -> Series:
    """Points of each system of a report of long_decode.py: (tokens, seconds) for `seconds for`, (length, GB) for `GB`."""
    series: Series = {}
    for name, figures in report["cases"].items():
        if key == "GB":
            found = {length: point.get("GB") for length, point in figures.get("by length", {}).items()}
            if figures.get("growth") == "none":
                continue
        else:
            found = figures.get(key, {})
        points = sorted((float(length), value) for length, value in found.items() if value is not None)
        if points:
            series[name] = points
    return series


def cpu_rates(report: Report, key: str) -> list[tuple[str, float]]:
    """(system, tokens/s) of a report of cpu_decode.py."""
    return [(CPU_SYSTEMS.get(case) or case, figures[key]) for case, figures in report["cases"].items() if key in figures]


def op_times(report: Report, key: str) -> list[tuple[str, float, float]]:
    """(shape and operator, figure of the definition, figure of the kernel), forward and backward, of a report of ops.py."""
    found: dict[str, dict[str, float]] = {}
    for case in report["cases"]:
        figures = case["figures"] if isinstance(case["figures"], dict) else {}  # or why there are none
        if case["op"] in TIMED_OPS and f"forward+backward {key}" in figures:
            found.setdefault(f"{case['shape']}: {case['op']}", {})[case["path"]] = figures[f"forward+backward {key}"]
    return [(name, paths["plain"], paths["kernel"]) for name, paths in found.items() if {"plain", "kernel"} <= paths.keys()]


# ---- drawing


def colour(system: str) -> str:
    return COLOURS.get(system, GREY)


def canvas(report: Report, title: str, size: tuple[float, float] = (7.2, 4.2), num_panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    figure.suptitle(f"{title} ({report.get('device') or report['processor']})", x=0.01, ha="left", fontsize=11, color=INK)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(GREY)
        panel.tick_params(colors=INK, labelsize=9, length=3)
        panel.set_axisbelow(True)
    return figure, panels


def thousands(value: float, _: Any = None) -> str:
    """1024 as 1K, 100000 as 100K."""
    for unit in (1024, 1000):
        if value >= unit and value % unit == 0:
            return f"{value / unit:g}K"
    return f"{value:g}"


def spaced(lengths: Iterable[float], is_log: bool) -> list[float]:
    """Of the lengths, those whose labels have room beside that of the next larger one kept; a log axis leaves room by ratio."""
    ordered = sorted(lengths, reverse=True)
    kept = ordered[:1]
    for length in ordered[1:]:
        if (kept[-1] / length >= 1.5) if is_log else (kept[-1] - length >= 0.08 * ordered[0]):
            kept.append(length)
    return kept[::-1]


def lines(panel: Axes, series: Series, *, unit: str, is_log: bool) -> None:
    """A line per system over lengths; in the legend the steepest comes first. is_log: both axes are."""
    for name, points in sorted(series.items(), key=lambda item: -item[1][-1][1] / item[1][-1][0]):
        panel.plot(*zip(*points, strict=True), color=colour(name), label=name, marker="o", markersize=3.5, linewidth=1.8)
    if is_log:
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    panel.set_xticks(spaced({length for points in series.values() for length, _ in points}, is_log))
    panel.minorticks_off()
    panel.xaxis.set_major_formatter(FuncFormatter(thousands))
    panel.set_ylabel(unit, fontsize=9, color=INK)
    panel.grid(axis="y", color=GRID)
    panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def bars(panel: Axes, rows: Iterable[tuple[str, float, str]], *, text: Callable[[float], str]) -> None:
    """(label, value, colour) from top to bottom, each bar with its value."""
    labels, values, colours = zip(*rows, strict=True)
    places = range(len(values))
    panel.barh(places, values, color=colours, height=0.68)
    panel.set_yticks(places, labels)
    panel.invert_yaxis()
    panel.margins(y=0.02)
    panel.set_xlim(right=1.14 * max(values))
    for place, value in enumerate(values):
        panel.text(value, place, f" {text(value)}", va="center", fontsize=8, color=INK)
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", color=GRID)


def draw_batch(report: Report) -> Figure | None:
    series = images_by_batch(report)
    if not series:
        return None
    figure, (panel,) = canvas(report, "Images of 256 tokens per second, by batch")
    for state, points in series.items():
        style = "--" if state == "bf16" else "-"
        label = f"bf16 weights, {state} state"
        panel.plot(*zip(*points, strict=True), style, color=colour("omnimamba, bf16"), label=label, marker="o", markersize=4, linewidth=1.8)
        panel.annotate(f"{points[-1][1]:.0f}", points[-1], xytext=(6, -3), textcoords="offset points", fontsize=9, color=INK)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({batch for points in series.values() for batch, _ in points}))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_xlabel("images at once", fontsize=9, color=INK)
    panel.set_ylabel("images/s", fontsize=9, color=INK)
    panel.grid(axis="y", color=GRID)
    panel.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def draw_roofline(report: Report) -> Figure | None:
    rows = shares(report)
    if not rows:
        return None
    figure, (panel,) = canvas(report, "A decode step: share of the read bandwidth", (7.2, 1.2 + 0.27 * len(rows)))
    bars(panel, ((name, share, colour(system)) for name, share, system in rows), text=lambda share: f"{share:.0%}")
    panel.set_xlim(0, 1)
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    read = f"bytes that a step moves at least, per second, over {report['read GB/s'] / 1e3:.2f} TB/s read in the same run"
    panel.set_xlabel(read, fontsize=9, color=INK)
    return figure


def draw_prefill(report: Report) -> Figure | None:
    cases = report["cases"]
    if not cases:
        return None
    figure, (panel,) = canvas(report, "Reading prompts: positions per second", (7.2, 1.2 + 0.5 * len(cases)))
    captured = [figures["tokens/s"] for figures in cases.values()]
    plain = [figures["tokens/s"] * figures["ms"] / figures["ms from Python"] for figures in cases.values()]
    for side, rates, shade, label in (
        (-1, captured, colour("omnimamba, bf16"), "as the engine runs it, with CUDA graphs"),
        (1, plain, GREY, "the same passes launched from Python"),
    ):
        places = [place + 0.19 * side for place in range(len(rates))]
        panel.barh(places, rates, color=shade, height=0.36, label=label)
        for place, rate in zip(places, rates, strict=True):
            panel.text(rate, place, f" {rate / 1e3:.1f}K", va="center", fontsize=8, color=INK)
    labels = [f"{name}\n{figures['tokens/s'] * figures['ms'] / 1e3:.0f} positions" for name, figures in cases.items()]
    panel.set_yticks(range(len(labels)), labels)
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    panel.set_xlim(right=1.1 * max(captured + plain))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e3:g}K"))
    panel.grid(axis="x", color=GRID)
    panel.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def draw_ops(report: Report) -> Figure | None:
    rows = op_times(report, "share")
    if not rows:
        return None
    title = "Training operators: share of the read bandwidth"
    figure, (panel,) = canvas(report, title, (7.2, 1.2 + 0.27 * len(rows)))
    for place, (_, plain, kernel) in enumerate(rows):
        panel.plot([plain, kernel], [place, place], color=GRID, linewidth=3, zorder=1)
    places = range(len(rows))
    panel.scatter([row[1] for row in rows], places, color=GREY, s=28, label="plain PyTorch", zorder=2)
    panel.scatter([row[2] for row in rows], places, color=colour("omnimamba, bf16"), s=28, label="kernel", zorder=2)
    panel.set_yticks(places, [row[0] for row in rows])
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_xlabel("forward and backward pass: each input and output counted once, per second", fontsize=9, color=INK)
    panel.grid(axis="x", color=GRID)
    panel.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def draw_cpu(report: Report) -> Figure | None:
    panels_of = {"decoding text, tokens/s": "mmu decode tokens/s", "reading a prompt, tokens/s": "prefill tokens/s"}
    if not any(cpu_rates(report, key) for key in panels_of.values()):
        return None
    figure, panels = canvas(report, f"1.3B shape on {report['threads']} threads", (8.4, 1.1 + 0.36 * len(report["cases"])), 2)
    for panel, (title, key) in zip(panels, panels_of.items(), strict=True):
        bars(panel, ((name, rate, colour(name)) for name, rate in cpu_rates(report, key)), text=lambda rate: f"{rate:.3g}")
        panel.set_xlabel(title, fontsize=9, color=INK)
    return figure


def draw_lengths(report: Report, *, key: str, title: str, unit: str, axis: str, is_log: bool) -> Figure | None:
    series = by_length(report, key)
    if not series:
        return None
    figure, (panel,) = canvas(report, title, (8.6, 4.4))
    lines(panel, series, unit=unit, is_log=is_log)
    panel.set_xlabel(axis, fontsize=9, color=INK)
    return figure


draw_time = functools.partial(
    draw_lengths, key="seconds for", title="Seconds for a sequence, 1.3B shapes, batch 1", unit="seconds", axis="tokens", is_log=True
)
draw_memory = functools.partial(
    draw_lengths, key="GB", title="Memory while decoding, language models of 1.3B shapes", unit="GB", axis="position", is_log=False
)
PLOTS: dict[str, tuple[str, Callable[[Report], Figure | None]]] = {
    "time": ("long-decode", draw_time),
    "memory": ("long-decode", draw_memory),
    "batch": ("decode", draw_batch),
    "roofline": ("decode", draw_roofline),
    "prefill": ("prefill", draw_prefill),
    "ops": ("ops", draw_ops),
    "cpu-decode": ("cpu-decode", draw_cpu),
}
"""By name of the plot, the benchmark whose results it shows and what draws it."""


def draw_all(results: Path, images: Path) -> tuple[list[Path], list[str]]:
    """The files that were written, and what was skipped and why."""
    written, skipped = [], []
    for plot, (benchmark, draw) in PLOTS.items():
        reports = sorted(results.glob(f"{benchmark}-*.json"))
        if not reports:
            skipped.append(f"{plot}: no {benchmark}-*.json in {results}")
        for path in reports:
            figure = draw(json.loads(path.read_text(encoding="utf-8")))
            if figure is None:
                skipped.append(f"{plot}: nothing to draw in {path.name}")
                continue
            out = images / f"{plot}-{path.stem.removeprefix(f'{benchmark}-')}.png"
            FigureCanvasAgg(figure).print_figure(out, dpi=130, metadata={"Software": None})
            written.append(out)
    return written, skipped


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plots of the benchmarks' results.")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of JSON files")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="FOLDER", help="that gets the PNG files")
    arguments = parser.parse_args(argv)
    arguments.images.mkdir(parents=True, exist_ok=True)
    written, skipped = draw_all(arguments.results, arguments.images)
    print(*(f"wrote {path}" for path in written), *(f"skipped {what}" for what in skipped), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
