"""One decode step of the backbone and the heads on a CPU, compiled by Numba: a few threads go through all blocks together.

Every thread calls `run` with its number. Work is split by output rows of a matrix, by heads or by channels, so that no result depends on
how many threads there are; what all need (norms, the low side of a LoRA pair, the convolution of B and C) each computes for itself. Three
times a block they wait for each other, by a counter in memory.

Matrices are read where they lie: fp32, bf16, int8, float8_e4m3fn or the 4 bits of `QuantizedWeight`, converted to fp32 in registers. All
activations are fp32. With one row of activations, a step takes the time of reading the weights; further rows share what was read.
"""

# pyright: reportCallIssue=false
# An intrinsic's own first argument is Numba's, a call does not pass it.

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import register_jitable

from omnimamba.ops.cpu import LANES
from omnimamba.ops.cpu.vector import (
    FLOAT,
    compiled,
    fma,
    full,
    get_bf16,
    get_f32,
    jit,
    load_bf16,
    load_f32,
    load_fp8,
    load_int8,
    nibble_products,
    prefetch,
    set_bf16,
    set_f32,
    set_i16,
    set_i32,
    silu,
    store_bf16,
    store_f32,
    total,
    wait_for_all,
)
from omnimamba.ops.quant import GROUP_SIZE

F32, BF16, INT8, FP8, INT4 = range(5)
"""Number formats of a matrix; states have the first two."""
TILE = 4
"""Rows of activations that are multiplied with a weight while it is in a register."""
AHEAD = 4096
"""Bytes between what is read and what is asked of memory."""
LINE = 64
"""Bytes of a cache line."""
float32, int16, int32 = numba.float32, numba.int16, numba.int32


class Shape(NamedTuple):
    """Sizes of the model, and the number formats of its matrices and states."""

    n_layer: int
    d_model: int
    d_inner: int
    nheads: int
    headdim: int
    d_state: int
    ngroups: int
    d_conv: int
    rank: int
    """Of the LoRA pairs, rounded up to whole vectors; 0 without."""
    image_vocab_size: int
    text_vocab_size: int
    eps: float
    weights: int
    conv: int
    ssm: int


class Layer(NamedTuple):
    """Addresses of a block's tensors; fp32 unless said."""

    norm: int
    in_proj: int
    """[n, d_model] in the format Shape.weights; rows z, x, B, C, dt."""
    in_scale: int
    lora_A: int
    """[2, rank, d_model], that of understanding first."""
    lora_B: int
    """[2, n, rank], times LoRA's scaling, by the scales of in_proj if a row has one."""
    conv_weight: int
    """[c, d_conv]"""
    conv_bias: int
    dt_bias: int
    A: int
    """[h], negative"""
    D: int
    gated_norm: int
    out_proj: int
    out_scale: int
    conv: int
    """[slots, c, d_conv] in the format Shape.conv."""
    ssm: int
    """[slots, h, p, n] in the format Shape.ssm."""


class Heads(NamedTuple):
    """Addresses of the final norm and of the embeddings that are the heads."""

    norm: int
    image: int
    image_scale: int
    text: int
    text_scale: int


class Rows(NamedTuple):
    """What a step reads and writes: addresses of fp32 numbers, unless said."""

    num: int
    num_t2i: int
    """The first rows paint, the others understand."""
    slots: Any
    """[num] int64"""
    residual: int
    """[num, d_model]: embeddings before the step, the residual stream after it."""
    projected: int
    """[num, n]"""
    gated: int
    """[num, d_inner]"""
    image_logits: int
    """[num_t2i, image_vocab_size]"""
    text_logits: int
    """[num - num_t2i, text_vocab_size]"""


class Matrix(NamedTuple):
    format: int
    values: int
    scale: int
    """fp32 of each row or, in INT4, bf16 of each group of a row; else none."""
    num_rows: int
    num_columns: int


