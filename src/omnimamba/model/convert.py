"""Conversion between the official checkpoint and model folders, and the gathering of what the released model needs.

    convert(source, out, to="safetensors", dtype=None, quantize=None, config=None, tokenizer=None, vq=None, towers=None,
            without=(), gather=None, progress=None) -> Conversion

The official file is one state dict with the authors' names, with or without vision towers and VQ tokenizer; a model folder is
described in `weights.py`. Values stay bitwise what they are unless `dtype` is given.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from omnimamba.config import PRESETS, OmniMambaConfig, TowerConfig, nearest_name, preset, quantization
from omnimamba.model import hub, weights
from omnimamba.model.files import CHECKPOINT_SUFFIXES, TensorFile, read_json, whole_file
from omnimamba.model.vision import VisionTowers
from omnimamba.model.weights import CODEBOOK_USED, COMPONENTS, Stored

FORMATS = ("safetensors", "official")
CHECKPOINT_SOURCE = ("hustvl/OmniMamba", "OmniMamba-1.3b.pth")
"""Its 3.23 GB of half precision fit the language model alone, heads stored beside the embeddings that they are tied with."""
VQ_SOURCE = ("peizesun/llamagen_t2i", "vq_ds16_t2i.pt")
TOKENIZER_SOURCE = ("EleutherAI/gpt-neox-20b", "tokenizer.json")
TIMM_FILE = "model.safetensors"
"""Weights in timm's repositories on the Hub, where the model's pretrained config names no other file."""

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was written, and what a complete model has beyond it."""

    path: Path
    config: OmniMambaConfig
    num_parameters: dict[str, int]
    """By component."""
    missing: tuple[str, ...]
    """Of `vision`, `vq`, `tokenizer.json`."""


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "safetensors",
    dtype: str | None = None,
    quantize: str | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    vq: str | Path | None = None,
    towers: Mapping[str, str | Path] | None = None,
    without: Collection[str] = (),
    gather: bool | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Writes `source` as a model folder, or as an official checkpoint with `to="official"`.

    source: whatever `from_pretrained` takes, or the Hub id of an official checkpoint such as hustvl/OmniMamba.
    out: the folder; for `official` a `.pth` file, or a folder for `OmniMamba-NAME.pth`.
    dtype: float32, bfloat16, float16, or int8 for folders (None: as stored).
    quantize: int8, fp8 or int4 for folders: weights that the model then computes with, unlike dtype's (None: as they are).
    config: preset or config.json of an official checkpoint whose sizes its tensors do not tell.
    tokenizer, vq, towers: files to add or to put in place of the source's: a tokenizer.json, a LlamaGen VQ checkpoint, timm
    checkpoints by tower name.
    without: components to leave out, of `vision` and `vq`.
    gather: fetch what is still missing from where the released model has it (None: if source is an official checkpoint on the Hub).
    progress: called with a line before each step that takes time.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; {nearest_name(to, FORMATS)}")
    stored_as = weights.stored_dtype(dtype)
    if to == "official" and stored_as is torch.int8:
        raise ValueError("int8 is a storage of safetensors folders; for --to official pass float32, bfloat16 or float16")
    if quantize is not None:
        quantization(quantize)
    if wrong := set(without) - {"vision", "vq"}:
        raise ValueError(f"cannot leave out {', '.join(sorted(wrong))}; vision and vq can be left out")
    say = progress or (lambda line: None)
    say(f"opening {source}")
    try:
        stored, is_from_hub = _open(source, config)
    except hub.NotCachedError as error:
        raise _all_missing(error, source, without) from None
    for component in without:
        stored.components.pop(component, None)
    if tokenizer is not None:
        stored.tokenizer_file = _existing(tokenizer)
    if vq is not None:
        stored.components["vq"] = read_vq(_existing(vq))
    if towers:
        stored.components["vision"] = read_towers(stored.config, {name: _existing(path) for name, path in towers.items()})
    if is_from_hub if gather is None else gather:
        _gather(stored, without, say)
    if quantize is not None:
        say(f"quantising to {quantize}")
        stored = weights.quantized(stored, quantize)
    if to == "official" and stored.config.quantization is not None:
        raise ValueError(f"{stored.name} is quantised as {stored.config.quantization}; official checkpoints have no such weights")
    for component, tensors in stored.components.items():
        expected = weights.outline(component, stored.config).state_dict()
        weights.check_names_and_shapes(expected, tensors, f"{stored.name}: {component}")
    say(f"writing {out}")
    write = write_official if to == "official" else _write_folder
    path = write(stored, Path(out), stored_as)
    return Conversion(
        path,
        stored.config,
        {component: sum(tensor.numel() for tensor in tensors.values()) for component, tensors in stored.components.items()},
        _missing(stored),
    )


def _open(source: str | Path, config: str | Path | None) -> tuple[Stored, bool]:
    """The stored model, and whether it is an official checkpoint on the Hub."""
    is_on_hub = isinstance(source, str) and not Path(source).expanduser().exists() and hub.is_repo_id(source)
    path = fetch_model(str(source)) if is_on_hub else weights.locate(source)
    if path.is_file():
        return weights.open_official(path, None if config is None else read_config(config)), is_on_hub
    if config is not None:
        raise ValueError(f"{path} has its own {weights.CONFIG_FILE}; leave config={str(config)!r} out")
    return weights.open_folder(path), False


