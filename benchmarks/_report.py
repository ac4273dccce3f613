"""How every benchmark begins and ends: what it ran on, and its figures as JSON on the last line of stdout."""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def commit() -> str | None:
    """The checked-out commit, with `-dirty` if the tree differs from it; None without git or outside a clone."""
    if shutil.which("git") is None:
        return None
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or None


def version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def lacks(device: str, *, triton: bool = False) -> bool:
    """Whether this computer lacks the device, or Triton where that is needed; says so, and a benchmark's exit code is then 2."""
    missing = ["a CUDA device"] if device == "cuda" and not torch.cuda.is_available() else []
    if triton and importlib.util.find_spec("triton") is None:
        missing.append("Triton")
    if missing:
        print(f"{sys.argv[0]} needs {' and '.join(missing)}, and found none", file=sys.stderr)
    return bool(missing)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")


def processor() -> str:
    """Its name and the widest vectors that torch uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {torch.backends.cpu.get_cpu_capability()}"


def begin(device: str, **settings: Any) -> dict[str, Any]:
    """A report of what runs and where, printed; figures are added to it."""
    report: dict[str, Any] = {"device": processor(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        report = {"device": torch.cuda.get_device_name(device)}
    report |= {"torch": torch.__version__, "triton": version("triton"), "commit": commit(), "command": shlex.join(sys.argv)} | settings
    print(", ".join(f"{name} {value}" for name, value in report.items()), flush=True)
    return report


def save(report: dict[str, Any], path: Path | None) -> str:
    """The report as JSON, written to `path`."""
    text = json.dumps(report)
    if path is not None:
        path.write_text(text + "\n", encoding="utf-8")
    return text


def finish(report: dict[str, Any], path: Path | None) -> None:
    """Writes the report to `path` and prints it as the last line."""
    print(save(report, path))
