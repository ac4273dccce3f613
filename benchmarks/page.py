"""Fills docs/performance.md with the figures of benchmarks/results: plots and a table for each report.

    python benchmarks/page.py

Between `<!-- results: NAME -->` and `<!-- end of results -->` comes what the benchmark NAME has measured, by machine; nothing else of the
page changes. Draw the plots first (plot.py): the page shows those of a report that are there.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from plot import IMAGES, PLOTS, RESULTS, ROOT, Report, by_length, cpu_rates, op_times, thousands

PAGE = ROOT / "docs/performance.md"
BLOCK = re.compile(r"(<!-- results: ([a-z-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
SHOWN_LENGTHS = (1024, 16384, 100_000)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Nothing without rows."""
    rows = list(rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows)) if rows else ""


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def decode(report: Report) -> str:
    cases = table(
        ("step", "ms", "tokens/s", "images/s", "MB", "share of the bandwidth"),
        (
            (
                name.replace("T2I", "painting"),
                number(figures["ms"], 3),
                number(figures["tokens/s"]),
                number(figures["images/s"] or None, 1),
                number(figures["MB per step"]),
                percent(figures["share"]),
            )
            for name, figures in report["cases"].items()
            if "error" not in figures
        ),
    )
    requests = table(
        ("whole request through the engine", "s", "first token, ms", "tokens/s", "images/s"),
        (
            (
                name,
                number(figures["s"], 3),
                number(figures["first token ms"], 1),
                number(figures["tokens/s"]),
                number(figures["images/s"] or None, 1),
            )
            for name, figures in report["requests"].items()
        ),
    )
    tables = "\n".join(part for part in (cases, requests) if part)
    return f"Read bandwidth in the same run: {report['read GB/s']:,.0f} GB/s.\n\n{tables}"


def prefill(report: Report) -> str:
    return table(
        ("prompt", "positions", "ms", "ms, launched from Python", "positions/s", "TFLOP/s"),
        (
            (
                name,
                number(figures["tokens/s"] * figures["ms"] / 1e3),
                number(figures["ms"], 1),
                number(figures["ms from Python"], 1),
                number(figures["tokens/s"]),
                number(figures["TFLOP/s"]),
            )
            for name, figures in report["cases"].items()
        ),
    )


def ops(report: Report) -> str:
    rows = ((name, number(plain, 2), number(kernel, 2), f"{plain / kernel:.1f}x") for name, plain, kernel in op_times(report, "ms"))
    return table(("forward and backward pass", "plain PyTorch, ms", "kernel, ms", "faster"), rows)


def cpu_decode(report: Report) -> str:
    keys = {"text, tokens/s": "mmu decode tokens/s", "painting, tokens/s": "t2i decode tokens/s", "prompt, tokens/s": "prefill tokens/s"}
    rates = [dict(cpu_rates(report, key)) for key in keys.values()]
    weights = dict(cpu_rates(report, "weights GB"))
    rows = ((name, number(gb, 2), *(number(of_key.get(name), 1) for of_key in rates)) for name, gb in weights.items())
    return table(("system", "weights, GB", *keys), rows)


def long_decode(report: Report) -> str:
    seconds, tokens = by_length(report, "seconds for"), report["tokens"]
    rows = []
    for name, figures in report["cases"].items():
        points = figures.get("by length", {})
        if "error" in figures:
            rows.append((name, figures["error"], *[""] * (2 * len(SHOWN_LENGTHS))))
            continue
        if not points:  # the whole model, which is among the ratios
            continue
        cells = []
        for key, digits in (("ms", 2), ("GB", 1)):
            cells += [number(points.get(str(length), {}).get(key), digits) for length in SHOWN_LENGTHS]
        is_decoded = "request" in figures  # all of them, one after the other; else a sum over lengths
        total = figures["request"]["s"] if is_decoded else dict(seconds.get(name, [])).get(tokens)
        rows.append((name, *cells, number(total, 1)))
    head = [f"{key} at {thousands(length)}" for key in ("ms", "GB") for length in SHOWN_LENGTHS]
    systems = table(("system", *head, f"s for {tokens:,} tokens"), rows)
    ratios = ((ratio["name"], f"{ratio['value']:.4g}", "" if ratio["aim"] is None else f"{ratio['aim']:g}") for ratio in report["ratios"])
    return f"Read bandwidth in the same run: {report['read GB/s']:,.0f} GB/s.\n\n{systems}\n{table(('ratio', 'value', 'aim'), ratios)}"


def first_token(report: Report) -> str:
    cases = report["cases"]
    names = next(iter(cases.values()))
    rows = ((name, *(number(figures[key], 1) for key in names)) for name, figures in cases.items())
    return table(("kernels", *(f"{name}, s" for name in names)), rows)


TABLES: dict[str, Callable[[Report], str]] = {
    "decode": decode,
    "prefill": prefill,
    "ops": ops,
    "cpu-decode": cpu_decode,
    "long-decode": long_decode,
    "first-token": first_token,
}


def section(benchmark: str, results: Path, images: Path) -> str:
    """Heading, plots and table of each report of a benchmark."""
    parts = []
    for path in sorted(results.glob(f"{benchmark}-*.json")):
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        machine = path.stem.removeprefix(f"{benchmark}-")
        where = report.get("device") or f"{report['processor']}, {report['threads']} threads"
        versions = [f"{name} {report[name]}" for name in ("torch", "triton", "commit") if isinstance(report.get(name), str)]
        plots = [f"{plot}-{machine}.png" for plot, (shown, _) in PLOTS.items() if shown == benchmark]
        pictures = [f"![{name.removesuffix('.png')}](images/{name})" for name in plots if (images / name).is_file()]
        heading = f"**{where}** ({', '.join(versions)}; `{report['command']}`; [figures](../benchmarks/results/{path.name}))"
        parts.append("\n\n".join([heading, *pictures, TABLES[benchmark](report)]))
    return "\n".join(parts) or "Not measured yet.\n"


def filled(page: str, results: Path, images: Path) -> str:
    """The page with all its results. ValueError for a benchmark that has no table."""

    def fill(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"the page asks for results of {found[2]!r}; there are tables of {', '.join(TABLES)}")
        return f"{found[1]}\n{section(found[2], results, images)}\n{found[3]}"

    return BLOCK.sub(fill, page)


def main() -> int:
    argparse.ArgumentParser(description="Fills docs/performance.md with the benchmarks' results.").parse_args()
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), RESULTS, IMAGES), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
