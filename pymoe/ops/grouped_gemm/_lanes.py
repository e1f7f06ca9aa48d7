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
FEATURES = {6: 4, 8: 2, 1: 4}
"""Output features of a tile, by its rows.  Of 32 registers six rows and four features fill 24 with sums: ten loads feed
24 multiply-adds.  VNNI needs sums of weights besides, so that eight and two it is.  A single row waits for memory, and
four streams of weights do not evict each other."""
FETCHES = 4
"""Addresses that a tile may fetch weights from: those of the next tile's features."""

# What is multiplied: float32, or bfloat16 and int8 that meet their like.  A kernel gets the kind as a tuple of kind + 1
# numbers, and the rows of its tiles as a tuple of as many, because Numba compiles one version for each type, and keys
# its disk cache by types.
FLOAT32, PAIRS, QUADS = range(3)

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()


def _vector(element: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(element, lanes)


def _splat(element: Any, value: float) -> Any:
    return ir.Constant(_vector(element), [value] * LANES)


_FLOATS = _vector(_FLOAT)


def _load_as(builder: Any, pointer: Any, element: Any, lanes: int, align: int) -> Any:
    return builder.load(builder.bitcast(pointer, _vector(element, lanes).as_pointer()), align=align)


def _indices(lanes: list[int]) -> Any:
    return ir.Constant(_vector(_I32, len(lanes)), lanes)


@intrinsic
def product_of(typingctx: Any, source: Any) -> Any:
    """Return the kind in which weights of the kind `source` are multiplied."""
    kind = types.UniTuple(types.int64, source.count if source.count <= QUADS + 1 else FLOAT32 + 1)  # type: ignore[attr-defined]

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_constant_null(sig.return_type)

    return kind(source), codegen


@intrinsic
def tall(typingctx: Any, kind: Any) -> Any:
    """Return the rows of a tall tile for weights of the kind, as the tuple that kernels take them as."""
    height = types.UniTuple(types.int64, 8 if kind.count - 1 == QUADS else 6)  # type: ignore[attr-defined]

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return context.get_constant_null(sig.return_type)

    return height(kind), codegen


@intrinsic
def tile_of_dots(
    typingctx: Any, rows: Any, kind: Any, a: Any, w: Any, steps: Any, targets: Any, ahead: Any, sums: Any
) -> Any:
    """Write the dot products of row i with ``FEATURES[len(rows)]`` output features to memory.

    A step is 64 bytes of k of every row and feature.  `a` is the address of the rows, step by step and row by row.  `w`
    are the addresses of as many addresses, those of the features, and the bytes between two steps.  `targets` likewise:
    of the rows of the result, and what is added to them.  `ahead` says which weights to fetch into the second-level
    cache: how many lines a step, the first one's address, the bytes to the next one and to those of the next step.
    `sums` are an address, whether the lanes of all sums start from what stands there, and whether they are left there;
    else they start from 0 and are added up.
    """
    pair, four = (types.UniTuple(types.int64, count) for count in (2, 4))  # type: ignore[attr-defined]
    where = types.Tuple([types.int64, types.boolean, types.boolean])  # type: ignore[attr-defined]
    signature = types.void(rows, kind, types.int64, pair, types.int64, pair, four, where)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        height, number = sig.args[0].count, sig.args[1].count - 1
        width, steps = FEATURES[height], args[4]
        a, w_step, target = args[2], *(builder.extract_value(args[i], 1) for i in (3, 5))
        w_rows, targets = (
            [builder.load(_at(builder, builder.extract_value(args[i], 0), _I64(8 * j), _I64)) for j in range(count)]
            for i, count in ((3, width), (5, height))
        )
        lines, fetched, line_bytes, line_step = (builder.extract_value(args[6], i) for i in range(4))
        kept, resumes, stays = (builder.extract_value(args[7], i) for i in range(3))
        ahead = [builder.add(fetched, builder.mul(line_bytes, _I64(j))) for j in range(FETCHES)]

        def fetch(step: Any) -> None:
            _fetch(builder, ahead, lines, builder.mul(step, line_step))

        def loads(step: Any, element: Any) -> tuple[list, list]:
            x = _at(builder, a, builder.mul(step, _I64(64 * height)))
            at = builder.mul(step, w_step)
            w = [_load_as(builder, _at(builder, row, at), element, LANES, 1) for row in w_rows]
            return [_load_as(builder, builder.gep(x, [_I64(64 * i)]), element, LANES, 64) for i in range(height)], w

        start, body, finish = _ARITHMETIC[number](builder, height, width, loads)
        places_of_sums = [_at(builder, kept, _I64(64 * i), v.type) for i, v in enumerate(start)]
        start = _either(builder, resumes, lambda: [builder.load(p, align=64) for p in places_of_sums], lambda: start)
        vectors = _loop(builder, steps, start, fetch, body)
        with builder.if_else(stays) as (then, otherwise):
            with then:
                for vector, pointer in zip(vectors, places_of_sums, strict=True):
                    builder.store(vector, pointer, align=64)
            with otherwise:
                for first, total in _add_lanes(builder, finish(vectors)):
                    if number == QUADS:
                        total = builder.sitofp(total, _FLOATS)
                    for i in range(first // width, min(first + LANES, height * width) // width):
                        lanes = _indices([i * width - first + j for j in range(width)])
                        part = builder.shuffle_vector(total, total, lanes)
                        builder.store(part, _at(builder, targets[i], target, part.type), align=4)
        return context.get_dummy_value()

    return signature, codegen


def _at(builder: Any, address: Any, offset: Any, pointee: Any = _I8) -> Any:
    return builder.inttoptr(builder.add(address, offset), pointee.as_pointer())


def _fetch(builder: Any, ahead: list, lines: Any, offset: Any) -> None:
    """Ask for the line at `offset` from each of the first `lines` addresses."""
    for j, row in enumerate(ahead):
        with builder.if_then(builder.icmp_signed(">", lines, _I64(j))):
            pointer = _at(builder, row, offset)
            kinds = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
            prefetch = cgutils.get_or_insert_function(builder.module, kinds, "llvm.prefetch.p0")
            builder.call(prefetch, [pointer, _I32(0), _I32(2), _I32(1)])


def _either(builder: Any, condition: Any, yes: Callable[[], list], no: Callable[[], list]) -> list:
    """Emit a choice between two lists of vectors."""
    with builder.if_else(condition) as (then, otherwise):
        with then:
            first, here = yes(), builder.block
        with otherwise:
            second, there = no(), builder.block
    chosen = [builder.phi(vector.type) for vector in first]
    for phi, one, other in zip(chosen, first, second, strict=True):
        phi.add_incoming(one, here)
        phi.add_incoming(other, there)
    return chosen


def _row(builder: Any, address: Any, item: int, starts: Any, index: int) -> Any:
    """Return the address of the element ``starts[index]`` of `item` bytes."""
    first = builder.load(builder.gep(starts, [_I64(index)]))
    return builder.add(address, builder.mul(first, _I64(item)))


def _float_sums(builder: Any, height: int, width: int, loads: Callable) -> tuple:
    """Return what sums start from, what a step makes of them, and what becomes of the lanes in the end."""
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")

    def body(step: Any, sums: list) -> list:
        left, right = loads(step, _FLOAT)
        products = [(x, y) for x in left for y in right]
        return [builder.call(fma, [x, y, total]) for total, (x, y) in zip(sums, products, strict=True)]

    return [_splat(_FLOAT, 0.0)] * (height * width), body, list


def _pair_sums(builder: Any, height: int, width: int, loads: Callable) -> tuple:
    def body(step: Any, sums: list) -> list:
        left, right = loads(step, _I32)
        products = [(x, y) for x in left for y in right]
        return [_dot(builder, "vdpbf16ps", total, x, y) for total, (x, y) in zip(sums, products, strict=True)]

    return [_splat(_FLOAT, 0.0)] * (height * width), body, list


def _quad_sums(builder: Any, height: int, width: int, loads: Callable) -> tuple:
    """The instruction takes unsigned times signed: rows get 128 added, which comes off again with the sums of weights.

    Both may wrap, since what is left fits.
    """
    count = height * width
    flip, ones = _splat(_I32, -2139062144), _splat(_I32, 0x01010101)  # 0x80808080

    def body(step: Any, sums: list) -> list:
        left, right = loads(step, _I32)
        products = [(x, y) for x in [*(builder.xor(x, flip) for x in left), ones] for y in right]
        return [_dot(builder, "vpdpbusd", total, x, y) for total, (x, y) in zip(sums, products, strict=True)]

    def finish(sums: list) -> list:
        offsets = [builder.shl(total, _splat(_I32, 7)) for total in sums[count:]]
        return [builder.sub(total, offsets[i % width]) for i, total in enumerate(sums[:count])]

    return [_splat(_I32, 0)] * (count + width), body, finish


_ARITHMETIC = {FLOAT32: _float_sums, PAIRS: _pair_sums, QUADS: _quad_sums}


def _dot(builder: Any, instruction: str, total: Any, x: Any, y: Any) -> Any:
    """Emit by name: how LLVM types the intrinsics of these two has changed between its versions."""
    kind = ir.FunctionType(total.type, [x.type, y.type, total.type])
    return builder.asm(kind, f"{instruction} $2, $1, $0", "=v,v,v,0", [x, y, total], False)


def _loop(builder: Any, steps: Any, start: list, fetch: Callable[[Any], None], body: Callable) -> list:
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
    fetch(step)
    after = body(step, sums)
    for total, new in zip(sums, after, strict=True):
        total.add_incoming(new, builder.block)
    step.add_incoming(builder.add(step, _I64(1)), builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return sums


def _add_lanes(builder: Any, vectors: list) -> list:
    """Return (first, vector) for every 16 vectors: one that starts with their sums.

    Lanes l and l + 8 are added, then l + 4, l + 2, l + 1.  Two vectors share each addition, a blend and one exchange of
    lanes: the lanes without the bit that tells the two summands apart get the first vector, those with it the second.
    So the place of a sum is its number with the bits turned round.  A lone vector shares with itself.
    """
    add = builder.fadd if vectors[0].type == _FLOATS else builder.add
    totals = []
    for first in range(0, len(vectors), LANES):
        part = vectors[first : first + LANES]
        size = 1 << (len(part) - 1).bit_length()
        bits = size.bit_length() - 1
        part = [part[min(number, len(part) - 1)] for number in range(size)]
        part = [part[_turned_bits(i, bits)] for i in range(size)]
        half = LANES // 2
        while half:
            own = [lane if not lane & half else LANES + lane for lane in range(LANES)]
            other = [lane ^ half if not lane & half else LANES + (lane ^ half) for lane in range(LANES)]
            pairs = zip(part[::2], part[1::2], strict=True) if len(part) > 1 else [(part[0], part[0])]
            part = [add(*(builder.shuffle_vector(x, y, _indices(lanes)) for lanes in (own, other))) for x, y in pairs]
            half //= 2
        spread = [lane * (LANES // size) % LANES for lane in range(LANES)]
        totals.append((first, part[0] if size == LANES else builder.shuffle_vector(part[0], part[0], _indices(spread))))
    return totals


def _turned_bits(number: int, bits: int) -> int:
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0
