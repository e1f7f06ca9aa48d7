"""The inner loops as LLVM IR: weights of any format widened in registers, and tiles of 16 dot products.

Every (row, n) sums k = l, l + 16, l + 32 ... in lane l by fused multiply-add, then adds the lanes in one fixed tree.
The tile that a row falls into changes which sums share registers, never a sum's order: bits depend on the row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16
FEATURES = {8: 2, 1: 4}
"""Output features of a tile, by its rows.  Eight rows and two features keep 16 sums in registers, which hides the
latency of multiply-adds; a single row waits for memory, and four streams of weights do not evict each other."""

# How weights lie in memory.  A kernel gets its kind as a tuple of kind + 1 numbers, and the rows of its tiles as a
# tuple of as many, because Numba compiles one version for each type, and keys its disk cache by types.
FLOAT32, FLOAT16, BFLOAT16, E4M3, INT8, UINT8B128, UINT8, E2M1, UINT4B8, UINT4 = range(10)
PACKED = (E2M1, UINT4B8, UINT4)

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()


def _vector(element: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(element, lanes)


def _splat(element: Any, value: float) -> Any:
    return ir.Constant(_vector(element), [value] * LANES)


_FLOATS = _vector(_FLOAT)


def _load_as(builder: Any, pointer: Any, element: Any, lanes: int, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, _vector(element, lanes).as_pointer()), align=align)


def _from_half_bits(builder: Any, bits: Any, factor: float) -> Any:
    """Return 16-bit float patterns as float32 times a power of two: float16 has room for every narrow format, and its
    conversion takes subnormal numbers at full speed."""  # fmt: skip
    wide = builder.fpext(builder.bitcast(bits, _vector(_HALF)), _FLOATS)
    return builder.fmul(wide, _splat(_FLOAT, factor))


def _load_float32(builder: Any, pointer: Any) -> Any:
    return _load_as(builder, pointer, _FLOAT, LANES, 4)


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
    FLOAT32: _load_float32,
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


# What an element of unpacked kinds is in memory; packed ones are widened before they are multiplied.
_ELEMENTS = {FLOAT32: _FLOAT, FLOAT16: _I16, BFLOAT16: _I16, E4M3: _I8, INT8: _I8, UINT8B128: _I8, UINT8: _I8}
_BYTES = {kind: {_FLOAT: 4, _I16: 2, _I8: 1}[element] for kind, element in _ELEMENTS.items()}


def _indices(lanes: list[int]) -> Any:
    return ir.Constant(_vector(_I32, len(lanes)), lanes)


@intrinsic
def tile_of_dots(
    typingctx: Any, rows: Any, a: Any, starts: Any, w: Any, columns: Any, kind: Any, steps: Any, sums: Any
) -> Any:
    """Write the dot products of ``len(rows)`` rows with ``FEATURES[len(rows)]`` output features to `sums`, row-major.

    a and w are addresses, of float32 and of the kind, so that neither a read-only array nor a buffer makes Numba
    compile again; starts and columns are the first elements of the rows and output features; steps are of 16 k each.
    """
    signature = types.void(rows, types.int64, starts, types.int64, columns, kind, types.int64, sums)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        starts, columns, sums = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (2, 4, 7))
        height, number = sig.args[0].count, sig.args[5].count - 1
        a_rows = [_row(builder, args[1], _FLOAT, starts, i) for i in range(height)]
        w_rows = [_row(builder, args[3], _ELEMENTS[number], columns, j) for j in range(FEATURES[height])]
        total = _add_lanes(builder, _loop(builder, a_rows, w_rows, _LOADS[number], args[6]))
        builder.store(total, builder.bitcast(sums, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, codegen


def _row(builder: Any, address: Any, element: Any, starts: Any, index: int) -> Any:
    """Return the pointer to the element ``starts[index]``."""
    first = builder.load(builder.gep(starts, [_I64(index)]))
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [first])


def _loop(builder: Any, a_rows: list, w_rows: list, load: Any, steps: Any) -> list:
    """Emit the loop over steps of 16 k; return the vectors of lane sums, row-major."""
    before = builder.basic_block
    head, body, done = (builder.append_basic_block(f"dots.{name}") for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    step = builder.phi(_I64)
    step.add_incoming(_I64(0), before)
    sums = [builder.phi(_FLOATS) for _ in range(len(a_rows) * len(w_rows))]
    for total in sums:
        total.add_incoming(_splat(_FLOAT, 0.0), before)
    builder.cbranch(builder.icmp_signed("<", step, steps), body, done)
    builder.position_at_end(body)
    at = builder.mul(step, _I64(LANES))
    left = [_load_float32(builder, builder.gep(row, [at])) for row in a_rows]
    right = [load(builder, builder.gep(row, [at])) for row in w_rows]
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
    for total, (x, y) in zip(sums, [(x, y) for x in left for y in right], strict=True):
        total.add_incoming(builder.call(fma, [x, y, total]), body)
    step.add_incoming(builder.add(step, _I64(1)), body)
    builder.branch(head)
    builder.position_at_end(done)
    return sums


def _add_lanes(builder: Any, vectors: list) -> Any:
    """Return a vector that starts with the sums of the vectors: lanes l and l + 8 are added, then l + 4, l + 2, l + 1.

    Two vectors share each addition: of both, the lower halves of all segments in one vector, the upper ones in another.
    The last vector left shares with itself.
    """
    segment = LANES
    while segment > 1:
        half = segment // 2
        lower = [s + i for s in range(0, 2 * LANES, segment) for i in range(half)]
        upper = [lane + half for lane in lower]
        pairs = zip(vectors[::2], vectors[1::2], strict=True) if len(vectors) > 1 else [(vectors[0], vectors[0])]
        vectors = [
            builder.fadd(*(builder.shuffle_vector(x, y, _indices(lanes)) for lanes in (lower, upper))) for x, y in pairs
        ]
        segment = half
    return vectors[0]


@intrinsic
def widen(typingctx: Any, w: Any, start: Any, kind: Any, steps: Any, out: Any, to: Any) -> Any:
    """Write ``steps * 16`` weights of the kind as float32 to ``out[to:]`` (flat); w is an address, start in bytes."""
    signature = types.void(types.int64, types.int64, kind, types.int64, out, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number = sig.args[2].count - 1
        bytes_a_step = LANES // 2 if number in PACKED else LANES * _BYTES[number]
        source = builder.inttoptr(builder.add(args[0], args[1]), _I8.as_pointer())
        target = builder.gep(context.make_array(sig.args[4])(context, builder, args[4]).data, [args[5]])
        with cgutils.for_range(builder, args[3], intp=_I64) as loop:
            value = _LOADS[number](builder, builder.gep(source, [builder.mul(loop.index, _I64(bytes_a_step))]))
            pointer = builder.gep(target, [builder.mul(loop.index, _I64(LANES))])
            builder.store(value, builder.bitcast(pointer, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, codegen