class Factor(NamedTuple):
    """Rows of activations, `stride` numbers apart, and what the low side of their LoRA pair makes of them [num, rank]."""

    num: int
    values: int
    stride: int
    low: int
    lora_B: int
    num_t2i: int
    rank: int


class Thread(NamedTuple):
    number: int
    num_threads: int
    counter: int
    """The address of an int64 that is 0 before the step."""
    scratch: int
    """The address of `scratch_size` fp32 numbers."""


# ---- products


def _products(load: Any, size: int) -> tuple[Any, Any]:
    """Functions that multiply a row of weights, numbers of `size` bytes, with one row and with TILE rows of activations.

    Both sum each product in two vectors in the same order: what comes out for a row does not depend on the others.
    """

    @jit
    def one(w, x, k, a):
        """The vector a plus the sum over k columns of w x."""
        b = full(float32(0))
        whole = k - k % (2 * LANES)
        for i in range(0, whole, 2 * LANES):
            for line in range(0, 2 * LANES * size, LINE):
                prefetch(w + size * i + line + AHEAD)
            a = fma(load(w + size * i), load_f32(x + FLOAT * i), a)
            b = fma(load(w + size * (i + LANES)), load_f32(x + FLOAT * (i + LANES)), b)
        if whole < k:
            a = fma(load(w + size * whole), load_f32(x + FLOAT * whole), a)
        return total(a + b)

    @jit
    def tile(w, x, stride, k, a0, a1, a2, a3):
        """The same for rows of activations `stride` numbers apart."""
        b0 = full(float32(0))
        b1, b2, b3 = b0, b0, b0
        x1, x2, x3 = x + FLOAT * stride, x + FLOAT * 2 * stride, x + FLOAT * 3 * stride
        whole = k - k % (2 * LANES)
        for i in range(0, whole, 2 * LANES):
            for line in range(0, 2 * LANES * size, LINE):
                prefetch(w + size * i + line + AHEAD)
            left, right, second = load(w + size * i), load(w + size * (i + LANES)), FLOAT * (i + LANES)
            a0, b0 = fma(left, load_f32(x + FLOAT * i), a0), fma(right, load_f32(x + second), b0)
            a1, b1 = fma(left, load_f32(x1 + FLOAT * i), a1), fma(right, load_f32(x1 + second), b1)
            a2, b2 = fma(left, load_f32(x2 + FLOAT * i), a2), fma(right, load_f32(x2 + second), b2)
            a3, b3 = fma(left, load_f32(x3 + FLOAT * i), a3), fma(right, load_f32(x3 + second), b3)
        if whole < k:
            left = load(w + size * whole)
            a0, a1 = fma(left, load_f32(x + FLOAT * whole), a0), fma(left, load_f32(x1 + FLOAT * whole), a1)
            a2, a3 = fma(left, load_f32(x2 + FLOAT * whole), a2), fma(left, load_f32(x3 + FLOAT * whole), a3)
        return total(a0 + b0), total(a1 + b1), total(a2 + b2), total(a3 + b3)

    return one, tile


_one_f32, _tile_f32 = _products(load_f32, 4)
_one_bf16, _tile_bf16 = _products(load_bf16, 2)
_one_int8, _tile_int8 = _products(load_int8, 1)
_one_fp8, _tile_fp8 = _products(load_fp8, 1)


