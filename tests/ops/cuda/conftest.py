"""Kernels as functions on the CPU."""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from omnimamba.ops.cuda import compile

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Callable[[str, Mapping[str, object]], ctypes.CDLL]:
    """What a source of this folder is as a library, whose function `emulate(arguments, blocks, seed)` says whether all threads ended."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder, libraries = tmp_path_factory.mktemp("emulation"), {}

    def library(source: str, defines: Mapping[str, object]) -> ctypes.CDLL:
        key = (source, *defines.items())
        if key not in libraries:
            file = folder / f"{len(libraries)}.so"
            options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{compile.FOLDER}", *(f"-D{k}={v}" for k, v in defines.items())]
            subprocess.run([compiler, *options, HERE / source, "-o", file], check=True)
            libraries[key] = ctypes.CDLL(str(file))
        return libraries[key]

    return library


@pytest.fixture
def box_description() -> Callable[..., compile.TensorMap]:
    """`tensor_map` for `warpgroup.h`."""

    def describe(tensor: torch.Tensor, positions: int = 64) -> compile.TensorMap:
        b, l, columns = tensor.shape
        values = tensor.data_ptr(), b, l, columns, 2 * tensor.stride(0), 2 * tensor.stride(1), positions
        return compile.TensorMap.from_buffer_copy(struct.pack("7q72x", *values))

    return describe
