"""Weights of any format in memory as float32 or bfloat16, in vectors: LLVM IR.

Every format is exact in float32.  Where bfloat16 is asked for, the numbers are: codes of at most 8 bits less a zero
point, or with a scale that is a power of two, or e2m1 with a scale in e4m3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pymoe.ops.grouped_gemm._lanes import FLOAT32, LANES, PAIRS, QUADS

# How weights lie in memory; a kernel gets the format as a tuple of format + 1 numbers.  Those of the last line are
# multiplied as they lie there.
FLOAT16, BFLOAT16, E4M3, INT8, UINT8B128, UINT8, E2M1, UINT4B8, UINT4 = range(3, 12)
AS_IS = (FLOAT32, PAIRS, QUADS)
STEP_BYTES = (64, 64, 64, 32, 32, 16, 16, 16, 16, 8, 8, 8)
"""Bytes of 16 weights; of a cache line as it is for PAIRS and QUADS."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_WORDS = 2 * LANES
_PAGE = 4096


def _vector(element: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(element, lanes)


def _splat(element: Any, value: float, lanes: int = LANES) -> Any:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


_FLOATS = _vector(_FLOAT)


def _indices(lanes: list[int]) -> Any:
    return ir.Constant(_vector(_I32, len(lanes)), lanes)


def _load_as(builder: Any, pointer: Any, element: Any, lanes: int, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, _vector(element, lanes).as_pointer()), align=align)


def _from_half_bits(builder: Any, bits: Any, factor: float) -> Any:
    """Return 16-bit float patterns as float32 times a power of two: float16 has room for every narrow format, and its
    conversion takes subnormal numbers at full speed."""  # fmt: skip
    wide = builder.fpext(builder.bitcast(bits, _vector(_HALF)), _FLOATS)
    return builder.fmul(wide, _splat(_FLOAT, factor))


def _load_as_is(builder: Any, pointer: Any) -> Any:
    return _load_as(builder, pointer, _I32, LANES, 1)


def _load_float16(builder: Any, pointer: Any) -> Any:
    return builder.fpext(_load_as(builder, pointer, _HALF, LANES, 2), _FLOATS)


def _load_bfloat16(builder: Any, pointer: Any) -> Any:
    wide = builder.zext(_load_as(builder, pointer, _I16, LANES, 2), _vector(_I32))
    return builder.bitcast(builder.shl(wide, _splat(_I32, 16)), _FLOATS)


def _load_e4m3(builder: Any, pointer: Any) -> Any:
    """Exponent bias 7 read with bias 15: a factor of 2^8; code 127 is NaN."""
    codes = builder.zext(_load_as(builder, pointer, _I8, LANES, 1), _vector(_I16))
    magnitude = builder.and_(codes, _splat(_I16, 0x7F))
    sign = builder.shl(builder.and_(codes, _splat(_I16, 0x80)), _splat(_I16, 8))
    value = _from_half_bits(builder, builder.or_(sign, builder.shl(magnitude, _splat(_I16, 7))), 2.0**8)
    is_nan = builder.icmp_unsigned("==", magnitude, _splat(_I16, 0x7F))
    return builder.select(is_nan, _splat(_FLOAT, float("nan")), value)


def _load_int8(builder: Any, pointer: Any) -> Any:
    return builder.sitofp(builder.sext(_load_as(builder, pointer, _I8, LANES, 1), _vector(_I32)), _FLOATS)


def _load_uint8(zero: int) -> Callable[[Any, Any], Any]:
    def load(builder: Any, pointer: Any) -> Any:
        codes = builder.zext(_load_as(builder, pointer, _I8, LANES, 1), _vector(_I32))
        return builder.sitofp(builder.sub(codes, _splat(_I32, zero)), _FLOATS)

    return load


