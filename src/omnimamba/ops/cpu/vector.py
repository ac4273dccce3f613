"""Vectors of 16 fp32 numbers for kernels compiled by Numba, which has none of its own.

A `Vector` is a value of LLVM's type <16 x float>: one register with AVX-512, two with AVX2, four with NEON or SSE. Memory is addressed by
integers (`Tensor.data_ptr()` and sums of it), as the kernels read several number formats from plain bytes. Nothing is checked here.

Numba keeps compiled kernels on disk until the file of the kernel changes: after a change here or in sequences.py, touch conv.py, decode.py
and scan.py.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# The first argument and the return value of an intrinsic are Numba's: a call of it has neither.

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from omnimamba.ops.cpu import LANES

logger = logging.getLogger("omnimamba.ops")
_F32, _I32 = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_YIELD = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
LOG2_E, LN_2_HIGH, LN_2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
EXP_TERMS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
"""exp(r) for |r| <= ln(2) / 2 by its Taylor series to the sixth power: 1e-7 relative."""


FLOAT = 4
"""Bytes of an fp32 number."""
jit = numba.njit(nogil=True, error_model="numpy")


def compiled(function: Callable[..., Any]) -> Any:
    """A kernel that Numba compiles on its first call and keeps on disk, where it finds a folder that it may write to."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside the package nor in the user's home, as in a container that is read-only
        logger.warning("%s is compiled anew in each process; NUMBA_CACHE_DIR may name a folder to keep it in", function.__qualname__)
        return numba.njit(**options)(function)


class Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Vector")


VECTOR = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _FLOATS)


def _ints(number: int) -> ir.Constant:
    return ir.Constant(_INTS, [number] * LANES)


def _floats(number: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [number] * LANES)


def _memory(builder: Any, address: ir.Value, element: ir.Type, num: int = LANES) -> ir.Value:
    """The elements at an address that need not be aligned."""
    loaded = builder.load(builder.inttoptr(address, ir.VectorType(element, num).as_pointer()))
    loaded.align = 1
    return loaded


def _loads(convert: Callable[[Any, Any], Any]) -> Any:
    """An intrinsic that gives a vector for an address."""

    @intrinsic
    def load(context, address):
        def generate(context, builder, signature, arguments):
            return convert(builder, arguments[0])

        return VECTOR(types.int64), generate

    return load


def _from_bf16(builder: Any, address: ir.Value) -> ir.Value:
    words = builder.zext(_memory(builder, address, ir.IntType(16)), _INTS)
    return builder.bitcast(builder.shl(words, _ints(16)), _FLOATS)


def _from_fp8(builder: Any, address: ir.Value) -> ir.Value:
    """float8_e4m3fn / 256: with its exponent in the field of a float16, every number is one of those, subnormal ones too."""
    halves = ir.VectorType(ir.IntType(16), LANES)
    bits = builder.zext(_memory(builder, address, ir.IntType(8)), halves)
    sign = builder.shl(builder.and_(bits, ir.Constant(halves, [0x80] * LANES)), ir.Constant(halves, [8] * LANES))
    rest = builder.shl(builder.and_(bits, ir.Constant(halves, [0x7F] * LANES)), ir.Constant(halves, [7] * LANES))
    return builder.fpext(builder.bitcast(builder.or_(sign, rest), ir.VectorType(ir.HalfType(), LANES)), _FLOATS)


load_f32 = _loads(lambda builder, address: _memory(builder, address, _F32))
load_bf16 = _loads(_from_bf16)
load_int8 = _loads(lambda builder, address: builder.sitofp(builder.sext(_memory(builder, address, ir.IntType(8)), _INTS), _FLOATS))
load_fp8 = _loads(_from_fp8)


@intrinsic
def nibble_products(context, nibbles, even, odd, start):
    """Products with 32 bytes of two nibbles each: lane i is start[i] plus the sum over bytes 2i and 2i + 1 of low * even + high * odd.

    even, odd: addresses of 32 int16 numbers; start: of LANES int32. Summed as integers, which x86 does in one instruction a pair.
    """
    halves, wide = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(_I32, 2 * LANES)

    def generate(context, builder, signature, arguments):
        def products(values, factors):
            factors = builder.sext(_memory(builder, factors, ir.IntType(16), 2 * LANES), wide)
            product = builder.mul(builder.sext(values, wide), factors)
            return [builder.shuffle_vector(product, product, ir.Constant(_INTS, list(range(first, 2 * LANES, 2)))) for first in (0, 1)]

        nibbles, even, odd, start = arguments
        pairs = builder.zext(_memory(builder, nibbles, ir.IntType(8), 2 * LANES), halves)
        low = builder.and_(pairs, ir.Constant(halves, [15] * 2 * LANES))
        high = builder.lshr(pairs, ir.Constant(halves, [4] * 2 * LANES))
        (a, b), (c, d) = products(low, even), products(high, odd)
        added = builder.add(builder.add(a, b), builder.add(c, d))
        return builder.sitofp(builder.add(added, _memory(builder, start, _I32)), _FLOATS)

    return VECTOR(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def store_f32(context, address, vector):
    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], _FLOATS.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR), generate


