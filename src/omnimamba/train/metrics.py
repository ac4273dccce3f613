"""Figures of a run: one JSON line per report in `log.jsonl`, and TensorBoard events if it is installed."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("omnimamba.train")


class RunLog:
    """A context that closes both files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("no TensorBoard events: `pip install omnimamba[train]` adds them; log.jsonl has the same figures")
        else:
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def report(self, step: int, figures: dict[str, float], *, kind: str = "train") -> None:
        self.file.write(json.dumps({"step": step, "kind": kind, "time": round(time.time(), 3), **figures}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
