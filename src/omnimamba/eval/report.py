"""Figures with the protocol they were taken by, as JSON and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from omnimamba.engine.omnimamba import OmniMamba
from omnimamba.eval import scores
from omnimamba.eval.scores import Figure

SHARE = "{:.1%}"


def model_protocol(model: OmniMamba) -> dict[str, Any]:
    """What a report says of its model."""
    return {
        "model": model.config.name,
        "fingerprint": model.bundle.fingerprint,
        "dtype": str(model.bundle.model.dtype).removeprefix("torch."),
        "quantization": model.config.quantization,
    }


@dataclasses.dataclass(frozen=True)
class Report:
    protocol: dict[str, Any]
    """Data, model and settings that the figures were taken with."""
    figures: dict[str, Figure]
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What a figure is called in the table; its key with spaces unless given."""
    forms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """How the figures are written that are no shares."""
    paper: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The figures that the OmniMamba paper gives, as written there."""
    answers: list[dict[str, Any]] | None = None
    """Every answer with its prompt, reference and score."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able. Figures are fractions of 1 or in their own unit; null where undefined."""
        values: dict[str, Any] = {
            "protocol": self.protocol,
            "figures": {key: dataclasses.asdict(figure) for key, figure in self.figures.items()},
        }
        return values if self.answers is None else values | {"answers": self.answers}

    def table(self) -> list[tuple[str, ...]]:
        """Rows (figure, value, interval, n), the first one the header; a last column `paper` if the paper gives a figure."""
        rows: list[tuple[str, ...]] = [("figure", "value", f"{scores.CONFIDENCE} % interval", "n")]
        for key, figure in self.figures.items():
            form = self.forms.get(key, SHARE).format
            values = [form(value) if value is not None else "" for value in (figure.value, figure.low, figure.high)]
            interval = f"{values[1]} to {values[2]}" if figure.low is not None else ""
            rows.append((self.labels.get(key, key.replace("_", " ")), values[0] or "undefined", interval, str(figure.n)))
        if not self.paper:
            return rows
        return [(*row, paper) for row, paper in zip(rows, ("paper", *(self.paper.get(key, "") for key in self.figures)), strict=True)]
