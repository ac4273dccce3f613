"""Files of tensors: read through a mapping, one tensor at a time; written whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnimamba.model.packing import SCALE_SUFFIX, unpack

REMAP_BYTES = 2**28
"""Read from one mapping of a file before it is mapped anew."""
SHARD_BYTES = 5 * 10**9
"""Largest safetensors file written; more tensors go to numbered shards, named and indexed as on the Hugging Face Hub."""
SAFETENSORS = ".safetensors"
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".bin")


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors or PyTorch file, as views of the mapped file.

    Pages that were read count as memory while a mapping lives, so the file is mapped anew every REMAP_BYTES: whoever copies tensor
    by tensor needs little more than the copies. A PyTorch file may hold its state dict under "model", as LlamaGen's do. It is read
    without running code from it. Packed tensors (`packing`) are given unpacked. ValueError if the file is damaged or is no file of
    tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._num_read = 0
        self._names, self._get = self._map()
        self._packed = self._packed_names()
        self._names = {name: None for name in self._names if name.removesuffix(SCALE_SUFFIX) not in self._packed or name in self._packed}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._num_read > REMAP_BYTES:
            self._num_read = 0
            _, self._get = self._map()
        tensor = self._get(name)
        self._num_read += tensor.nbytes
        return unpack(tensor, self._get(name + SCALE_SUFFIX)) if name in self._packed else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _map(self) -> tuple[dict[str, None], Callable[[str], Tensor]]:
        try:
            if self.path.suffix == SAFETENSORS:
                file = safe_open(self.path, "pt")
                return dict.fromkeys(file.keys()), file.get_tensor
            with torch.serialization.safe_globals([argparse.Namespace]):  # LlamaGen's training script stores its arguments
                content = torch.load(self.path, mmap=True, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError:
            raise ValueError(
                f"{self.path}: holds more than tensors; only plain state dicts are read, since a pickle can run code"
            ) from None
        except (SafetensorError, RuntimeError, EOFError, OSError) as error:
            raise ValueError(f"{self.path}: damaged, or not a file of tensors ({one_line(error)}); fetch it again") from None
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content = content["model"]
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{self.path}: holds no state dict; pass a file of named tensors")
        return dict.fromkeys(content), content.__getitem__

    def _packed_names(self) -> set[str]:
        if self.path.suffix != SAFETENSORS:
            return set()
        with safe_open(self.path, "pt") as file:
            return {name for name in self._names if name + SCALE_SUFFIX in self._names and file.get_slice(name).get_dtype() == "I8"}


def read_safetensors(folder: Path, stem: str) -> Mapping[str, Tensor] | None:
    """Tensors of `stem.safetensors` or of its shards; None if there is neither."""
    index = folder / f"{stem}{SAFETENSORS}.index.json"
    if not index.is_file():
        path = folder / f"{stem}{SAFETENSORS}"
        return TensorFile(path) if path.is_file() else None
    files = sorted(set(read_json(index).get("weight_map", {}).values()))
    if lost := [name for name in files if not (folder / name).is_file()]:
        raise ValueError(f"{index}: names {', '.join(lost)}, which {folder} lacks; fetch the folder again")
    return ChainMap(*(TensorFile(folder / name) for name in files))  # type: ignore[arg-type]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file that others may read as far as the umask lets them; safetensors itself makes its files private."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # to ask for the umask is to change it, for all threads
    try:
        save_file(tensors, path, metadata=dict(metadata or {}))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.chmod(mode)


def write_safetensors(tensors: Mapping[str, Tensor], folder: Path, stem: str) -> None:
    """Writes `stem.safetensors`, or shards and their index above SHARD_BYTES."""
    pattern = f"{stem}{{suffix}}{SAFETENSORS}"
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    for name, members in split.filename_to_tensors.items():
        save_tensors({key: tensors[key] for key in members}, folder / name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path whose file takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        partial = Path(temporary) / path.name
        yield partial
        sync(partial)
        partial.replace(path)


@contextlib.contextmanager
def whole_folder(folder: Path, patterns: Sequence[str], *, last: str) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well; otherwise `folder` stays as it was.

    If `folder` is there, its files of `patterns` are replaced and others stay. The file `last` goes first and comes back last, so a
    folder caught in between lacks it.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; pass a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        partial = Path(temporary) / "folder"  # the outer one is readable by its owner only
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            sync(path)
        if not folder.exists():
            partial.rename(folder)
            return
        (folder / last).unlink(missing_ok=True)
        for path in [path for pattern in patterns for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)


def sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."
