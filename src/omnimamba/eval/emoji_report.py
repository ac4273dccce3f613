"""What the emoji benchmark leaves for people: `report.html`, with the pictures `grid.png` and `confusion.png` beside it.

The same figures give the same bytes: no date, no path of the output.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot

from omnimamba.eval import scores
from omnimamba.eval.emoji_set import Question
from omnimamba.eval.report import Report
from omnimamba.model.files import whole_file

REPORT, GRID, CONFUSION = "report.html", "grid.png", "confusion.png"
CONFUSION_KINDS = ("style", "group")
OTHER = "(other)"
"""The column of answers that are no label."""
CELL_INCHES, MARGIN_INCHES, DPI = 0.42, 2.2, 120

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } td, th { padding: 2px 12px; border-bottom: 1px solid #e4e4e4; text-align: right; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; }
"""


@dataclasses.dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    kind: str
    labels: tuple[str, ...]
    counts: np.ndarray
    """[true label, answered label or OTHER]"""

    @classmethod
    def of(cls, kind: str, questions: Sequence[Question], answers: Sequence[str]) -> ConfusionMatrix | None:
        """Of the questions of a kind, labels sorted; None without questions."""
        asked = [(question.reference, answer) for question, answer in zip(questions, answers, strict=True) if question.kind == kind]
        labels = sorted({reference for reference, _ in asked})
        column = {scores.normalise(label): i for i, label in enumerate(labels)}
        counts = np.zeros((len(labels), len(labels) + 1), int)
        for reference, answer in asked:
            counts[labels.index(reference), column.get(scores.normalise(answer), len(labels))] += 1
        return cls(kind, tuple(labels), counts) if asked else None


def draw_confusions(matrices: Sequence[ConfusionMatrix], path: Path) -> None:
    """A PNG of the matrices side by side: shares of each true label in percent."""
    sizes = [len(matrix.labels) for matrix in matrices]
    figure = Plot(figsize=(sum(CELL_INCHES * (size + 1) + MARGIN_INCHES for size in sizes), CELL_INCHES * max(sizes) + MARGIN_INCHES))
    FigureCanvasAgg(figure)
    for place, matrix in enumerate(matrices, 1):
        axes = figure.add_subplot(1, len(matrices), place)
        shares = 100 * matrix.counts / matrix.counts.sum(1, keepdims=True)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(shares):
            if matrix.counts[row, column]:
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white" if share > 60 else "black")
        axes.set_xticks(range(len(matrix.labels) + 1), [*matrix.labels, OTHER], rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(matrix.labels)), matrix.labels, fontsize=8)
        axes.set_xlabel("answered")
        axes.set_ylabel("true")
        axes.set_title(f"{matrix.kind}, % of each row (n = {matrix.counts.sum()})", fontsize=10)
    figure.tight_layout()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=DPI, metadata={"Software": None})


def write_report(out: Path, report: Report, questions: Sequence[Question], answers: Sequence[str], *, has_grid: bool) -> None:
    """Writes `report.html` and `confusion.png`. has_grid: whether `grid.png` is there to be shown."""
    matrices = [matrix for kind in CONFUSION_KINDS if (matrix := ConfusionMatrix.of(kind, questions, answers))]
    sections = ["<h2>Figures</h2>", table(report.table()), f"<p>Intervals: {scores.CONFIDENCE} % bootstrap over images.</p>"]
    if has_grid:
        sections += ["<h2>Real drawings, and paintings of their captions</h2>", picture(GRID, "pairs of a drawing and a painting")]
    if matrices:
        draw_confusions(matrices, out / CONFUSION)
        sections += ["<h2>Confusion</h2>", picture(CONFUSION, "true and answered labels")]
    rows = [(key, str(value)) for key, value in report.protocol.items()]
    sections += ["<h2>Protocol</h2>", table([("setting", "value"), *rows])]
    title = html.escape(f"emoji benchmark: {report.protocol['model']} on {report.protocol['split']}")
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    page = ["<!doctype html>", '<html lang="en">', head, "<body>", f"<h1>{title}</h1>", *sections, "</body>", "</html>"]
    with whole_file(out / REPORT) as partial:
        partial.write_text("\n".join(page) + "\n", encoding="utf-8")


def table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table, the first row its header."""
    header, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["".join(f"<th>{cell}</th>" for cell in header), *("".join(f"<td>{cell}</td>" for cell in row) for row in body)]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def picture(name: str, description: str) -> str:
    return f'<img src="{name}" alt="{html.escape(description)}">'
