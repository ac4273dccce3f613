"""Seconds from the start of a new process to its first token, with Triton's cache of compiled kernels empty and filled.

    PYTHONPATH=src python3 benchmarks/first_token.py --json out.json

Writes a model of random weights with towers and VQ tokenizer to a temporary folder, then starts Python twice: each process imports the
package, loads the folder, as `omnimamba generate` would, and paints an image. Times count from before the process starts. The file is in
the system's cache, since it was just written. The last line on stdout is JSON.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CACHES = ("empty", "filled")
FIGURES = ("imported", "loaded", "first token", "image")


def child(folder: Path, device: str, started: float) -> None:
    """The new process: seconds since `started` as JSON."""
    from omnimamba import OmniMamba
    from omnimamba.engine.request import Sample, SamplingParams

    imported = time.time()
    omni = OmniMamba.from_pretrained(folder, device=device)
    loaded = time.time()
    events = omni.engine.stream([omni.paint_request("red apple", SamplingParams(seed=0), 1)])
    sample = Sample()
    sample.add(next(events)[1])
    first = time.time()
    for _, event in events:
        sample.add(event)
    omni.paint([sample.tokens])
    print(json.dumps(dict(zip(FIGURES, (t - started for t in (imported, loaded, first, time.time())), strict=True))))


def main() -> int:
    parser = argparse.ArgumentParser(description="First token in a new process, random weights.")
    parser.add_argument("--preset", default="1.3b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "STARTED"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), arguments.device, float(arguments.child[1]))
        return 0
    import torch  # not above: the new process imports what it needs, in its own time
    from _model import random_bundle
    from _report import begin, finish, lacks

    from omnimamba.config import preset
    from omnimamba.data.prepare import train_text_tokenizer
    from omnimamba.model import weights

    device = arguments.device
    if lacks(device):
        return 2
    report = begin(device, preset=arguments.preset)
    report["cases"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, tokenizer_file = Path(temporary) / "model", Path(temporary) / "tokenizer.json"
        train_text_tokenizer((), 257).save(str(tokenizer_file))
        config = dataclasses.replace(preset(arguments.preset), base_vocab_size=257, eos_id=0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        weights.save(random_bundle(config, dtype, device, tokenizer_file), folder)
        if device == "cuda":
            torch.cuda.empty_cache()
        environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(temporary) / "kernels")}
        for cache in CACHES:
            command = [sys.executable, __file__, "--device", device, "--child", str(folder), str(time.time())]
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            figures = report["cases"][f"{cache} cache"] = json.loads(result.stdout.splitlines()[-1])
            print(f"{cache} cache of kernels:", *(f"{name} {seconds:.2f} s" for name, seconds in figures.items()), sep="   ", flush=True)
    finish(report, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