@intrinsic
def store_bf16(context, address, vector):
    """Rounds to the nearest, ties to even."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[1], _INTS)
        is_odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
        rounded = builder.lshr(builder.add(builder.add(bits, _ints(0x7FFF)), is_odd), _ints(16))
        words = builder.trunc(rounded, ir.VectorType(ir.IntType(16), LANES))
        builder.store(words, builder.inttoptr(arguments[0], words.type.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR), generate


@intrinsic
def full(context, number):
    """A vector of one number."""

    def generate(context, builder, signature, arguments):
        first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), arguments[0], _I32(0))
        return builder.shuffle_vector(first, ir.Constant(_FLOATS, ir.Undefined), _ints(0))

    return VECTOR(types.float32), generate


@intrinsic
def fma(context, a, b, c):
    """a * b + c, rounded once."""

    def generate(context, builder, signature, arguments):
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32")
        return builder.call(function, arguments)

    return VECTOR(VECTOR, VECTOR, VECTOR), generate


@intrinsic
def total(context, vector):
    """The sum of the lanes, by halves."""

    def generate(context, builder, signature, arguments):
        vector, num = arguments[0], LANES
        while num > 1:
            num //= 2
            parts = [range(num), range(num, 2 * num)]
            low, high = (builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, num), list(part))) for part in parts)
            vector = builder.fadd(low, high)
        return builder.extract_element(vector, _I32(0))

    return types.float32(VECTOR), generate


@intrinsic
def exp(context, vector):
    """exp of each lane, 2e-7 relative; lanes below -87 count as -87, those above 88 as 88."""

    def generate(context, builder, signature, arguments):
        def fused(a, b, c):
            name = f"llvm.fma.v{LANES}f32"
            return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), name), (a, b, c))

        x = arguments[0]
        x = builder.select(builder.fcmp_ordered(">", x, _floats(-87.0)), x, _floats(-87.0))
        x = builder.select(builder.fcmp_ordered("<", x, _floats(88.0)), x, _floats(88.0))
        # adding and taking off 1.5 * 2**23 rounds to an integer
        shifted = builder.fadd(builder.fmul(x, _floats(LOG2_E)), _floats(12582912.0))
        power = builder.fsub(shifted, _floats(12582912.0))
        rest = fused(power, _floats(-LN_2_LOW), fused(power, _floats(-LN_2_HIGH), x))
        value = _floats(EXP_TERMS[0])
        for term in EXP_TERMS[1:]:
            value = fused(value, rest, _floats(term))
        exponent = builder.shl(builder.add(builder.fptosi(power, _INTS), _ints(127)), _ints(23))
        return builder.fmul(value, builder.bitcast(exponent, _FLOATS))

    return VECTOR(VECTOR), generate


def _defines(python_operator: Any, method: str) -> None:
    """Has an operator of two vectors be one instruction."""

    @type_callable(python_operator)
    def result_type(context):
        return lambda a, b: VECTOR if isinstance(a, Vector) and isinstance(b, Vector) else None

    @lower_builtin(python_operator, Vector, Vector)
    def generate(context, builder, signature, arguments):
        return getattr(builder, method)(*arguments)


for _operator, _method in ((operator.add, "fadd"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _defines(_operator, _method)


@jit
def silu(x):
    return x / (full(numba.float32(1)) + exp(x * full(numba.float32(-1))))


# ---- single numbers, memory ahead, and other threads


def _scalar(element: ir.Type, numba_type: Any) -> tuple[Any, Any]:
    """Intrinsics that load and store one number at an address."""

    @intrinsic
    def load(context, address):
        def generate(context, builder, signature, arguments):
            return builder.load(builder.inttoptr(arguments[0], element.as_pointer()))

        return numba_type(types.int64), generate

    @intrinsic
    def store(context, address, number):
        def generate(context, builder, signature, arguments):
            builder.store(arguments[1], builder.inttoptr(arguments[0], element.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, numba_type), generate

    return load, store


get_f32, set_f32 = _scalar(_F32, types.float32)
get_u16, set_u16 = _scalar(ir.IntType(16), types.uint16)
_, set_i16 = _scalar(ir.IntType(16), types.int16)
_, set_i32 = _scalar(_I32, types.int32)


@intrinsic
def bits_of(context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), generate


@intrinsic
def from_bits(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.uint32), generate


@numba.njit(nogil=True)
def get_bf16(address):
    return from_bits(numba.uint32(get_u16(address)) << numba.uint32(16))


@numba.njit(nogil=True)
def set_bf16(address, number):
    bits = bits_of(number)
    is_odd = (bits >> numba.uint32(16)) & numba.uint32(1)
    set_u16(address, numba.uint16((bits + numba.uint32(0x7FFF) + is_odd) >> numba.uint32(16)))


@intrinsic
def prefetch(context, address):
    """Asks for the cache line at an address, which may lie beyond any memory."""

    def generate(context, builder, signature, arguments):
        pointer = ir.IntType(8).as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32]), "llvm.prefetch.p0"
        )
        builder.call(function, [builder.inttoptr(arguments[0], pointer), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _arrive(context, address):
    """Adds 1 to the int64 at an address, visible to all threads with all that was written before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), ir.IntType(64)(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def _arrived(context, address):
    """The int64 at an address, as other threads have left it."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def _give_way(context):
    """Lets another thread have the core."""

    def generate(context, builder, signature, arguments):
        builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I32, []), _YIELD), [])
        return context.get_dummy_value()

    return types.void(), generate


SPINS = 2000
"""Looks at the counter before the core is given away: a few microseconds, longer than threads that all run need."""


@numba.njit(nogil=True)
def wait_for_all(counter, goal):
    """Returns when `goal` arrivals, this one included, were counted at the address `counter`."""
    _arrive(counter)
    spins = 0
    while _arrived(counter) < goal:
        spins += 1
        if spins > SPINS:
            _give_way()
