"""Work on many items, cut into shards whose results appear whole: who starts it again does only what is missing.

Shards lie in `OUT.parts/` until all are there and are joined to OUT. They are computed here, one after the other, or on a cluster by Ray
Data, whose machines must see the same files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omnimamba.model.files import read_json, whole_file

PLAN_FILE = "plan.json"
Worker = Callable[[range, Path], None]
"""Computes the items of a range and writes their results to a file."""
OnProgress = Callable[[int, int], None]
"""(items done, items in all)"""


@dataclasses.dataclass(frozen=True)
class Work:
    out: Path
    num_items: int
    shard_size: int
    plan: dict[str, Any]
    """What the results depend on, as JSON: who goes on with the work must have the same."""

    @property
    def folder(self) -> Path:
        return self.out.with_name(self.out.name + ".parts")

    @property
    def num_shards(self) -> int:
        return -(-self.num_items // self.shard_size)

    @property
    def files(self) -> list[Path]:
        return [self.file(shard) for shard in range(self.num_shards)]

    def file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}{self.out.suffix}"

    def items(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_items))

    def missing(self) -> list[int]:
        return [shard for shard, file in enumerate(self.files) if not file.is_file()]

    def compute(self, shard: int, worker: Worker) -> None:
        with whole_file(self.file(shard)) as partial:
            worker(self.items(shard), partial)

    def start(self) -> None:
        """Makes the folder of the shards. ValueError if it holds those of other work, or if the work is done already."""
        if self.out.exists():
            raise ValueError(f"{self.out} is there already; delete it to make it again, or name another file")
        plan = json.loads(json.dumps({**self.plan, "num_items": self.num_items, "shard_size": self.shard_size}))
        path = self.folder / PLAN_FILE
        if path.is_file():
            found = read_json(path)
            if different := sorted(key for key in plan.keys() | found.keys() if plan.get(key) != found.get(key)):
                raise ValueError(f"{self.folder}: begun with another {', '.join(different)}; delete the folder to start again")
        else:
            with whole_file(path) as partial:
                partial.write_text(json.dumps(plan, indent=1))

    def finish(self, join: Callable[[Sequence[Path], Path], None]) -> None:
        """Joins the shards to the result and removes them."""
        with whole_file(self.out) as partial:
            join(self.files, partial)
        shutil.rmtree(self.folder)


def run_here(work: Work, make_worker: Callable[[], Worker], on_progress: OnProgress | None = None) -> None:
    missing = work.missing()
    worker = make_worker() if missing else None
    num_done = work.num_items - sum(len(work.items(shard)) for shard in missing)
    for shard in missing:
        assert worker is not None
        work.compute(shard, worker)
        num_done += len(work.items(shard))
        if on_progress is not None:
            on_progress(num_done, work.num_items)


class RayWorker:
    """A worker of a Ray actor: made once, then given shard after shard."""

    def __init__(self, work: Work, make_worker: Callable[[], Worker]) -> None:
        self.work, self.worker = work, make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for shard in batch["shard"]:
            self.work.compute(int(shard), self.worker)
        return batch


def run_on_ray(
    work: Work,
    make_worker: Callable[[], Worker],
    on_progress: OnProgress | None = None,
    *,
    num_workers: int = 1,
    gpus_per_worker: float = 0,
) -> None:
    """`run_here` on the Ray cluster that RAY_ADDRESS names, or on one of this machine. `make_worker` must pickle."""
    try:
        import ray
        import ray.data
    except ModuleNotFoundError:
        raise ValueError("--ray needs the package ray; `pip install 'omnimamba[ray]'` installs it") from None
    if not (missing := work.missing()):
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    shards = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
    actors = ray.data.ActorPoolStrategy(size=min(num_workers, len(missing)))
    done = shards.map_batches(RayWorker, fn_constructor_args=(work, make_worker), batch_size=1, compute=actors, num_gpus=gpus_per_worker)
    num_done = work.num_items - sum(len(work.items(shard)) for shard in missing)
    for row in done.iter_rows():
        num_done += len(work.items(int(row["shard"])))
        if on_progress is not None:
            on_progress(num_done, work.num_items)


def digest(values: Any) -> str:
    """16 hex digits that stand for values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def join_lines(parts: Sequence[Path], out: Path) -> None:
    """Text files one after the other."""
    with out.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
