"""The inner loops as LLVM IR: weights of any format widened in registers, and tiles of 16 dot products.

Every (row, n) has a sum in each of 16 lanes, which are added in one fixed tree.  Lane l of float32 takes k = l,
l + 16, l + 32 ... by fused multiply-add; that of bfloat16 takes k = 2l + 1 and 2l of every 32 k by AVX512_BF16, that of
int8 four of every 64 k by AVX512_VNNI.  The tile that a row falls into changes which sums share registers, never a
sum's order: bits depend on the row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

llvmlite.binding.initialize_native_asmparser()  # for instructions emitted by name

LANES = 16
FEATURES = {8: 2, 1: 4}
"""Output features of a tile, by its rows.  Eight rows and two features keep 16 sums in registers, which hides the
latency of multiply-adds; a single row waits for memory, and four streams of weights do not evict each other."""

# How weights lie in memory.  A kernel gets its kind as a tuple of kind + 1 numbers, and the rows of its tiles as a
# tuple of as many, because Numba compiles one version for each type, and keys its disk cache by types.
FLOAT32, FLOAT16, BFLOAT16, E4M3, INT8, UINT8B128, UINT8, E2M1, UINT4B8, UINT4, PAIRS, QUADS = range(12)
PACKED = (E2M1, UINT4B8, UINT4)
# PAIRS and QUADS are bfloat16 and int8 that meet their like; all others meet float32.

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
_ELEMENTS = {FLOAT32: _FLOAT, FLOAT16: _I16, BFLOAT16: _I16, E4M3: _I8, INT8: _I8, UINT8B128: _I8, UINT8: _I8,
             PAIRS: _I16, QUADS: _I8}  # fmt: skip
_BYTES = {kind: {_FLOAT: 4, _I16: 2, _I8: 1}[element] for kind, element in _ELEMENTS.items()}


def _indices(lanes: list[int]) -> Any:
    return ir.Constant(_vector(_I32, len(lanes)), lanes)


@intrinsic
def tile_of_dots(
    typingctx: Any, rows: Any, kind: Any, a: Any, w: Any, ahead: Any, places: Any, steps: Any, to: Any
) -> Any:
    """Write the dot products of row i with ``FEATURES[len(rows)]`` output features to memory.

    a and w are addresses, so that neither a read-only array nor a buffer makes Numba compile again; w is of the kind, a
    of float32 or of its like.  `places` (3, 8) holds the first elements of the rows, those of the output features, and
    the addresses that, with `to` added, the results of the rows go to.  A step is of 16 lanes.  Weights `ahead` bytes
    further on are fetched into the second-level cache.
    """
    signature = types.void(rows, kind, *[types.int64] * 3, places, types.int64, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, _, a, w, ahead, _, steps, to = args
        places = context.make_array(sig.args[5])(context, builder, args[5]).data
        starts, columns, targets = (builder.gep(places, [_I64(8 * i)]) for i in range(3))
        height, number = sig.args[0].count, sig.args[1].count - 1
        left = number if number in (PAIRS, QUADS) else FLOAT32
        a_rows = [_row(builder, a, _BYTES[left], starts, i) for i in range(height)]
        w_rows = [_row(builder, w, _BYTES[number], columns, j) for j in range(FEATURES[height])]

        def fetch(step: Any) -> None:
            for row in w_rows:
                pointer = _pointer(builder, builder.add(row, ahead), step, _BYTES[number] * _STEP.get(number, LANES))
                kinds = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
                prefetch = cgutils.get_or_insert_function(builder.module, kinds, "llvm.prefetch.p0")
                builder.call(prefetch, [pointer, _I32(0), _I32(2), _I32(1)])

        total = _add_lanes(builder, _ARITHMETIC[left](builder, a_rows, w_rows, number, steps, fetch))
        if left == QUADS:
            total = builder.sitofp(total, _FLOATS)
        width = FEATURES[height]
        for i in range(height):
            part = builder.shuffle_vector(total, total, _indices(list(range(i * width, (i + 1) * width))))
            address = _row(builder, to, 1, targets, i)
            builder.store(part, builder.inttoptr(address, part.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, codegen


def _row(builder: Any, address: Any, item: int, starts: Any, index: int) -> Any:
    """Return the address of the element ``starts[index]`` of `item` bytes."""
    first = builder.load(builder.gep(starts, [_I64(index)]))
    return builder.add(address, builder.mul(first, _I64(item)))


def _float_sums(builder: Any, a_rows: list, w_rows: list, number: int, steps: Any, fetch: Any) -> list:
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")

    def body(step: Any, sums: list) -> list:
        fetch(step)
        left = [_load_float32(builder, _pointer(builder, row, step, 4 * LANES)) for row in a_rows]
        right = [_LOADS[number](builder, _pointer(builder, row, step, _BYTES[number] * LANES)) for row in w_rows]
        products = [(x, y) for x in left for y in right]
        return [builder.call(fma, [x, y, total]) for total, (x, y) in zip(sums, products, strict=True)]

    return _loop(builder, steps, [_splat(_FLOAT, 0.0)] * (len(a_rows) * len(w_rows)), body)


def _pair_sums(builder: Any, a_rows: list, w_rows: list, number: int, steps: Any, fetch: Any) -> list:
    def body(step: Any, sums: list) -> list:
        fetch(step)
        left, right = ([_load_as(builder, _pointer(builder, row, step, 64), _I32, LANES, 1) for row in rows]
                       for rows in (a_rows, w_rows))  # fmt: skip
        products = [(x, y) for x in left for y in right]
        return [_dot(builder, "vdpbf16ps", total, x, y) for total, (x, y) in zip(sums, products, strict=True)]

    return _loop(builder, steps, [_splat(_FLOAT, 0.0)] * (len(a_rows) * len(w_rows)), body)


def _quad_sums(builder: Any, a_rows: list, w_rows: list, number: int, steps: Any, fetch: Any) -> list:
    """The instruction takes unsigned times signed: rows get 128 added, which comes off again with the sums of weights.

    Both may wrap, since what is left fits.
    """
    count = len(a_rows) * len(w_rows)
    flip, ones = _splat(_I32, -2139062144), _splat(_I32, 0x01010101)  # 0x80808080

    def body(step: Any, sums: list) -> list:
        fetch(step)
        left = [
            builder.xor(_load_as(builder, _pointer(builder, row, step, 64), _I32, LANES, 1), flip) for row in a_rows
        ]
        right = [_load_as(builder, _pointer(builder, row, step, 64), _I32, LANES, 1) for row in w_rows]
        products = [(x, y) for x in [*left, ones] for y in right]
        return [_dot(builder, "vpdpbusd", total, x, y) for total, (x, y) in zip(sums, products, strict=True)]

    sums = _loop(builder, steps, [_splat(_I32, 0)] * (count + len(w_rows)), body)
    offsets = [builder.shl(total, _splat(_I32, 7)) for total in sums[count:]]
    return [builder.sub(total, offsets[i % len(w_rows)]) for i, total in enumerate(sums[:count])]


_STEP = {PAIRS: 32, QUADS: 64}
_ARITHMETIC = {FLOAT32: _float_sums, PAIRS: _pair_sums, QUADS: _quad_sums}


def _dot(builder: Any, instruction: str, total: Any, x: Any, y: Any) -> Any:
    """Emit by name: how LLVM types the intrinsics of these two has changed between its versions."""
    kind = ir.FunctionType(total.type, [x.type, y.type, total.type])
    return builder.asm(kind, f"{instruction} $2, $1, $0", "=v,v,v,0", [x, y, total], False)


def _pointer(builder: Any, address: Any, step: Any, bytes_a_step: int) -> Any:
    offset = builder.mul(step, _I64(bytes_a_step))
    return builder.inttoptr(builder.add(address, offset), _I8.as_pointer())


def _loop(builder: Any, steps: Any, start: list, body: Callable[[Any, list], list]) -> list:
    """Emit ``for step in range(steps): sums = body(step, sums)``; return the vectors of lane sums."""
    before = builder.basic_block
    head, inside, done = (builder.append_basic_block(f"dots.{name}") for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    step = builder.phi(_I64)
    step.add_incoming(_I64(0), before)
    sums = [builder.phi(vector.type) for vector in start]
    for total, vector in zip(sums, start, strict=True):
        total.add_incoming(vector, before)
    builder.cbranch(builder.icmp_signed("<", step, steps), inside, done)
    builder.position_at_end(inside)
    for total, after in zip(sums, body(step, sums), strict=True):
        total.add_incoming(after, inside)
    step.add_incoming(builder.add(step, _I64(1)), inside)
    builder.branch(head)
    builder.position_at_end(done)
    return sums


def _add_lanes(builder: Any, vectors: list) -> Any:
    """Return a vector that starts with the sums of the vectors: lanes l and l + 8 are added, then l + 4, l + 2, l + 1.

    Two vectors share each addition: of both, the lower halves of all segments in one vector, the upper ones in another.
    The last vector left shares with itself.
    """
    segment = LANES
    add = builder.fadd if vectors[0].type == _FLOATS else builder.add
    while segment > 1:
        half = segment // 2
        lower = [s + i for s in range(0, 2 * LANES, segment) for i in range(half)]
        upper = [lane + half for lane in lower]
        pairs = zip(vectors[::2], vectors[1::2], strict=True) if len(vectors) > 1 else [(vectors[0], vectors[0])]
        vectors = [add(*(builder.shuffle_vector(x, y, _indices(lanes)) for lanes in (lower, upper))) for x, y in pairs]
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
