"""Reading benchmark folders: what is missing or malformed is said in one line, with where to get it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from omnimamba.data.text import read_text
from omnimamba.model.files import one_line, read_json, whole_file

NAMED = 3
"""Missing images that an error names."""
NUM_LOADERS = 8
"""Threads that read images."""
RUN_FILE = "run.json"

_Source = TypeVar("_Source")
_Loaded = TypeVar("_Loaded")


def require_files(folder: Path, benchmark: str, sources: Mapping[str, str]) -> list[Path]:
    """The paths of the files named in `sources`, each with where to get it. ValueError that names every one that is missing."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; {benchmark} is read from a folder with {', '.join(sources)}")
    lost = [f"{name} (from {source})" for name, source in sources.items() if not (folder / name).is_file()]
    if lost:
        raise ValueError(f"{folder}: {benchmark} lacks {', '.join(lost)}")
    return [folder / name for name in sources]


def require_images(folder: Path, benchmark: str, images: Sequence[Path], source: str) -> None:
    """ValueError that counts the images that are missing and names the first ones."""
    images = list(dict.fromkeys(images))
    if lost := [image for image in images if not image.is_file()]:
        names = ", ".join(str(image.relative_to(folder)) for image in lost[:NAMED])
        raise ValueError(f"{folder}: {benchmark} lacks {len(lost)} of {len(images)} images, e.g. {names} (from {source})")


def read_json_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({one_line(error)}); fetch it again") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a .jsonl or .jsonl.gz file. ValueError names the line that is no JSON object."""
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {i}: not a JSON object")
        yield f"{path} line {i}", record


def fields(record: Any, place: str, *names: str) -> list[Any]:
    """The values of these keys. ValueError that names the place and the keys it lacks."""
    lost = [name for name in names if not isinstance(record, dict) or name not in record]
    if lost:
        raise ValueError(f"{place}: no {', '.join(lost)}; expected an object with {', '.join(names)}")
    return [record[name] for name in names]


def read_ahead(sources: Sequence[_Source], load: Callable[[_Source], _Loaded], size: int) -> Iterator[list[_Loaded]]:
    """`load` of all sources in batches of `size`; threads load the next batch while one is used."""
    with ThreadPoolExecutor(NUM_LOADERS) as pool:
        ahead = [pool.submit(load, source) for source in sources[:size]]
        for start in range(size, len(sources) + size, size):
            batch = [future.result() for future in ahead]
            ahead = [pool.submit(load, source) for source in sources[start : start + size]]
            yield batch


# ---- output folders


def claim_folder(out: Path, run: Mapping[str, Any]) -> None:
    """Marks a folder as that of a run by `run.json`. ValueError if it is another run's."""
    path = out / RUN_FILE
    if not path.is_file():
        write_json(path, run)
        return
    there = read_json(path)
    if other := [key for key in run if there.get(key) != run[key]]:
        details = ", ".join(f"{key} {there.get(key)!r} instead of {run[key]!r}" for key in other)
        raise ValueError(f"{out}: holds the results of another run ({details}); choose another --out, or delete it")


def write_json(path: Path, values: Any, indent: int | None = 1) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
