"""Cuts a golden folder down to what a repository can hold: `python tests/golden/cut.py FULL_FOLDER tests/golden`.

Nothing is computed anew. JSON files, weights and whatever a test feeds to the model stay whole; of weights that are stored twice
one copy stays; of a large recorded output the leading entries of the last axis stay, at all positions of the other axes.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

MAX_OUTPUT_BYTES = 24 * 1024
INPUTS = ("x", "x_decode", "vision_dino", "vision_siglip", "square.image", "wide.image")
"""Large tensors that tests feed to the model; ids and labels are far below the limit."""
CODEBOOK_USED = "llm_backbone.vqvae.quantize.codebook_used"
"""Zeros, a buffer that the published VQ module never uses after training."""


def leading_entries(tensor: Tensor) -> Tensor:
    """The tensor with as many leading entries of its last axis as fit in MAX_OUTPUT_BYTES, one at least."""
    rows = tensor.nbytes // tensor.shape[-1]
    return tensor[..., : max(1, MAX_OUTPUT_BYTES // rows)].contiguous()


def cut_folder(full: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    stored_twice = [copy for copy, _ in json.loads((full / "config.json").read_text())["tied_keys"]]
    for path in sorted(full.iterdir()):
        if path.suffix == ".json":
            shutil.copyfile(path, target / path.name)
        elif path.name == "weights.safetensors":
            weights = load_file(path)
            for name in (*stored_twice, CODEBOOK_USED):
                weights.pop(name, None)
            save_file(weights, target / path.name)
        elif path.suffix == ".safetensors":
            recorded = load_file(path)
            cut = {name: tensor if name in INPUTS else leading_entries(tensor) for name, tensor in recorded.items()}
            save_file(cut, target / path.name)
    for path in sorted(target.iterdir()):
        print(f"{path.stat().st_size:>9,} {path.name}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    cut_folder(Path(sys.argv[1]), Path(sys.argv[2]))