def _nibbles(builder: Any, pointer: Any) -> Any:
    """Return 16 four-bit codes of 8 bytes, the low nibble first."""
    packed = _load_as(builder, pointer, _I8, LANES // 2, 1)
    mask, shift = (ir.Constant(packed.type, [value] * (LANES // 2)) for value in (15, 4))
    order = [lane for pair in zip(range(8), range(8, 16), strict=True) for lane in pair]
    return builder.shuffle_vector(builder.and_(packed, mask), builder.lshr(packed, shift), _indices(order))


def _load_e2m1(builder: Any, pointer: Any) -> Any:
    """Exponent bias 1 read with bias 15: a factor of 2^14."""
    codes = builder.zext(_nibbles(builder, pointer), _vector(_I16))
    magnitude = builder.shl(builder.and_(codes, _splat(_I16, 7)), _splat(_I16, 9))
    sign = builder.shl(builder.and_(codes, _splat(_I16, 8)), _splat(_I16, 12))
    return _from_half_bits(builder, builder.or_(sign, magnitude), 2.0**14)


def _load_uint4(zero: int) -> Callable[[Any, Any], Any]:
    def load(builder: Any, pointer: Any) -> Any:
        codes = builder.zext(_nibbles(builder, pointer), _vector(_I32))
        return builder.sitofp(builder.sub(codes, _splat(_I32, zero)), _FLOATS)

    return load


_LOADS: dict[int, Callable[[Any, Any], Any]] = {
    FLOAT16: _load_float16,
    BFLOAT16: _load_bfloat16,
    E4M3: _load_e4m3,
    INT8: _load_int8,
    UINT8B128: _load_uint8(128),
    UINT8: _load_uint8(0),
    E2M1: _load_e2m1,
    UINT4B8: _load_uint4(8),
    UINT4: _load_uint4(0),
}


@intrinsic
def convert(
    typingctx: Any, form: Any, kind: Any, source: Any, units: Any, target: Any, target_step: Any, zero: Any, scale: Any
) -> Any:
    """Write ``(code - zero) * scale`` of ``16 * units`` weights at the address `source` to the address `target`.

    `form` is what is written, as the tuple of one number more: FLOAT32 a unit every `target_step` bytes, PAIRS two
    units and perhaps half of that in the end, QUADS 16 int8 codes as they are.  Formats of `AS_IS` are copied, a unit
    being 64 bytes.  Integers of 8 bits have no scale in PAIRS.
    """
    single = types.float32  # type: ignore[attr-defined]
    signature = types.void(form, kind, *[types.int64] * 4, single, single)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        form, number = (sig.args[i].count - 1 for i in range(2))
        if number in AS_IS:
            _steps(builder, args, number, lambda pointer: _load_as_is(builder, pointer))
        elif form == QUADS:
            _steps(builder, args, number, lambda pointer: _load_as(builder, pointer, _I8, LANES, 1))
        elif form == FLOAT32:
            zero, scale = (_spread(builder, value, _FLOATS) for value in args[6:])

            def value_of(pointer: Any) -> Any:
                return builder.fmul(builder.fsub(_LOADS[number](builder, pointer), zero), scale)

            _steps(builder, args, number, value_of)
        elif number == BFLOAT16:
            _pairs(builder, args, number, lambda codes: builder.bitcast(codes, _vector(_I16, _WORDS)))
        elif number == E4M3:
            with builder.if_else(builder.fcmp_ordered("==", args[7], ir.Constant(_FLOAT, 1.0))) as (then, otherwise):
                with then:
                    _pairs(builder, args, number, lambda codes: _e4m3_words(builder, codes))
                with otherwise:
                    scale = _spread(builder, args[7], _FLOATS)
                    _pairs(builder, args, number, lambda codes: _times(builder, _e4m3_words(builder, codes), scale))
        elif number in (E2M1, UINT4B8, UINT4):
            table = _nibble_table(builder, number, *args[6:])
            _pairs(builder, args, number, lambda codes: _nibble_words(builder, codes, table))
        else:
            zero = builder.fptosi(args[6], _I32)
            zero = _spread(builder, builder.add(zero, _I32(128)) if number == UINT8B128 else zero, _vector(_I32))
            _pairs(builder, args, number, lambda codes: _integer_words(builder, codes, number == INT8, zero))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def copy(typingctx: Any, source: Any, target: Any, size: Any) -> Any:
    """Copy `size` bytes between two addresses."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target, source = (builder.inttoptr(address, _I8.as_pointer()) for address in (args[1], args[0]))
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), _splat(_I32, 0, kind.count))


def _steps(builder: Any, args: Any, number: int, value_of: Callable[[Any], Any]) -> None:
    """Emit the loop over units that make 64 bytes each."""
    with cgutils.for_range(builder, args[3], intp=_I64) as loop:
        pointer = _pointer(builder, args[2], loop.index, _I64(STEP_BYTES[number]))
        value = value_of(pointer)
        target = builder.bitcast(_pointer(builder, args[4], loop.index, args[5]), value.type.as_pointer())
        builder.store(value, target, align=4)


def _pairs(builder: Any, args: Any, number: int, words_of: Callable[[Any], Any]) -> None:
    """Emit the loop over pairs of units, then the unit that may be left; `words_of` turns codes into 32 words."""
    size = STEP_BYTES[number]
    whole = builder.lshr(args[3], _I64(1))

    def pair(index: Any) -> None:
        pointer = _pointer(builder, args[2], index, _I64(2 * size))
        _fetch_ahead(builder, pointer)
        words = words_of(_load_as(builder, pointer, _I8, 2 * size, 1))
        target = builder.bitcast(_pointer(builder, args[4], index, args[5]), words.type.as_pointer())
        builder.store(words, target, align=2)

    # Groups of 32 are so many that a loop around each would cost more than what is in it.
    with builder.if_else(builder.icmp_signed("==", args[3], _I64(2))) as (then, otherwise):
        with then:
            pair(_I64(0))
        with otherwise:
            with cgutils.for_range(builder, whole, intp=_I64) as loop:
                pair(loop.index)
            with builder.if_then(builder.trunc(args[3], ir.IntType(1))):
                codes = _load_as(builder, _pointer(builder, args[2], whole, _I64(2 * size)), _I8, size, 1)
                words = words_of(builder.shuffle_vector(codes, codes, _indices([*range(size)] * 2)))
                half = builder.shuffle_vector(words, words, _indices([*range(LANES)]))
                target = builder.bitcast(_pointer(builder, args[4], whole, args[5]), half.type.as_pointer())
                builder.store(half, target, align=2)


def _fetch_ahead(builder: Any, pointer: Any) -> None:
    """Ask for the line a page further on: the processor's own prefetching ends with the page."""
    ahead = builder.gep(pointer, [_I64(_PAGE)])
    kind = ir.FunctionType(ir.VoidType(), [ahead.type, _I32, _I32, _I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(prefetch, [ahead, _I32(0), _I32(3), _I32(1)])


def _pointer(builder: Any, address: Any, index: Any, step: Any) -> Any:
    return builder.inttoptr(builder.add(address, builder.mul(index, step)), _I8.as_pointer())


def _look_up(builder: Any, table: Any, places: Any) -> Any:
    """Return the words of a table of 32, by the low 5 bits of each word of `places`."""
    kind = ir.FunctionType(table.type, [table.type, places.type])
    look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.hi.512")
    return builder.call(look_up, [table, places])


def _e4m3_words(builder: Any, codes: Any) -> Any:
    """Exponent and fraction move up, 120 is added to the exponent; a table has the 7 subnormals and, for 127, NaN."""

    def word(value: int) -> Any:
        return _splat(_I16, value, _WORDS)

    wide = builder.zext(codes, _vector(_I16, _WORDS))
    magnitude = builder.and_(wide, word(0x7F))
    table = [0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60, *[0] * 23, 0x7FC0]
    rare = _look_up(builder, ir.Constant(_vector(_I16, _WORDS), table), magnitude)
    usual = builder.add(builder.shl(magnitude, word(4)), word(120 << 7))
    is_rare = builder.or_(
        builder.icmp_unsigned("<", magnitude, word(8)), builder.icmp_unsigned("==", magnitude, word(0x7F))
    )
    sign = builder.shl(builder.and_(wide, word(0x80)), word(8))
    return builder.or_(builder.select(is_rare, rare, usual), sign)


def _times(builder: Any, words: Any, scale: Any) -> Any:
    """Return bfloat16 numbers times a power of two."""
    both = builder.bitcast(words, _vector(_I32))
    even, odd = builder.shl(both, _splat(_I32, 16)), builder.and_(both, _splat(_I32, -65536))
    return _joined(builder, *(builder.fmul(builder.bitcast(part, _FLOATS), scale) for part in (even, odd)))


def _joined(builder: Any, even: Any, odd: Any) -> Any:
    """Return the upper halves of float32 numbers, the even ones first."""
    even, odd = (builder.bitcast(part, _vector(_I32)) for part in (even, odd))
    both = builder.or_(builder.lshr(even, _splat(_I32, 16)), builder.and_(odd, _splat(_I32, -65536)))
    return builder.bitcast(both, _vector(_I16, _WORDS))


def _integer_words(builder: Any, codes: Any, signed: bool, zero: Any) -> Any:
    both = builder.zext(builder.bitcast(codes, _vector(_I16)), _vector(_I32))
    if signed:
        even, odd = (builder.ashr(builder.shl(both, _splat(_I32, bits)), _splat(_I32, 24)) for bits in (24, 16))
    else:
        even, odd = builder.and_(both, _splat(_I32, 0xFF)), builder.lshr(both, _splat(_I32, 8))
    return _joined(builder, *(builder.sitofp(builder.sub(part, zero), _FLOATS) for part in (even, odd)))


_NIBBLES = {
    E2M1: [sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)],
    UINT4B8: [code - 8.0 for code in range(16)],
    UINT4: [float(code) for code in range(16)],
}


def _nibble_table(builder: Any, number: int, zero: Any, scale: Any) -> Any:
    """Return the 16 numbers of a format, scaled, as words, twice."""
    codes = builder.fsub(ir.Constant(_FLOATS, _NIBBLES[number]), _spread(builder, zero, _FLOATS))
    bits = builder.bitcast(builder.fmul(codes, _spread(builder, scale, _FLOATS)), _vector(_I32))
    words = builder.trunc(builder.lshr(bits, _splat(_I32, 16)), _vector(_I16))
    return builder.shuffle_vector(words, words, _indices([*range(LANES)] * 2))


def _nibble_words(builder: Any, codes: Any, table: Any) -> Any:
    """The even code of a byte and the odd one take a word each; the table looks at neither's upper bits."""
    both = builder.zext(codes, _vector(_I32))
    places = builder.or_(both, builder.shl(both, _splat(_I32, 12)))
    return _look_up(builder, table, builder.bitcast(places, _vector(_I16, _WORDS)))
