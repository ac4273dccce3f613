"""CUDA C++ to a kernel that can be launched: NVRTC of torch's CUDA wheels and the driver, both through ctypes.

What was compiled is kept in Triton's cache folder. (`torch.cuda._compile_kernel` does much of this, but is private to torch, keeps
nothing, and launches without attributes.)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from triton.runtime.cache import get_cache_manager

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
OPTIONS = ("--std=c++17",)
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute


def compile_cubin(sources: Sequence[str], defines: Mapping[str, object], architecture: str) -> tuple[bytes, str]:
    """Machine code of the files of this folder one after the other, and what the compiler says of registers and spills.

    architecture: `sm_90`, say. Needs no GPU. RuntimeError with the compiler's messages.
    """
    nvrtc = library()
    text = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in sources)
    program = ctypes.c_void_p()
    check_nvrtc(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), sources[-1].encode(), 0, None, None))
    options = [*OPTIONS, f"--gpu-architecture={architecture}", "--ptxas-options=-v", *(f"-D{k}={v}" for k, v in defines.items())]
    result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))
    log = fetch(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode()
    if result:
        raise RuntimeError(f"{sources[-1]} does not compile for {architecture}:\n{log}")
    cubin = fetch(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    check_nvrtc(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return cubin, log


@functools.cache
def library() -> ctypes.CDLL:
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}")


@functools.cache
def is_available() -> bool:
    """Whether NVRTC is there; if not, that is said once."""
    try:
        library()
    except OSError as error:
        logger.warning("decoding takes several launches a layer, for NVRTC, which torch's CUDA wheels bring, is missing: %s", error)
        return False
    return True


def can_run(device: torch.device) -> bool:
    """Whether the kernels of this folder run there: they need bulk copies, so compute capability 9.0, and NVRTC."""
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0) and is_available()
    )


def fetch(program: ctypes.c_void_p, size_of: ctypes._FuncPointer, copy: ctypes._FuncPointer) -> bytes:
    size = ctypes.c_size_t()
    check_nvrtc(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    check_nvrtc(copy(program, buffer))
    return buffer.raw


def check_nvrtc(result: int) -> None:
    if result:
        library().nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {library().nvrtcGetErrorString(result).decode()}")


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check_driver(result: int) -> None:
    if result:
        message = ctypes.c_char_p()
        driver().cuGetErrorString(result, ctypes.byref(message))
        raise RuntimeError(f"CUDA: {(message.value or b'unknown error').decode()}")


class TensorMap(ctypes.Structure):
    """CUtensorMap."""

    _fields_ = (("bytes", ctypes.c_char * 128),)


def structure(
    *,
    maps: Sequence[str] = (),
    pointers: Sequence[str] = (),
    longs: Sequence[str] = (),
    ints: Sequence[str] = (),
    floats: Sequence[str] = (),
) -> type[ctypes.Structure]:
    """A kernel's argument, whose fields come in this order, filled up to whole 64 bytes, as tensor maps are aligned there."""
    kinds = ((maps, TensorMap), (pointers, ctypes.c_void_p), (longs, ctypes.c_longlong), (ints, ctypes.c_int), (floats, ctypes.c_float))
    fields: list[tuple[str, Any]] = [(name, kind) for names, kind in kinds for name in names]
    size = sum(ctypes.sizeof(kind) for _, kind in fields)
    return type("Arguments", (ctypes.Structure,), {"_fields_": [*fields, ("_padding", ctypes.c_char * (-size % 64))]})


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute, of those attributes whose value is up to three ints."""

    _fields_ = (("id", ctypes.c_int), ("_padding", ctypes.c_int), ("value", ctypes.c_int * 3), ("_rest", ctypes.c_char * 52))


def attribute_of(id: int, *value: int) -> LaunchAttribute:
    return LaunchAttribute(id, 0, value)


COOPERATIVE = attribute_of(2, 1)
"""All blocks are at work at once."""
PROGRAMMATIC = attribute_of(6, 1)
"""The kernel may start before the one ahead of it has ended."""


def cluster_of(num_blocks: int) -> LaunchAttribute:
    """So many neighbours of the blocks are a cluster."""
    return attribute_of(4, num_blocks, 1, 1)


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Kernel:
    """A kernel of one argument, a struct, on a device."""

    def __init__(
        self, sources: Sequence[str], name: str, defines: Mapping[str, object], *, shared_bytes: int, device: torch.device
    ) -> None:
        architecture = "sm_{}{}a".format(*torch.cuda.get_device_capability(device))  # a: what only this generation has, too
        content = repr((OPTIONS, architecture, torch.version.cuda, dict(defines), [(FOLDER / source).read_bytes() for source in sources]))
        cache, file = get_cache_manager(hashlib.sha256(content.encode()).hexdigest()), f"{name}.cubin"
        kept = cache.get_file(file)
        if kept is None:
            kept = cache.put(compile_cubin(sources, defines, architecture)[0], file)
        self.device = device
        self.shared_bytes = shared_bytes
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the context current
            check_driver(driver().cuModuleLoadData(ctypes.byref(self._module), Path(kept).read_bytes()))
        check_driver(driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
        check_driver(driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes))

    def clusters_at_once(self, num_blocks: int, threads: int) -> int:
        """How many clusters of so many blocks the device holds; multiprocessors of a group that are too few for one stay empty."""
        attribute, found = cluster_of(num_blocks), ctypes.c_int()
        config = LaunchConfig(num_blocks, 1, 1, threads, 1, 1, self.shared_bytes, None, ctypes.pointer(attribute), 1)
        with torch.cuda.device(self.device):
            check_driver(driver().cuOccupancyMaxActiveClusters(ctypes.byref(found), self._function, ctypes.byref(config)))
        return found.value

    def __call__(self, argument: ctypes.Structure, *, blocks: int, threads: int, attributes: Sequence[LaunchAttribute] = ()) -> None:
        """Launches on torch's current stream. RuntimeError if the driver refuses."""
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
            array = (LaunchAttribute * len(attributes))(*attributes)
            config = LaunchConfig(blocks, 1, 1, threads, 1, 1, self.shared_bytes, stream, array, len(attributes))
            check_driver(driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None))