@jit
def _two_int4(w0, w1, scale0, scale1, x, k, a0, a1):
    """As the products of the other formats, of two rows of weights: one alone ends before its sums are out of the pipeline.

    x: see `round_columns`; scale: of each group of a row, bf16.
    """
    odd, starts, x_scale = x + k, x + 2 * k, get_f32(x + 3 * k)
    b0 = full(float32(0))
    b1 = b0
    for group in range(k // GROUP_SIZE):
        i = group * GROUP_SIZE
        if group % 2 == 0:
            prefetch(w0 + i // 2 + AHEAD)
            prefetch(w1 + i // 2 + AHEAD)
        b0 = fma(nibble_products(w0 + i // 2, x + i, odd + i, starts + i), full(get_bf16(scale0 + 2 * group)), b0)
        b1 = fma(nibble_products(w1 + i // 2, x + i, odd + i, starts + i), full(get_bf16(scale1 + 2 * group)), b1)
    return total(fma(b0, full(x_scale), a0)), total(fma(b1, full(x_scale), a1))


@jit
def round_columns(x, k, y):
    """Writes x [k] as `_two_int4` reads it: int16 numbers of x over a common scale, those of even columns [k / 2] and of odd ones [k / 2];
    of each group LANES int32 numbers whose sum takes off the 8 that nibbles have too much; the scale.
    """
    largest, nothing = float32(0), float32(0)
    for i in range(k):
        number = get_f32(x + FLOAT * i)
        largest, nothing = max(largest, abs(number)), nothing + number * float32(0)
    scale = largest / float32(32767) if largest > 0 else float32(1)
    for group in range(k // GROUP_SIZE):
        added = int32(0)
        for i in range(group * GROUP_SIZE, (group + 1) * GROUP_SIZE):
            rounded = int16(np.rint(get_f32(x + FLOAT * i) / scale))
            set_i16(y + 2 * (i // 2) + (k if i % 2 else 0), rounded)
            added += rounded
        for lane in range(LANES):
            set_i32(y + 2 * k + GROUP_SIZE * group + FLOAT * lane, int32(-8 * added if lane == 0 else 0))
    set_f32(y + 3 * k, scale + nothing)  # NaN if a number is no number


@jit
def low_product(x, row, n, j):
    """What a row's LoRA pair adds to its product with row j of a matrix [n, k], as a vector that sums up to it."""
    added = full(float32(0))
    lora_B = x.lora_B + FLOAT * ((n if row < x.num_t2i else 0) + j) * x.rank
    for i in range(0, x.rank, LANES):
        added = fma(load_f32(lora_B + FLOAT * i), load_f32(x.low + FLOAT * (row * x.rank + i)), added)
    return added


@jit
def put_product(address, product, adds):
    set_f32(address, get_f32(address) + product if adds else product)


@jit
def multiply(matrix, x, out, adds, thread):
    """A thread's part of out = matrix x, or of out += matrix x. out: [x.num, matrix.num_rows]."""
    if matrix.format == INT4:
        multiply_int4(matrix, x, out, adds, thread)
        return
    form, k, n = matrix.format, matrix.num_columns, matrix.num_rows
    row_bytes = k * (4 if form == F32 else 2 if form == BF16 else 1)
    num_tiled = x.num - x.num % TILE
    first, last = part(n, thread)
    for j in range(first, last):
        w = matrix.values + row_bytes * j
        row_scale = get_f32(matrix.scale + FLOAT * j) if form == INT8 or form == FP8 else float32(1)
        for row in range(0, num_tiled, TILE):
            v = x.values + FLOAT * x.stride * row
            a0, a1 = low_product(x, row, n, j), low_product(x, row + 1, n, j)
            a2, a3 = low_product(x, row + 2, n, j), low_product(x, row + 3, n, j)
            if form == INT8:
                y0, y1, y2, y3 = _tile_int8(w, v, x.stride, k, a0, a1, a2, a3)
            elif form == BF16:
                y0, y1, y2, y3 = _tile_bf16(w, v, x.stride, k, a0, a1, a2, a3)
            elif form == FP8:
                y0, y1, y2, y3 = _tile_fp8(w, v, x.stride, k, a0, a1, a2, a3)
            else:
                y0, y1, y2, y3 = _tile_f32(w, v, x.stride, k, a0, a1, a2, a3)
            at = out + FLOAT * (n * row + j)
            put_product(at, y0 * row_scale, adds)
            put_product(at + FLOAT * n, y1 * row_scale, adds)
            put_product(at + FLOAT * 2 * n, y2 * row_scale, adds)
            put_product(at + FLOAT * 3 * n, y3 * row_scale, adds)
        for row in range(num_tiled, x.num):
            v, a = x.values + FLOAT * x.stride * row, low_product(x, row, n, j)
            if form == INT8:
                y = _one_int8(w, v, k, a)
            elif form == BF16:
                y = _one_bf16(w, v, k, a)
            elif form == FP8:
                y = _one_fp8(w, v, k, a)
            else:
                y = _one_f32(w, v, k, a)
            put_product(out + FLOAT * (n * row + j), y * row_scale, adds)


@jit
def multiply_int4(matrix, x, out, adds, thread):
    k, n = matrix.num_columns, matrix.num_rows
    num_groups = k // GROUP_SIZE
    first, last = part(n, thread)
    for j in range(first, last, 2):
        other = min(j + 1, last - 1)  # an odd last row is computed twice, and its sum is put once
        w0, w1 = matrix.values + k // 2 * j, matrix.values + k // 2 * other
        scale0, scale1 = matrix.scale + 2 * num_groups * j, matrix.scale + 2 * num_groups * other
        prefetch(scale0 + 2 * AHEAD // GROUP_SIZE)
        for row in range(x.num):
            a0, a1 = low_product(x, row, n, j), low_product(x, row, n, other)
            y0, y1 = _two_int4(w0, w1, scale0, scale1, x.values + FLOAT * x.stride * row, k, a0, a1)
            put_product(out + FLOAT * (n * row + j), y0, adds)
            if other > j:
                put_product(out + FLOAT * (n * row + other), y1, adds)


@jit
def part(num, thread):
    """The first and the last of `num` things that are a thread's."""
    return num * thread.number // thread.num_threads, num * (thread.number + 1) // thread.num_threads


# ---- a block, position by position


@jit
def normalise(x, weight, k, eps, y):
    """y = x / rms(x) * weight of k numbers."""
    squares = full(float32(0))
    for i in range(0, k, LANES):
        value = load_f32(x + FLOAT * i)
        squares = fma(value, value, squares)
    scale = full(float32(1 / math.sqrt(total(squares) / float32(k) + float32(eps))))
    for i in range(0, k, LANES):
        store_f32(y + FLOAT * i, load_f32(x + FLOAT * i) * scale * load_f32(weight + FLOAT * i))


@jit
def size_of(form):
    return 2 if form == BF16 else FLOAT


@jit
def get(form, address, i):
    return get_bf16(address + 2 * i) if form == BF16 else get_f32(address + FLOAT * i)


@jit
def put(form, address, i, number):
    if form == BF16:
        set_bf16(address + 2 * i, number)
    else:
        set_f32(address + FLOAT * i, number)


@jit
def convolve(form, state, weight, bias, x, first, last, w, out):
    """out = silu(convolution) of channels first..last at the input x, with the w - 1 inputs before it in `state` [c, w]."""
    for c in range(first, last):
        y = get_f32(bias + FLOAT * c) + get_f32(weight + FLOAT * (c * w + w - 1)) * get_f32(x + FLOAT * c)
        for tap in range(w - 1):
            y += get_f32(weight + FLOAT * (c * w + tap)) * get(form, state, c * w + tap + 1)
        set_f32(out + FLOAT * (c - first), y)
    for i in range(0, last - first, LANES):
        store_f32(out + FLOAT * i, silu(load_f32(out + FLOAT * i)))


@jit
def shift(form, state, x, first, last, w):
    """Takes the inputs x of channels first..last into `state` [c, w]."""
    for c in range(first, last):
        for tap in range(w - 1):
            put(form, state, c * w + tap, get(form, state, c * w + tap + 1))
        put(form, state, c * w + w - 1, get_f32(x + FLOAT * c))


@jit
def scan_step(form, state, p, n, x, B, C, dt, decay, D, y):
    """y [p] of a head's inputs x [p], and its state [p, n] one position on, in place (`omnimamba.ops.ssd`)."""
    decays = full(decay)
    for row in range(p):
        value = get_f32(x + FLOAT * row)
        step, added = full(value * dt), full(float32(0))
        for i in range(0, n, LANES):
            address = state + size_of(form) * (row * n + i)
            if form == BF16:
                new = fma(load_bf16(address), decays, step * load_f32(B + FLOAT * i))
                store_bf16(address, new)
            else:
                new = fma(load_f32(address), decays, step * load_f32(B + FLOAT * i))
                store_f32(address, new)
            added = fma(new, load_f32(C + FLOAT * i), added)
        set_f32(y + FLOAT * row, total(added) + value * D)


@jit
def enter(layer, shape, rows, thread):
    """A block up to the output of in_proj."""
    d, num, stride = shape.d_model, rows.num, stride_of(shape)
    u = thread.scratch
    low = u + FLOAT * 2 * num * stride
    for row in range(num):
        normalise(rows.residual + FLOAT * row * d, layer.norm, d, shape.eps, u + FLOAT * row * stride)
        for i in range(shape.rank):
            lora_A = layer.lora_A + FLOAT * ((shape.rank if row < rows.num_t2i else 0) + i) * d
            set_f32(low + FLOAT * (row * shape.rank + i), _one_f32(lora_A, u + FLOAT * row * stride, d, full(float32(0))))
    factor = Factor(num, prepared(shape, num, d, thread), stride, low, layer.lora_B, rows.num_t2i, shape.rank)
    multiply(Matrix(shape.weights, layer.in_proj, layer.in_scale, width_of(shape), d), factor, rows.projected, False, thread)


@jit
def mix(layer, shape, rows, thread):
    """From there to the gated output of the scan, for a thread's heads. The conv state of B and C is left as it was."""
    n, p, w = shape.d_state, shape.headdim, shape.d_conv
    d_inner, group_width = shape.d_inner, shape.ngroups * shape.d_state
    conv_dim = d_inner + 2 * group_width
    B = thread.scratch
    C, x = B + FLOAT * group_width, B + FLOAT * 2 * group_width
    first, last = part(shape.nheads, thread)
    for row in range(rows.num):
        z = rows.projected + FLOAT * row * width_of(shape)
        xBC, dts = z + FLOAT * d_inner, z + FLOAT * (d_inner + conv_dim)
        conv = layer.conv + size_of(shape.conv) * rows.slots[row] * conv_dim * w
        ssm = layer.ssm + size_of(shape.ssm) * rows.slots[row] * shape.nheads * p * n
        convolve(shape.conv, conv, layer.conv_weight, layer.conv_bias, xBC, d_inner, conv_dim, w, B)
        for h in range(first, last):
            convolve(shape.conv, conv, layer.conv_weight, layer.conv_bias, xBC, h * p, (h + 1) * p, w, x)
            shift(shape.conv, conv, xBC, h * p, (h + 1) * p, w)
            raw = get_f32(dts + FLOAT * h) + get_f32(layer.dt_bias + FLOAT * h)
            dt = float32(raw if raw > 20 else math.log1p(math.exp(raw)))
            decay = float32(math.exp(dt * get_f32(layer.A + FLOAT * h)))
            group = FLOAT * (h // (shape.nheads // shape.ngroups)) * n
            state = ssm + size_of(shape.ssm) * h * p * n
            y = rows.gated + FLOAT * (row * d_inner + h * p)
            scan_step(shape.ssm, state, p, n, x, B + group, C + group, dt, decay, get_f32(layer.D + FLOAT * h), y)
            for i in range(0, p, LANES):
                gate = silu(load_f32(z + FLOAT * (h * p + i)))
                store_f32(y + FLOAT * i, load_f32(y + FLOAT * i) * gate)


@jit
def leave(layer, shape, rows, thread):
    """From there to the residual stream, and B and C into the conv state."""
    d_inner, group_width, stride = shape.d_inner, shape.ngroups * shape.d_state, stride_of(shape)
    conv_dim, normed = d_inner + 2 * group_width, d_inner // shape.ngroups
    first, last = part(2 * group_width, thread)
    for row in range(rows.num):
        for i in range(0, d_inner, normed):
            y = rows.gated + FLOAT * (row * d_inner + i)
            normalise(y, layer.gated_norm + FLOAT * i, normed, shape.eps, thread.scratch + FLOAT * (row * stride + i))
        conv = layer.conv + size_of(shape.conv) * rows.slots[row] * conv_dim * shape.d_conv
        xBC = rows.projected + FLOAT * (row * width_of(shape) + d_inner)
        shift(shape.conv, conv, xBC, d_inner + first, d_inner + last, shape.d_conv)
    factor = Factor(rows.num, prepared(shape, rows.num, d_inner, thread), stride, 0, 0, 0, 0)
    multiply(Matrix(shape.weights, layer.out_proj, layer.out_scale, shape.d_model, d_inner), factor, rows.residual, True, thread)


@jit
def score(heads, shape, rows, thread):
    """The final norm, and of each row the logits of its task."""
    d, stride, num_t2i = shape.d_model, stride_of(shape), rows.num_t2i
    for row in range(rows.num):
        normalise(rows.residual + FLOAT * row * d, heads.norm, d, shape.eps, thread.scratch + FLOAT * row * stride)
    values = prepared(shape, rows.num, d, thread)
    image = Matrix(shape.weights, heads.image, heads.image_scale, shape.image_vocab_size, d)
    multiply(image, Factor(num_t2i, values, stride, 0, 0, 0, 0), rows.image_logits, False, thread)
    text = Matrix(shape.weights, heads.text, heads.text_scale, shape.text_vocab_size, d)
    values += FLOAT * num_t2i * stride
    multiply(text, Factor(rows.num - num_t2i, values, stride, 0, 0, 0, 0), rows.text_logits, False, thread)


@register_jitable  # not compiled where Python calls it
def width_of(shape):
    """Outputs of in_proj."""
    return 2 * shape.d_inner + 2 * shape.ngroups * shape.d_state + shape.nheads


@register_jitable  # not compiled where Python calls it
def stride_of(shape):
    """Numbers between the rows of a factor, with room for what `round_columns` adds."""
    k = max(shape.d_model, shape.d_inner)
    return k + k // GROUP_SIZE + LANES


@jit
def prepared(shape, num, k, thread):
    """Where a factor of `num` rows is that was written to the start of `scratch`, as the format of the weights wants it."""
    stride = stride_of(shape)
    if shape.weights != INT4:
        return thread.scratch
    values = thread.scratch + FLOAT * num * stride
    for row in range(num):
        round_columns(thread.scratch + FLOAT * row * stride, k, values + FLOAT * row * stride)
    return values


@register_jitable  # not compiled where Python calls it
def scratch_size(shape, num):
    """fp32 numbers that a thread needs for itself: a factor in two forms and its LoRA part, or B, C and the inputs of a head."""
    return max(num * (2 * stride_of(shape) + shape.rank), 2 * shape.ngroups * shape.d_state + shape.headdim)


@compiled
def run(layers, heads, shape, rows, thread):
    """A thread's part of a step. layers: [n_layer, fields of Layer] int64."""
    goal = 0
    for i in range(shape.n_layer):
        a = layers[i]
        layer = Layer(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14])
        enter(layer, shape, rows, thread)
        goal += thread.num_threads
        wait_for_all(thread.counter, goal)
        mix(layer, shape, rows, thread)
        goal += thread.num_threads
        wait_for_all(thread.counter, goal)
        leave(layer, shape, rows, thread)
        goal += thread.num_threads
        wait_for_all(thread.counter, goal)
    score(heads, shape, rows, thread)
