"""Every kernel compiles for a Hopper GPU, without one: what the interpreter accepts and the compiler refuses shows here, and so does a
launch choice whose tiles do not fit the registers."""

import os
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from omnimamba.ops.triton import conv, norm, ssd

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
SHARED_MEMORY = 227 * 1024  # of one program, compute capability 9.0
SPILLED = 256  # bytes per thread: a few values; a tile too many spills more
SIZES = {"nano": {"b": 64, "l": 293, "h": 8, "p": 64, "n": 64}, "1.3b": {"b": 24, "l": 329, "h": 64, "p": 64, "n": 128}}


class Compiled:
    """Stands in for a kernel and compiles it for the arguments of each launch."""

    def __init__(self, kernel, folder) -> None:
        self.kernel, self.folder, self.spilled = kernel, folder, []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps, num_stages, **constants) -> None:
        signature, constexprs, attributes = {}, {}, {}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        for i, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, values[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
                signature[name], constexprs[name] = "constexpr", value
                continue
            is_tensor = isinstance(value, torch.Tensor)
            signature[name] = POINTERS[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
            if is_tensor or (isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= SHARED_MEMORY
        ptx = self.folder / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [PTXAS, "-v", "--gpu-name=sm_90a", str(ptx), "-o", str(self.folder / "kernel.cubin")]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        self.spilled += [int(number) for number in re.findall(r"(\d+) bytes spill stores", printed)]


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    stand_ins = []
    for module in (conv, norm, ssd):
        for name in ("forward_kernel", "states_kernel", "backward_kernel"):
            if hasattr(module, name):
                stand_ins.append(Compiled(getattr(module, name), tmp_path))
                monkeypatch.setattr(module, name, stand_ins[-1])
    return stand_ins


def run_all(b, l, h, p, n, dtype, has_state) -> None:
    """Launches every kernel of a mixer, forward and backward, on memory that nothing reads."""
    d_inner, conv_dim = h * p, h * p + 2 * n
    z, xBC, dt = torch.empty(b, l, d_inner + conv_dim + h, dtype=dtype).split((d_inner, conv_dim, h), -1)
    past, state = (torch.empty(b, conv_dim, 4, dtype=dtype), torch.empty(b, h, p, n)) if has_state else (None, None)
    weight, bias = torch.empty(conv_dim, 4).requires_grad_(), torch.empty(conv_dim)
    xBC, _ = conv.causal_conv1d(xBC, weight, bias, initial_state=past)
    x, B, C = xBC.split((d_inner, n, n), -1)
    x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (1, n)), C.unflatten(-1, (1, n))
    y, final = ssd.ssd_chunk_scan(x, dt.float(), torch.empty(h), B, C, D=torch.empty(h), initial_state=state)
    out = norm.gated_rms_norm(y.flatten(-2), z, torch.empty(d_inner), 1e-5)
    out = norm.rms_norm(out, torch.empty(d_inner), 1e-5)
    torch.autograd.backward([out, final] if has_state else [out], [torch.empty_like(m) for m in ([out, final] if has_state else [out])])


@pytest.mark.parametrize(("size", "has_state"), [("nano", False), ("nano", True), ("1.3b", False)])
def test_bf16(kernels, size, has_state):
    run_all(**SIZES[size], dtype=torch.bfloat16, has_state=has_state)
    spilled = {f"{kernel.kernel.__module__}.{kernel.kernel.__name__}": kernel.spilled for kernel in kernels}
    assert all(spilled.values()), f"never launched: {spilled}"
    if not has_state:  # training
        assert max(max(values) for values in spilled.values()) <= SPILLED, spilled


def test_fp32(kernels):
    run_all(**SIZES["nano"], dtype=torch.float32, has_state=False)
    assert all(kernel.spilled for kernel in kernels)


def test_sizes_smaller_than_a_tile(kernels):
    run_all(2, 5, h=2, p=24, n=20, dtype=torch.float16, has_state=False)
    assert all(kernel.spilled for kernel in kernels)
