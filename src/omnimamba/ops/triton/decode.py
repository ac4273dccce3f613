"""One position of the Mamba-2 backbone in three kernels per block, for a batch of few rows, each with its state in a slot of a pool.

`project` norms its input and multiplies it by a weight matrix (in_proj, out_proj, the heads), `mix` is everything between the two
projections: task LoRA, convolution, state update, gate. At a batch of few rows the time is that of reading the weights, so a program
loads its whole tile of weights first. On Hopper and later, kernels overlap (programmatic dependent launch): each lets the next one start
at once, and the tile travels while the kernel before still works. What an earlier kernel of the step writes is read after `gdc_wait`
only; the states and the weights are read before, which is safe because a step is one graph and touches each layer's state in one kernel.
(B and C are inputs of all programs of `mix`; their part of the conv state is therefore shifted by the kernel that follows.)

The definitions are `Mamba2Backbone.step` and what it calls. Activations are fp32 between kernels, whatever the weights are. A row whose
slot is negative is padding: nothing is stored for it. Weights may be quantised with one scale per output row.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# The bodies of kernels are Triton's language, and a kernel takes num_warps and num_stages beside its own arguments.

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from omnimamba.ops.norm import Squares
from omnimamba.ops.triton.launch import dot_dtype, launch, tile

try:
    from triton.language.extra import cuda as gdc
except ImportError:  # a Triton for other hardware
    gdc = None


class Weight(NamedTuple):
    """A matrix [n, k]; `scale` [n] fp32 multiplies its rows where it is quantised (int8 or float8)."""

    values: Tensor
    scale: Tensor | None = None


class Lora(NamedTuple):
    """The LoRA pairs of both tasks: A [2 * r, k] and B [2, n, r], MMU first."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.B.shape[2]


class MixerWeights(NamedTuple):
    conv_weight: Tensor  # [c, w]
    conv_bias: Tensor  # [c]
    A_log: Tensor  # [h]
    D: Tensor  # [h]
    dt_bias: Tensor  # [h]


class LayerWeights(NamedTuple):
    """A layer and its states."""

    norm: Tensor
    """[d]"""
    in_proj: Weight
    packed: Tensor | None
    """in_proj and, below it, the LoRA A of both tasks [n + 2 * r, d], for one matrix product; None if in_proj is quantised."""
    lora: Lora
    mixer: MixerWeights
    gated_norm: Tensor
    """[h * p]"""
    out_proj: Weight
    conv: Tensor
    """[slots, c, w]"""
    ssm: Tensor
    """[slots, h, p, n]"""


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Programmatic dependent launch exists from compute capability 9.0 on."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9


# How `widen` reads numbers.
AS_THEY_ARE, PACKED, BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def readable(values: Tensor) -> tuple[Tensor, int]:
    """What a kernel is given of values, and how `widen` reads it."""
    if values.dtype == torch.int8 and torch.version.cuda is not None and not knobs.runtime.interpret:
        return values, PACKED.value  # by NVIDIA's instructions, which the interpreter and other GPUs do not have
    if values.dtype == torch.float8_e4m3fn and not knows_float8(values.device):
        return values.view(torch.uint8), BITS.value
    return values, AS_THEY_ARE.value


@functools.cache
def knows_float8(device: torch.device) -> bool:
    """Float8 of this kind exists from compute capability 8.9 on."""
    return device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) >= (8, 9)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, as exact near 0 as elsewhere (Goldberg 1991, theorem 4)."""
    u = 1 + x
    near = u == 1
    return tl.where(near, x, x * (tl.log(u) / tl.where(near, 1.0, u - 1)))


@triton.jit
def softplus_slope(y):
    """The derivative of softplus where it is y: 1 - exp(-y), as exact near 0 as elsewhere (see `log1p`)."""
    y = tl.minimum(y, 20.0)  # 1 from there on
    u = tl.exp(-y)
    near = u == 1
    return tl.where(near, y, (1 - u) * (y / tl.where(near, 1.0, -tl.log(u))))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)): the square of a reciprocal root is two instructions, a division several."""
    root = tl.rsqrt(1 + tl.exp2(x * -LOG2_E))
    return root * root


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def reciprocal_rms(p_sums, eps, NUM: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr):
    """1 / the root mean square of K numbers; NUM sums of their squares are at p_sums."""
    o_s = tl.arange(0, TILE)
    b_sums = tl.load(p_sums + o_s, mask=o_s < NUM, other=0.0)
    return 1 / tl.sqrt(tl.sum(b_sums, 0) / K + eps)


