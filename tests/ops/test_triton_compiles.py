"""Every kernel compiles for a Hopper GPU, and some for a smaller one, without any: what the interpreter accepts and the compiler refuses
shows here, and so does a launch choice whose tiles do not fit the registers or the shared memory."""

import itertools
import os
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from omnimamba.ops.triton import conv, decode, decode_sample, launch, lora, norm, prefill, ssd, ssd_backward

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
PTXAS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
SHARED_MEMORY = 227 * 1024  # of one program, compute capability 9.0
LEAST_SHARED_MEMORY = 99 * 1024  # 8.6, 8.9 and 12.0
SPILLED = 256  # bytes per thread: a few values; a tile too many spills more
SIZES = {
    "nano": {"b": 64, "l": 293, "h": 8, "p": 64, "n": 64},
    "1.3b": {"b": 24, "l": 329, "h": 64, "p": 64, "n": 128},
    "one row of 1.3b": {"b": 1, "l": 4096, "h": 64, "p": 64, "n": 128},  # walked in spans
}


class Compiled:
    """Stands in for a kernel and compiles it for the arguments of each launch."""

    capability = 90

    def __init__(self, kernel, folder) -> None:
        self.kernel, self.folder, self.spilled, self.shared, self.code = kernel, folder, [], 0, ""

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps, num_stages=1, launch_pdl=False, maxnreg=None, **constants) -> None:
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
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl, "maxnreg": maxnreg}
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        self.shared = max(self.shared, compiled.metadata.shared)
        assert self.shared <= SHARED_MEMORY
        self.code = compiled.asm["ttir"]
        ptx = self.folder / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        name = "sm_90a" if self.capability == 90 else f"sm_{self.capability}"
        command = [PTXAS, "-v", f"--gpu-name={name}", str(ptx), "-o", str(self.folder / "kernel.cubin")]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        self.spilled += [int(number) for number in re.findall(r"(\d+) bytes spill stores", printed)]


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    stand_ins = []
    names = [name for name in vars(ssd_backward) if name.endswith("_kernel")]
    for module in (conv, norm, ssd, ssd_backward):
        for name in ("forward_kernel", "span_kernel", "decay_kernel", "backward_kernel", *names):
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
    rms = norm.rms_norm(torch.empty(b, l, d_inner // 2, requires_grad=True), torch.empty(d_inner // 2), 1e-5)
    rms.backward(torch.empty_like(rms))
    torch.autograd.backward([out, final] if has_state else [out], [torch.empty_like(m) for m in ([out, final] if has_state else [out])])


@pytest.mark.parametrize(("size", "has_state"), [("nano", False), ("nano", True), ("1.3b", False), ("one row of 1.3b", False)])
def test_bf16(kernels, size, has_state):
    run_all(**SIZES[size], dtype=torch.bfloat16, has_state=has_state)
    spilled = {f"{kernel.kernel.__module__.rsplit('.', 1)[-1]}.{kernel.kernel.__name__}": kernel.spilled for kernel in kernels}
    launched = {name for name, values in spilled.items() if values}
    assert launched == spilled.keys() - ({"ssd.span_kernel"} if size != "one row of 1.3b" else set()), spilled
    if size == "nano":
        assert all(kernel.shared <= LEAST_SHARED_MEMORY for kernel in kernels)
    if not has_state:  # training, and long prompts
        assert all(max(values, default=0) <= SPILLED for values in spilled.values()), spilled


@pytest.fixture
def smaller_card(monkeypatch):
    monkeypatch.setattr(launch, "own_launches", lambda device: launch.SMALL_LAUNCHES)
    monkeypatch.setattr(Compiled, "capability", 89)


@pytest.mark.usefixtures("smaller_card")
def test_training_1_3b_on_a_smaller_card(kernels):
    run_all(**SIZES["1.3b"], dtype=torch.bfloat16, has_state=False)
    assert {kernel.kernel.__name__: kernel.shared for kernel in kernels if kernel.shared > LEAST_SHARED_MEMORY} == {}


def test_fp32(kernels):
    for size in ("nano", "one row of 1.3b"):
        run_all(**SIZES[size], dtype=torch.float32, has_state=False)
    assert all(kernel.spilled for kernel in kernels if kernel.kernel.__name__ != "add_up_kernel")  # chunks are short, and many


def test_sizes_smaller_than_a_tile(kernels):
    run_all(2, 5, h=2, p=24, n=20, dtype=torch.float16, has_state=False)
    assert all(kernel.spilled for kernel in kernels if kernel.kernel.__name__ != "span_kernel")


@pytest.mark.parametrize("lengths", [None, torch.zeros(1, dtype=torch.int64)])
def test_prefill_of_1_3b(kernels, monkeypatch, tmp_path, lengths):
    for name in ("ends_kernel", "add_norm_kernel"):
        monkeypatch.setattr(prefill, name, Compiled(getattr(prefill, name), tmp_path))
    bf16 = torch.bfloat16
    xBC, dt = torch.empty(1, 760, 8512, dtype=bf16).split((4352 + 4096, 64), -1)
    weight, bias, state = torch.empty(4352, 4, dtype=bf16), torch.empty(4352, dtype=bf16), torch.empty(1, 4352, 4, dtype=bf16)
    prefill.scan_inputs(xBC[..., 4096:], dt, weight=weight, bias=bias, dt_bias=torch.empty(64), conv_state=state, lengths=lengths)
    residual, addend = torch.empty(1, 760, 2048), torch.empty(1, 760, 2048, dtype=bf16)
    x, B, C = (m.unflatten(-1, (-1, p)) for m, p in zip(xBC[..., 4096:].split((4096, 128, 128), -1), (64, 128, 128), strict=True))
    y, squares, _ = prefill.gated_scan(
        x, torch.empty(1, 760, 64), torch.empty(64), B, C,
        D=torch.empty(64), z=xBC[..., :4096], norm_weight=torch.empty(4096, dtype=bf16), initial_state=torch.empty(1, 64, 64, 128),
    )  # fmt: skip
    assert y.shape == (1, 760, 4096) and squares.sums.shape == (1, 760, 64)
    if lengths is None:
        addend, squares = None, None
    prefill.add_rms_norm(residual, addend, torch.empty(2048, dtype=bf16), 1e-5, squares)
    assert prefill.ends_kernel.spilled == prefill.add_norm_kernel.spilled == ssd.decay_kernel.spilled == [0]
    assert ssd.span_kernel.spilled == [0] and ssd.forward_kernel.spilled[0] <= 2 * SPILLED  # numbers that a loop does not change
    assert all(kernel.shared <= LEAST_SHARED_MEMORY for kernel in (*kernels, prefill.ends_kernel, prefill.add_norm_kernel))


def test_what_the_convolution_carries_along(monkeypatch, tmp_path):
    """Three inputs, three gradients and five sums. The interpreter would not show it if the compiler took one of them for constant."""
    kernel = Compiled(conv.backward_kernel, tmp_path)
    monkeypatch.setattr(conv, "backward_kernel", kernel)
    x = torch.empty(2, 35, 64)
    conv.conv_backward(x, torch.empty(4, 64), torch.empty(64), None, x, torch.empty(2, 35, 64))
    loops = [line for line in kernel.code.splitlines() if "scf.for" in line]
    assert loops and all(line.count(" = %") - 1 == 11 for line in loops), loops


@pytest.mark.parametrize(("rank", "dtype"), [(8, torch.bfloat16), (256, torch.bfloat16), (64, torch.float32)])
def test_lora_of_1_3b(monkeypatch, tmp_path, rank, dtype):
    names = [name for name in vars(lora) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(lora, name, Compiled(getattr(lora, name), tmp_path))
    wide, dropout = torch.empty(24 * 329, 2048 + rank, dtype=dtype), lora.Dropout(torch.zeros(1, dtype=torch.int64), 0.05)
    A, B, low = torch.empty(rank, 2048), torch.empty(8512, rank, dtype=dtype), wide[:, 2048:]
    lora.down(wide[:, :2048], A, dropout, low)
    dlow, _ = lora.outer_gradients(torch.empty(24 * 329, 8512, dtype=dtype), low, B)
    lora.inner_gradient(wide[:, :2048], dlow, dropout)
    lora.add_up(torch.empty(24 * 329, 2048, dtype=dtype), dlow, A, dropout)
    assert {name: getattr(lora, name).spilled for name in names} == {name: [0] for name in names}
    assert all(getattr(lora, name).shared <= LEAST_SHARED_MEMORY for name in names)


@pytest.fixture
def decode_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    stand_ins = {}
    for module, names in ((decode, ("project", "mix", "norm", "embed")), (decode_sample, ("score", "finish"))):
        for name in names:
            stand_ins[name] = Compiled(getattr(module, f"{name}_kernel"), tmp_path)
            monkeypatch.setattr(module, f"{name}_kernel", stand_ins[name])
    return stand_ins


@pytest.mark.parametrize(("num_rows", "capability"), [(1, 90), (2, 90), (2, 80)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_projections_of_1_3b(decode_kernels, monkeypatch, dtype, num_rows, capability):
    monkeypatch.setattr(Compiled, "capability", capability)
    monkeypatch.setattr(decode, "knows_float8", lambda device: capability > 80)
    lora = decode.Lora(torch.empty(16, 2048, dtype=torch.bfloat16), torch.empty(2, 8512, 8, dtype=torch.bfloat16), 4.0)
    shift = decode.Shift(
        torch.empty(4, 4352, 4, dtype=torch.bfloat16), torch.zeros(num_rows, dtype=torch.int64), torch.empty(num_rows, 256)
    )
    for n, k, options in ((8512, 2048, {"lora": lora}), (2048, 4096, {"add": True, "shift": shift})):
        weight = decode.Weight(torch.empty(n, k, dtype=dtype), None if dtype == torch.bfloat16 else torch.empty(n))
        out = torch.empty(num_rows, n + 16)
        decode.project(
            torch.empty(num_rows, k), torch.empty(k, dtype=torch.bfloat16), weight, out, eps=1e-5, pdl=capability == 90, **options
        )
    assert decode_kernels["project"].spilled == [0, 0] and decode_kernels["project"].shared <= LEAST_SHARED_MEMORY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_small", [False, True])
def test_products_of_few_rows(monkeypatch, tmp_path, request, is_small, dtype):
    if is_small:
        request.getfixturevalue("smaller_card")
    monkeypatch.setattr(decode, "matrix_kernel", Compiled(decode.matrix_kernel, tmp_path))
    for num_rows, (n, k, parts) in itertools.product((3, 64), ((8528, 2048, 1), (2048, 4096, 4))):
        out = torch.empty(parts, num_rows, n)
        decode.multiply_parts(torch.empty(num_rows, k, dtype=dtype), torch.empty(n, k, dtype=dtype), out, pdl=not is_small)
    assert set(decode.matrix_kernel.spilled) == {0}
    assert not is_small or decode.matrix_kernel.shared <= LEAST_SHARED_MEMORY


@pytest.mark.parametrize("num_rows", [1, 64])
def test_the_rest_of_a_step_of_1_3b(decode_kernels, num_rows):
    """The wide batch reads projections in bf16."""
    h, n, d_inner, conv_dim = 64, 128, 4096, 4352
    bf16 = torch.bfloat16
    slots = torch.zeros(num_rows, dtype=torch.int64)
    lora = decode.Lora(torch.empty(16, 2048, dtype=bf16), torch.empty(2, 8512, 8, dtype=bf16), 4.0)
    mixer = decode.MixerWeights(
        torch.empty(conv_dim, 4, dtype=bf16), torch.empty(conv_dim, dtype=bf16), torch.empty(h), torch.empty(h), torch.empty(h)
    )
    conv_state, ssm = torch.empty(num_rows, conv_dim, 4, dtype=bf16), torch.empty(num_rows, h, 64, n)
    projected = torch.empty(num_rows, 8528, dtype=torch.float32 if num_rows == 1 else bf16)
    y, newest = torch.empty(num_rows, d_inner), torch.empty(num_rows, 2 * n)
    decode.mix(projected, lora, mixer, conv_state, ssm, slots, slots, y, newest, pdl=True)
    residual, addend = torch.empty(num_rows, 2048), torch.empty(num_rows, 2048, dtype=bf16)
    decode.norm(residual, torch.empty(2048, dtype=bf16), addend, eps=1e-5, addend=addend, pdl=True)
    shift = decode.Shift(conv_state, slots, newest)
    squares = decode.Squares(torch.empty(num_rows, 512), d_inner)
    parts = torch.empty(4, num_rows, 2048)
    decode.norm(residual, torch.empty(2048, dtype=bf16), addend, eps=1e-5, addend=parts, squares=squares, shift=shift, pdl=True)
    decode.norm(y, torch.empty(d_inner, dtype=bf16), torch.empty(num_rows, d_inner, dtype=bf16), eps=1e-5, shift=shift, pdl=True)
    tables = [torch.empty(v, 2048, dtype=bf16) for v in (16384, 50288, 329, 1500)]
    embedding = decode.Embedding(tables[0], decode.Weight(tables[1]), tables[2], tables[3])
    decode.embed(slots, slots, slots, slots, embedding, residual, pdl=True)
    rows = decode_sample.Rows(*[slots] * 10, *[torch.empty(num_rows)] * 3)
    parts = (decode_sample.num_parts(16384), decode_sample.num_parts(50288))
    partial = decode_sample.Partial(*torch.empty(2, num_rows, max(parts)), torch.empty(num_rows, max(parts), dtype=torch.int64))
    flags = torch.zeros(50288, dtype=torch.int32)
    image_logits, text_logits = (torch.empty(num_rows, v) for v in (16384, 50288))
    decode_sample.score(image_logits, text_logits, flags, rows, partial, pdl=True)
    drawn = torch.zeros(num_rows, 16, dtype=torch.int64)
    decode_sample.finish(flags, rows, partial, drawn, parts=parts, pdl=True)
    del decode_kernels["project"]
    assert all(kernel.shared <= LEAST_SHARED_MEMORY for kernel in decode_kernels.values())
    assert {name: max(kernel.spilled) for name, kernel in decode_kernels.items()} == dict.fromkeys(decode_kernels, 0)