def fetch_model(repo_id: str) -> Path:
    """The cached model folder of a Hub repository, or else its one official checkpoint."""
    patterns = (*weights.MODEL_FILES, hub.CARD_FILE, *(f"*{suffix}" for suffix in CHECKPOINT_SUFFIXES))
    what = CHECKPOINT_SOURCE[1] if repo_id == CHECKPOINT_SOURCE[0] else "a model folder or a checkpoint"
    folder = hub.fetch(repo_id, patterns, what=what)
    if (folder / weights.CONFIG_FILE).is_file():
        return folder
    found = [path for path in sorted(folder.iterdir()) if path.suffix in CHECKPOINT_SUFFIXES]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"{repo_id} should have one checkpoint file ({names}) or a {weights.CONFIG_FILE}; fetch the right file and pass it"
        )
    return found[0]


def read_config(source: str | Path) -> OmniMambaConfig:
    """The config of a preset name or of a config.json."""
    if source in PRESETS:
        return preset(str(source))
    return OmniMambaConfig.from_dict(read_json(_existing(source)))


def read_vq(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a LlamaGen VQ checkpoint such as vq_ds16_t2i.pt."""
    tensors = TensorFile(path)
    return {name: tensors[name] for name in tensors if name != CODEBOOK_USED}


def read_towers(config: OmniMambaConfig, files: Mapping[str, Path]) -> dict[str, Tensor]:
    """The tensors of all towers of `config`, from one timm checkpoint each; position tables are resampled to the towers' image size."""
    if files.keys() != config.towers.keys():
        raise ValueError(f"checkpoints are for towers {', '.join(files)}; pass one for each of {', '.join(config.towers) or 'none'}")
    vision = weights.outline("vision", config)
    assert isinstance(vision, VisionTowers)
    return {
        f"towers.{name}.{key}": tensor
        for name, path in files.items()
        for key, tensor in adapted(TensorFile(path), vision.towers[name]).items()
    }


def adapted(tensors: Mapping[str, Tensor], tower: Any) -> dict[str, Tensor]:
    """A timm checkpoint as `timm.create_model(..., pretrained=True)` would load it into `tower`."""
    adapt = getattr(sys.modules[type(tower).__module__], "checkpoint_filter_fn", None)
    return dict(adapt(dict(tensors), tower) if adapt else tensors)


def _gather(stored: Stored, without: Collection[str], say: Progress) -> None:
    """Fetches what the released model has and `stored` lacks, in place."""
    files = fetch_all(published(stored.config, [part for part in _missing(stored) if part not in without]), say)
    stored.tokenizer_file = files.pop(weights.TOKENIZER_FILE, stored.tokenizer_file)
    if "vq" in files:
        stored.components["vq"] = read_vq(files.pop("vq"))
    if files:
        stored.components["vision"] = read_towers(stored.config, files)


def published(config: OmniMambaConfig, parts: Collection[str]) -> dict[str, tuple[str, str]]:
    """Hub repository and file of `tokenizer.json`, of `vq`, and for `vision` of each tower by its name."""
    known = {weights.TOKENIZER_FILE: TOKENIZER_SOURCE, "vq": VQ_SOURCE}
    sources = {part: source for part, source in known.items() if part in parts}
    return sources | ({name: timm_source(tower) for name, tower in config.towers.items()} if "vision" in parts else {})


def fetch_all(sources: Mapping[str, tuple[str, str]], say: Progress) -> dict[str, Path]:
    """Cached paths of Hub files. All that can neither be fetched nor found in the cache are named in one error."""
    files: dict[str, Path] = {}
    lost: list[hub.NotCachedError] = []
    for name, (repo_id, file) in sources.items():
        say(f"fetching {repo_id}/{file}")
        try:
            files[name] = hub.fetch_file(repo_id, file)
        except hub.NotCachedError as error:
            lost.append(error)
    if lost:
        raise hub.NotCachedError("; ".join(error.missing for error in lost), lost[0].reason)
    return files


def _all_missing(error: hub.NotCachedError, source: str | Path, without: Collection[str]) -> hub.NotCachedError:
    """The error, and where the released checkpoint is missing, with all else of the released model that is missing too."""
    if source != CHECKPOINT_SOURCE[0]:
        return error
    parts = [part for part in (weights.TOKENIZER_FILE, "vq", "vision") if part not in without]
    try:
        fetch_all(published(preset("1.3b"), parts), lambda line: None)
    except hub.NotCachedError as others:
        return hub.NotCachedError(f"{error.missing}; {others.missing}", error.reason)
    return error


def timm_source(tower: TowerConfig) -> tuple[str, str]:
    """Hub repository and file of a tower's pretrained weights, as timm names them."""
    pretrained = timm.get_pretrained_cfg(tower.timm_name)
    if pretrained is None or not pretrained.hf_hub_id:
        raise ValueError(f"timm {timm.__version__} knows no pretrained weights of {tower.timm_name!r}; pass a checkpoint of the tower")
    return pretrained.hf_hub_id, pretrained.hf_hub_filename or TIMM_FILE


def _missing(stored: Stored) -> tuple[str, ...]:
    parts = [name for name in COMPONENTS if name not in stored.components and (name != "vision" or stored.config.towers)]
    return (*parts, *([] if stored.tokenizer_file else [weights.TOKENIZER_FILE]))


def _write_folder(stored: Stored, out: Path, dtype: torch.dtype | None) -> Path:
    defaults = Path(stored.name) / weights.GENERATION_FILE
    texts = {weights.GENERATION_FILE: defaults.read_text(encoding="utf-8")} if defaults.is_file() else None
    weights.write(stored, out, dtype=dtype, texts=texts)
    return out


def write_official(stored: Stored, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Writes one checkpoint file with official names, whole or not at all. The tokenizer has no place in it."""
    path = out if out.suffix in CHECKPOINT_SUFFIXES else out / f"OmniMamba-{stored.config.name}.pth"
    components = {
        component: tensors if dtype is None else weights.all_converted(component, stored, dtype)
        for component, tensors in stored.components.items()
    }
    with whole_file(path) as partial:
        torch.save(weights.to_official(components), partial)
    return path


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    return path