@triton.jit
def start(PDL: tl.constexpr):
    if PDL:
        gdc.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    if PDL:
        gdc.gdc_wait()


@triton.jit
def widen(values, FORM: tl.constexpr):
    """The numbers in fp32.

    PACKED: int8, four to a register. The byte of number + 128 below the bits of 2**23 makes the fp32 number 2**23 + 128 + number: one
    permutation of bytes and one subtraction, exact. The GPU's conversion instruction has a fraction of their rate.
    BITS: those of float8 e4m3, whose exponent and mantissa at fp16's places are the number over 256.
    """
    if FORM == BITS:
        bits = values.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256
    if FORM == PACKED:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 bytes, wide<4>;
                xor.b32 bytes, $4, 0x80808080;
                prmt.b32 wide0, bytes, 0x4B000000, 0x7440;
                prmt.b32 wide1, bytes, 0x4B000000, 0x7441;
                prmt.b32 wide2, bytes, 0x4B000000, 0x7442;
                prmt.b32 wide3, bytes, 0x4B000000, 0x7443;
                sub.f32 $0, wide0, 0f4B000080;
                sub.f32 $1, wide1, 0f4B000080;
                sub.f32 $2, wide2, 0f4B000080;
                sub.f32 $3, wide3, 0f4B000080;
            }
            """,
            "=r,=r,=r,=r,r",
            [values],
            tl.float32,
            is_pure=True,
            pack=4,
        )
    return values.to(tl.float32)


@triton.jit
def shift_conv_state(
    conv, slots, p_new, i_row, first, conv_slot, new_row, NUM: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr, TAPS: tl.constexpr
):
    """The newest inputs of NUM channels from `first` on enter row i_row's conv state [c, w], the oldest leave."""
    slot = tl.load(slots + i_row).to(tl.int64)
    o_c = tl.arange(0, TILE)
    o_w = tl.arange(0, TAPS)
    m_c = (o_c < NUM) & (slot >= 0)
    p_conv = conv + slot * conv_slot + (first + o_c)[:, None] * W + o_w[None, :]
    past = tl.load(p_conv + 1, mask=m_c[:, None] & (o_w < W - 1)[None, :], other=0.0)
    new = tl.load(p_new + i_row * new_row + o_c, mask=m_c, other=0.0).to(past.dtype)
    tl.debug_barrier()  # channels are neighbours in memory: all reads come before the first write
    tl.store(p_conv, tl.where((o_w == W - 1)[None, :], new[:, None], past), mask=m_c[:, None] & (o_w < W)[None, :])


@triton.jit
def project_tile(
    x, norm_weight, weight, scale, out, eps, first, num_out, out_row,
    NUM_ROWS: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, HAS_SCALE: tl.constexpr, FORM: tl.constexpr,
    ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[:, first : first + TILE_N] of the rows; with ADD they gain the product instead of becoming it."""
    o_n = first + tl.arange(0, TILE_N)
    o_k = tl.arange(0, TILE_K)
    m_n = o_n < num_out
    m_k = o_k < K
    b_weight = tl.load(
        weight + o_n.to(tl.int64)[:, None] * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0, eviction_policy="evict_first"
    )
    b_norm = tl.load(norm_weight + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_scale = tl.zeros((TILE_N,), tl.float32) + 1
    if HAS_SCALE:
        b_scale = tl.load(scale + o_n, mask=m_n, other=0.0)
    wait(PDL)
    for i_row in tl.static_range(NUM_ROWS):
        b_x = tl.load(x + i_row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        p_out = out + i_row * out_row + o_n
        rstd = 1 / tl.sqrt(tl.sum(b_x * b_x, 0) / K + eps)
        b_out = tl.sum(widen(b_weight, FORM) * (b_x * b_norm)[None, :], 1) * (rstd * b_scale)
        if ADD:
            b_out += tl.load(p_out, mask=m_n, other=0.0)
        tl.store(p_out, b_out, mask=m_n)


@triton.jit
def project_kernel(
    x, norm_weight, weight, scale, lora_A, out, eps, num_out, out_row,
    conv, slots, newest, shift_first, conv_slot, newest_row,
    NUM_ROWS: tl.constexpr, K: tl.constexpr, NUM_LORA: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, HAS_SCALE: tl.constexpr,
    FORM: tl.constexpr, ADD: tl.constexpr, SHIFT: tl.constexpr, W: tl.constexpr, TILE_C: tl.constexpr, TAPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = rms_norm(x) @ weight.T, followed by the NUM_LORA products with lora_A; SHIFT: see `shift_conv_state`."""
    start(PDL)
    i_tile = tl.program_id(0)
    num_tiles = tl.cdiv(num_out, TILE_N)
    if i_tile < num_tiles:
        project_tile(
            x, norm_weight, weight, scale, out, eps, i_tile * TILE_N, num_out, out_row,
            NUM_ROWS, K, TILE_N, TILE_K, HAS_SCALE, FORM, ADD, PDL,
        )  # fmt: skip
        if SHIFT:
            for i_row in tl.static_range(NUM_ROWS):
                if i_tile == i_row % num_tiles:
                    shift_conv_state(conv, slots, newest, i_row, shift_first, conv_slot, newest_row, SHIFT, W, TILE_C, TAPS)
    else:
        if NUM_LORA:
            project_tile(
                x, norm_weight, lora_A, scale, out + num_out, eps, (i_tile - num_tiles) * TILE_N, NUM_LORA, out_row,
                NUM_ROWS, K, TILE_N, TILE_K, False, AS_THEY_ARE, False, PDL,
            )  # fmt: skip


@triton.jit
def load_conv(p_conv, conv_weight, conv_bias, o_c, m_c, W: tl.constexpr, TAPS: tl.constexpr):
    """Of channels o_c of the convolution: past inputs moved one place towards the oldest, taps, bias."""
    o_w = tl.arange(0, TAPS)
    m_past = m_c[:, None] & (o_w < W - 1)[None, :]
    past = tl.load(p_conv + o_c[:, None] * W + o_w[None, :] + 1, mask=m_past, other=0.0)
    taps = tl.load(conv_weight + o_c[:, None] * W + o_w[None, :], mask=m_c[:, None] & (o_w < W)[None, :], other=0.0).to(tl.float32)
    return past, taps, tl.load(conv_bias + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def load_lora(lora_B, o_n, m_n, RANK: tl.constexpr, TILE_R: tl.constexpr):
    """Rows o_n of B."""
    o_r = tl.arange(0, TILE_R)
    return tl.load(lora_B + o_n[:, None] * RANK + o_r[None, :], mask=m_n[:, None] & (o_r < RANK)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_projected(p_projected, o_n, m_n, b_lora, low):
    return tl.load(p_projected + o_n, mask=m_n, other=0.0).to(tl.float32) + tl.sum(b_lora * low[None, :], 1)


@triton.jit
def convolve(past, taps, bias, new, W: tl.constexpr, TAPS: tl.constexpr):
    """silu(conv + bias) with the newest inputs `new`, and the conv state that holds them."""
    newest = (tl.arange(0, TAPS) == W - 1)[None, :]
    inputs = tl.where(newest, new[:, None], past.to(tl.float32))
    return silu(tl.sum(inputs * taps, 1) + bias), inputs.to(past.dtype)


@triton.jit
def mix_kernel(
    projected, lora_B, conv_weight, conv_bias, A_log, D, dt_bias, conv, ssm, slots, is_t2i, y, newest,
    projected_row, conv_slot, ssm_slot, scaling,
    H: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr, RANK: tl.constexpr,
    TILE_P: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y * silu(z) [b, h * p] of one position, for TILE_P channels of a head per program.

    projected: [b, z|x|B|C|dt|A u of MMU|A u of T2I]; newest: [b, 2 * n] gets B and C before the convolution, for `shift_conv_state`.
    """
    start(PDL)
    num_tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    i_head = tl.program_id(0) // num_tiles
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(1)
    d_inner: tl.constexpr = H * P
    d_in_proj: tl.constexpr = 2 * d_inner + 2 * N + H
    slot = tl.load(slots + i_row).to(tl.int64)
    if slot < 0:
        wait(PDL)  # a kernel that ended before the one ahead of it would let the next one in too early
        return
    task = tl.load(is_t2i + i_row).to(tl.int32)
    o_p = i_tile * TILE_P + tl.arange(0, TILE_P)
    o_n = tl.arange(0, TILE_N)
    o_x = i_head * P + o_p
    m_p = o_p < P
    m_n = o_n < N
    p_state = ssm + slot * ssm_slot + o_x[:, None] * N + o_n[None, :]
    m_state = m_p[:, None] & m_n[None, :]
    state = tl.load(p_state, mask=m_state, other=0.0)
    p_conv = conv + slot * conv_slot
    x_past, x_taps, x_bias = load_conv(p_conv, conv_weight, conv_bias, o_x, m_p, W, TAPS)
    B_past, B_taps, B_bias = load_conv(p_conv, conv_weight, conv_bias, d_inner + o_n, m_n, W, TAPS)
    C_past, C_taps, C_bias = load_conv(p_conv, conv_weight, conv_bias, d_inner + N + o_n, m_n, W, TAPS)
    p_lora = lora_B + task * d_in_proj * RANK
    z_lora = load_lora(p_lora, o_x, m_p, RANK, TILE_R)
    x_lora = load_lora(p_lora, d_inner + o_x, m_p, RANK, TILE_R)
    B_lora = load_lora(p_lora, 2 * d_inner + o_n, m_n, RANK, TILE_R)
    C_lora = load_lora(p_lora, 2 * d_inner + N + o_n, m_n, RANK, TILE_R)
    o_r = tl.arange(0, TILE_R)
    o_dt = 2 * d_inner + 2 * N + i_head
    dt_lora = tl.load(p_lora + o_dt * RANK + o_r, mask=o_r < RANK, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(A_log + i_head).to(tl.float32))
    bias = tl.load(dt_bias + i_head).to(tl.float32)
    skip = tl.load(D + i_head).to(tl.float32)

    wait(PDL)
    p_projected = projected + i_row * projected_row
    low = tl.load(p_projected + d_in_proj + task * RANK + o_r, mask=o_r < RANK, other=0.0).to(tl.float32) * scaling
    z = load_projected(p_projected, o_x, m_p, z_lora, low)
    x = load_projected(p_projected, d_inner + o_x, m_p, x_lora, low)
    B = load_projected(p_projected, 2 * d_inner + o_n, m_n, B_lora, low)
    C = load_projected(p_projected, 2 * d_inner + N + o_n, m_n, C_lora, low)
    dt = tl.load(p_projected + o_dt).to(tl.float32) + tl.sum(dt_lora * low, 0) + bias
    if tl.program_id(0) == 0:
        p_newest = newest + i_row * 2 * N + o_n
        tl.store(p_newest, B, mask=m_n)
        tl.store(p_newest + N, C, mask=m_n)
    x, x_inputs = convolve(x_past, x_taps, x_bias, x, W, TAPS)
    B, _ = convolve(B_past, B_taps, B_bias, B, W, TAPS)
    C, _ = convolve(C_past, C_taps, C_bias, C, W, TAPS)
    o_w = tl.arange(0, TAPS)
    tl.store(p_conv + o_x[:, None] * W + o_w[None, :], x_inputs, mask=m_p[:, None] & (o_w < W)[None, :])
    dt = tl.where(dt > 20, dt, log1p(tl.exp(tl.minimum(dt, 20.0))))
    new = state.to(tl.float32) * tl.exp(dt * rate) + (dt * x)[:, None] * B[None, :]
    tl.store(p_state, new.to(state.dtype), mask=m_state)
    tl.store(y + i_row * d_inner + o_x, (tl.sum(new * C[None, :], 1) + x * skip) * silu(z), mask=m_p)


@triton.jit
def matrix_kernel(
    x, weight, out, num_out,
    NUM_ROWS: tl.constexpr, K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out: [SPLITS, b, n], whose sum over the first axis is x @ weight.T: each program multiplies its part of the columns."""
    start(PDL)
    o_m = tl.arange(0, TILE_M)
    o_n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    o_k = tl.program_id(1) * (K // SPLITS) + tl.arange(0, TILE_K)
    m_m = (o_m < NUM_ROWS)[:, None]
    m_n = o_n < num_out
    p_x = x + o_m[:, None] * K + o_k[None, :]
    p_weight = weight + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    b_out = tl.zeros((TILE_M, TILE_N), tl.float32)
    wait(PDL)
    for k in tl.range(0, K // SPLITS, TILE_K, num_stages=STAGES):
        b_x = tl.load(p_x + k, mask=m_m, other=0.0).to(DOT)
        b_weight = tl.load(p_weight + k, mask=m_n[:, None], other=0.0).to(DOT)
        b_out = tl.dot(b_x, tl.trans(b_weight), b_out, input_precision="ieee")
    p_out = out + (tl.program_id(1) * NUM_ROWS + o_m)[:, None] * num_out + o_n[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m & m_n[None, :])


@triton.jit
def norm_kernel(
    x, addend, squares, weight, out, eps, conv, slots, newest, shift_first, conv_slot, newest_row,
    K: tl.constexpr, TILE_K: tl.constexpr, NUM_ADDENDS: tl.constexpr, NUM_SQUARES: tl.constexpr, TILE_S: tl.constexpr,
    SQUARES_K: tl.constexpr,
    SHIFT: tl.constexpr, W: tl.constexpr, TILE_C: tl.constexpr, TAPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = rms_norm(x), one row per program; x gains NUM_ADDENDS addends first.

    NUM_SQUARES: the addends have yet to be divided by the root mean square of SQUARES_K numbers, whose squares sum up to so many.
    """
    start(PDL)
    i_row = tl.program_id(0)
    o_k = tl.arange(0, TILE_K)
    m_k = o_k < K
    b_weight = tl.load(weight + o_k, mask=m_k, other=0.0).to(tl.float32)
    wait(PDL)
    p_x = x + i_row * K + o_k
    b_x = tl.load(p_x, mask=m_k, other=0.0).to(tl.float32)
    if NUM_ADDENDS:
        b_added = tl.zeros((TILE_K,), tl.float32)
        for i in tl.static_range(NUM_ADDENDS):
            b_added += tl.load(addend + (i * tl.num_programs(0) + i_row) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        if NUM_SQUARES:
            b_added *= reciprocal_rms(squares + i_row * NUM_SQUARES, eps, NUM_SQUARES, TILE_S, SQUARES_K)
        b_x += b_added
        tl.store(p_x, b_x, mask=m_k)
    b_out = b_x * (1 / tl.sqrt(tl.sum(b_x * b_x, 0) / K + eps)) * b_weight
    tl.store(out + i_row * K + o_k, b_out.to(out.dtype.element_ty), mask=m_k)
    if SHIFT:
        shift_conv_state(conv, slots, newest, i_row, shift_first, conv_slot, newest_row, SHIFT, W, TILE_C, TAPS)


@triton.jit
def embed_kernel(
    tokens, is_t2i, slots, position, image_table, text_table, text_scale, image_positions, text_positions, out, norm, next, squares,
    num_image_positions, num_text_positions,
    HAS_SCALE: tl.constexpr, FORM: tl.constexpr, K: tl.constexpr, TILE_K: tl.constexpr, HAS_NEXT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = table[token] + positions[position of the slot], rounded as in the table's dtype; the slot's position moves on by one.

    HAS_NEXT: next = out * norm, and the sum of out's squares.
    """
    start(PDL)
    i_row = tl.program_id(0)
    wait(PDL)
    slot = tl.load(slots + i_row).to(tl.int64)
    token = tl.load(tokens + i_row).to(tl.int64)
    is_image = tl.load(is_t2i + i_row) != 0
    if slot < 0:
        return
    o_k = tl.arange(0, TILE_K)
    m_k = o_k < K
    at = tl.load(position + slot)
    if is_image:
        b_token = tl.load(image_table + token * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_position = tl.load(image_positions + tl.minimum(at, num_image_positions - 1) * K + o_k, mask=m_k, other=0.0)
    else:
        b_token = widen(tl.load(text_table + token * K + o_k, mask=m_k, other=0.0), FORM)
        if HAS_SCALE:
            b_token *= tl.load(text_scale + token)
        b_position = tl.load(text_positions + tl.minimum(at, num_text_positions - 1) * K + o_k, mask=m_k, other=0.0)
    total = (b_token + b_position.to(tl.float32)).to(b_position.dtype)
    b_out = total.to(tl.float32)
    tl.store(out + i_row * K + o_k, b_out, mask=m_k)
    if HAS_NEXT:
        b_norm = tl.load(norm + o_k, mask=m_k, other=0.0).to(tl.float32)
        tl.store(next + i_row * K + o_k, (b_out * b_norm).to(next.dtype.element_ty), mask=m_k)
        tl.store(squares + i_row, tl.sum(b_out * b_out, 0))
    tl.store(position + slot, at + 1)


class Shift(NamedTuple):
    """What `shift_conv_state` needs: the layer's conv states [slots, c, w], the rows' slots [b], the newest B and C [b, 2 * n]."""

    conv: Tensor
    slots: Tensor
    newest: Tensor


def shift_arguments(shift: Shift | None, other: Tensor) -> tuple[tuple[Any, ...], dict[str, int]]:
    if shift is None:
        return (other, other, other, 0, 0, 0), {"SHIFT": 0, "W": 1, "TILE_C": 1, "TAPS": 1}
    num = shift.newest.shape[1]
    conv_dim, w = shift.conv.shape[1:]
    pointers = (shift.conv, shift.slots, shift.newest, conv_dim - num, shift.conv.stride(0), num)
    return pointers, {"SHIFT": num, "W": w, "TILE_C": triton.next_power_of_2(num), "TAPS": triton.next_power_of_2(w)}


def project(
    x: Tensor,
    norm_weight: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    eps: float,
    lora: Lora | None = None,
    add: bool = False,
    shift: Shift | None = None,
    pdl: bool = False,
) -> None:
    """out = rms_norm(x) @ weight.T; `add`: out += it. With `lora` the rows of A follow those of the weight.

    x: [b, k]; out: [b, n or n + 2 * r] fp32.
    """
    num_out, k = weight.values.shape
    choice = launch("decode_project_8bit" if weight.values.itemsize == 1 else "decode_project", k, weight.values.device)
    num_lora = 0 if lora is None else lora.A.shape[0]
    programs = triton.cdiv(num_out, choice.rows) + triton.cdiv(num_lora, choice.rows)
    pointers, shift_sizes = shift_arguments(shift, out)
    values, form = readable(weight.values)
    with torch.cuda.device_of(x):
        project_kernel[(programs,)](
            x, norm_weight, values, out if weight.scale is None else weight.scale, out if lora is None else lora.A, out, eps,
            num_out, out.stride(0), *pointers, NUM_ROWS=x.shape[0], K=k, NUM_LORA=num_lora, TILE_N=choice.rows,
            TILE_K=triton.next_power_of_2(k), HAS_SCALE=weight.scale is not None, FORM=form, ADD=add, **shift_sizes,
            PDL=pdl,
            num_warps=choice.num_warps, num_stages=choice.num_stages, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


def mix(
    projected: Tensor,
    lora: Lora,
    weights: MixerWeights,
    conv: Tensor,
    ssm: Tensor,
    slots: Tensor,
    is_t2i: Tensor,
    y: Tensor,
    newest: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """y [b, h * p] from projected [b, ...], see `mix_kernel`; `ssm` and x's part of `conv` are updated in place.

    conv: [slots, c, w]; ssm: [slots, h, p, n]; slots, is_t2i: [b].
    """
    h, p, n = ssm.shape[1:]
    b, w = slots.shape[0], conv.shape[2]
    choice = launch("decode_mix" if ssm.dtype == torch.float32 else "decode_mix_half", b, ssm.device)
    tile_p = min(choice.rows, triton.next_power_of_2(p))
    grid = (h * triton.cdiv(p, tile_p), b)
    with torch.cuda.device_of(ssm):
        mix_kernel[grid](
            projected, lora.B, *weights, conv, ssm, slots, is_t2i, y, newest, projected.stride(0), conv.stride(0), ssm.stride(0),
            lora.scaling, H=h, P=p, N=n, W=w, RANK=lora.rank, TILE_P=tile_p, TILE_N=triton.next_power_of_2(n),
            TILE_R=triton.next_power_of_2(lora.rank), TAPS=triton.next_power_of_2(w), PDL=pdl,
            num_warps=choice.num_warps, num_stages=choice.num_stages, **({"launch_pdl": True} if pdl else {}),
            **({"maxnreg": choice.max_registers} if choice.max_registers else {}),
        )  # fmt: skip


def matrix_tile(k: int, parts: int) -> int:
    """In tiles of how many columns `multiply_parts` multiplies each of so many parts of k columns; 0 if it cannot."""
    part = k // parts
    tile_k = min(launch("decode_matrix", k).columns, part & -part)  # whole tiles, powers of two
    return tile_k if k % parts == 0 and tile_k >= 16 else 0


def matrix_parts(k: int) -> int:
    """In how many parts of k columns products of few rows and outputs are fastest; 0 if they cannot be made in parts."""
    return next((parts for parts in (4, 2) if matrix_tile(k, parts)), 0)


def multiply_parts(x: Tensor, weight: Tensor, out: Tensor, *, pdl: bool = False) -> None:
    """out [parts, b, n], whose sum is x @ weight.T: each is the product of a part of the columns. x: [b, k] of few rows; weight: [n, k].

    cuBLAS leaves much of the memory's rate unused where rows are few, and lets neither kernel beside it start early.
    """
    b, k = x.shape
    (parts, _, n), choice = out.shape, launch("decode_matrix", k, x.device)
    tile_k = min(choice.columns, matrix_tile(k, parts))
    with torch.cuda.device_of(x):
        matrix_kernel[(triton.cdiv(n, choice.rows), parts)](
            x, weight, out, n, NUM_ROWS=b, K=k, TILE_M=tile(b), TILE_N=choice.rows, TILE_K=tile_k, SPLITS=parts,
            STAGES=choice.num_stages, DOT=dot_dtype(x.dtype), PDL=pdl, num_warps=choice.num_warps, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


def norm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    eps: float,
    addend: Tensor | None = None,
    squares: Squares | None = None,
    shift: Shift | None = None,
    pdl: bool = False,
) -> None:
    """out = rms_norm(x); with an addend, or a stack of them, x gains it first, in place. x, out: [b, k]; addend: [b, k] or [a, b, k].

    squares: what the addend is the product of has yet to be normed, with the same eps.
    """
    b, k = x.shape
    sums, num = (out, 0) if squares is None else (squares.sums, squares.sums.shape[1])
    pointers, shift_sizes = shift_arguments(shift, out)
    choice = launch("decode_norm", k)
    with torch.cuda.device_of(x):
        norm_kernel[(b,)](
            x, out if addend is None else addend, sums, weight, out, eps, *pointers, K=k, TILE_K=triton.next_power_of_2(k),
            NUM_ADDENDS=0 if addend is None else addend.numel() // x.numel(), NUM_SQUARES=num, TILE_S=triton.next_power_of_2(max(1, num)),
            SQUARES_K=1 if squares is None else squares.k, **shift_sizes,
            PDL=pdl, num_warps=choice.num_warps, num_stages=choice.num_stages,
            **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


class Embedding(NamedTuple):
    """Tables [v, d] and position tables [l, d] of both vocabularies, all of one dtype but for a quantised text table."""

    image_table: Tensor
    text_table: Weight
    image_positions: Tensor
    text_positions: Tensor


class Normed(NamedTuple):
    """Where rows of the residual stream go on their way to a norm's product."""

    weight: Tensor
    """[d], the norm's."""
    values: Tensor
    """[b, d], rows times the weight, which have yet to be divided by their root mean square."""
    squares: Tensor
    """[b, 1] fp32: the sum of a row's squares."""


def embed(
    tokens: Tensor,
    is_t2i: Tensor,
    slots: Tensor,
    position: Tensor,
    tables: Embedding,
    out: Tensor,
    next: Normed | None = None,
    *,
    pdl: bool = False,
) -> None:
    """out [b, d] fp32: embedding plus position of each row's token; `position` [slots] moves on by one, in place."""
    b, k = out.shape
    targets = (out, out, out) if next is None else next
    text = tables.text_table
    values, form = readable(text.values)
    with torch.cuda.device_of(out):
        embed_kernel[(b,)](
            tokens, is_t2i, slots, position, tables.image_table, values, out if text.scale is None else text.scale,
            tables.image_positions, tables.text_positions, out, *targets, tables.image_positions.shape[0], tables.text_positions.shape[0],
            HAS_SCALE=text.scale is not None, FORM=form, K=k, TILE_K=triton.next_power_of_2(k), HAS_NEXT=next is not None, PDL=pdl,
            num_warps=4, num_stages=1, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
