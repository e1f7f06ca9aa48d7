"""AMX as LLVM IR: products of tiles, and the transposition of 16 by 16 dwords that feeds and empties them.

A tile is 16 rows of 64 bytes.  Weights are the left operand as they lie in memory, 16 output features by 64 bytes of k;
rows of tokens are the right one, dword by dword: two bfloat16 or four int8 of each of 16 rows.  So a sum stands at
[feature][row] in its tile.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from pymoe.ops.grouped_gemm._lanes import PAIRS, QUADS

SIDE = 16
TILE_BYTES = 1024

BFLOAT16_PAIRS, INT8_QUADS = (0,) * (PAIRS + 1), (0,) * (QUADS + 1)
"""What a dword of a tile holds: handed to kernels as a tuple, because Numba compiles one version for each type."""
_PRODUCTS = {PAIRS + 1: "llvm.x86.tdpbf16ps", QUADS + 1: "llvm.x86.tdpbssd"}

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_POINTER = _I8.as_pointer()
_DWORDS = ir.VectorType(_I32, SIDE)
_LINES = 32
"""Cache lines of weights that a step multiplies, and that it asks for ahead."""


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _at(builder: Any, address: Any, offset: Any) -> Any:
    return builder.inttoptr(builder.add(address, offset), _POINTER)


@intrinsic
def configure(typingctx: Any, palette: Any) -> Any:
    """Load the 64 bytes at the address `palette` as this thread's tile configuration."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _call(builder, "llvm.x86.ldtilecfg", builder.inttoptr(args[0], _POINTER))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release(typingctx: Any) -> Any:
    """Give the tiles back, so that the system no longer saves 8 KiB with this thread."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        _call(builder, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def tile_products(typingctx: Any, kind: Any, w: Any, x: Any, steps: Any, ahead: Any, adds: Any, sums: Any) -> Any:
    """Write the sums of 32 features by 16 or 32 rows to the address `sums`: tiles [i][j] of 1 KiB, of features 16 i.

    If `adds`, the sums start from what stands there, else from 0.  w is the address of the first feature and the bytes
    to the next one; x is that of a packed block of 16 rows and the bytes to the second one, 0 where there is none.  A
    step is 64 bytes of k.  `ahead` is the address of weights to fetch into the cache meanwhile, as many as are
    multiplied, or 0.
    """
    pair = types.UniTuple(types.int64, 2)  # type: ignore[attr-defined]
    signature = types.void(kind, pair, pair, types.int64, types.int64, types.boolean, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        product = _PRODUCTS[sig.args[0].count]
        (w, w_row), (x, x_block) = ([builder.extract_value(args[i], j) for j in range(2)] for i in (1, 2))
        two_blocks = builder.icmp_signed("!=", x_block, _I64(0))
        with builder.if_else(two_blocks) as (then, otherwise):
            with then:
                _products(builder, product, 2, w, w_row, x, x_block, *args[3:])
            with otherwise:
                _products(builder, product, 1, w, w_row, x, x_block, *args[3:])
        return context.get_dummy_value()

    return signature, codegen


def _products(
    builder: Any,
    product: str,
    blocks: int,
    w: Any,
    w_row: Any,
    x: Any,
    x_block: Any,
    steps: Any,
    ahead: Any,
    adds: Any,
    sums: Any,
) -> None:
    """Emit the loop: tiles 0..3 are sums, 4 and 5 weights, 6 and 7 rows."""
    sum_tiles = [(i, j) for i in range(2) for j in range(blocks)]
    side, row_bytes = _I64(SIDE), _I64(64)
    with builder.if_else(adds) as (then, otherwise):
        with then:
            for i, j in sum_tiles:
                before = _at(builder, sums, _I64((2 * i + j) * TILE_BYTES))
                _call(builder, "llvm.x86.tileloadd64", _I8(2 * i + j), before, row_bytes)
        with otherwise:
            for i, j in sum_tiles:
                _call(builder, "llvm.x86.tilezero", _I8(2 * i + j))
    w_second = builder.add(w, builder.mul(w_row, side))
    x_second = builder.add(x, x_block)
    fetches = builder.icmp_signed("!=", ahead, _I64(0))
    with cgutils.for_range(builder, steps, intp=_I64) as loop:
        k, tile = builder.mul(loop.index, row_bytes), builder.mul(loop.index, _I64(TILE_BYTES))
        for number, address in ((4, w), (5, w_second)):
            _call(builder, "llvm.x86.tileloadd64", _I8(number), _at(builder, address, k), w_row)
        for j, address in enumerate((x, x_second)[:blocks]):
            _call(builder, "llvm.x86.tileloadd64", _I8(6 + j), _at(builder, address, tile), row_bytes)
        for i, j in sum_tiles:
            _call(builder, product, _I8(2 * i + j), _I8(4 + i), _I8(6 + j))
        with builder.if_then(fetches):
            first = builder.add(ahead, builder.mul(loop.index, _I64(64 * _LINES)))
            for line in range(_LINES):
                # For reading, once more into all cache levels but the first, as data.
                hints = (_I32(0), _I32(2), _I32(1))
                _call(builder, "llvm.prefetch.p0", _at(builder, first, _I64(64 * line)), *hints)
    for i, j in sum_tiles:
        target = _at(builder, sums, _I64((2 * i + j) * TILE_BYTES))
        _call(builder, "llvm.x86.tilestored64", _I8(2 * i + j), target, row_bytes)


@intrinsic
def add_scaled(typingctx: Any, kind: Any, where: Any, count: Any, blocks: Any, adds: Any) -> Any:
    """Add ``partial * (row * feature)`` to the sums of `count` features by `blocks` of 16 rows; to 0 unless `adds`.

    `where` holds the addresses of the sums and the partial sums, tiles like those of `tile_products`, and of the
    factors of 32 rows and of the features.
    """
    four = types.UniTuple(types.int64, 4)  # type: ignore[attr-defined]
    signature = types.void(kind, four, types.int64, types.int64, types.boolean)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        sums, partial, rows, features = (builder.extract_value(args[1], i) for i in range(4))
        floats = ir.VectorType(ir.FloatType(), SIDE)

        def pointer(address: Any, index: Any, pointee: Any) -> Any:
            return builder.gep(builder.inttoptr(address, pointee.as_pointer()), [index])

        for j in range(2):
            with builder.if_then(builder.icmp_signed(">", args[3], _I64(j))):
                row = builder.load(pointer(rows, _I64(j), floats), align=4)
                with cgutils.for_range(builder, args[2], intp=_I64) as loop:
                    n = loop.index
                    feature = builder.load(pointer(features, n, ir.FloatType()))
                    # Features 16.. stand in the tiles 2 and 3, rows 16.. in 1 and 3.
                    at = builder.add(builder.add(n, builder.and_(n, _I64(SIDE))), _I64(SIDE * j))
                    value = builder.load(pointer(partial, at, _DWORDS), align=4)
                    is_integer = sig.args[0].count == QUADS + 1
                    value = builder.sitofp(value, floats) if is_integer else builder.bitcast(value, floats)
                    first = builder.insert_element(ir.Constant(floats, ir.Undefined), feature, _I32(0))
                    both = builder.shuffle_vector(first, first, ir.Constant(_DWORDS, [0] * SIDE))
                    target = pointer(sums, at, floats)
                    before = builder.select(args[4], builder.load(target, align=4), ir.Constant(floats, [0.0] * SIDE))
                    value = builder.fmul(value, builder.fmul(row, both))
                    builder.store(builder.fadd(before, value), target, align=4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def transpose(typingctx: Any, sources: Any, source: Any, targets: Any, target: Any) -> Any:
    """Turn 16 rows of 16 dwords round: from the addresses ``sources[i] + source`` to ``targets[i] + target``."""
    signature = types.void(sources, types.int64, targets, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        sources, targets = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 2))

        def pointer(addresses: Any, i: int, offset: Any) -> Any:
            address = builder.load(builder.gep(addresses, [_I64(i)]))
            return builder.inttoptr(builder.add(address, offset), _DWORDS.as_pointer())

        rows = [builder.load(pointer(sources, i, args[1]), align=1) for i in range(SIDE)]
        for i, column in enumerate(_turned(builder, rows)):
            builder.store(column, pointer(targets, i, args[3]), align=1)
        return context.get_dummy_value()

    return signature, codegen


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the columns of 16 vectors: halves, quarters, eighths and single lanes change places."""
    for half in (8, 4, 2, 1):
        own = [lane if not lane & half else SIDE + (lane ^ half) for lane in range(SIDE)]
        other = [lane ^ half if not lane & half else SIDE + lane for lane in range(SIDE)]
        turned = list(rows)
        for i in (i for i in range(SIDE) if not i & half):
            for to, lanes in ((i, own), (i + half, other)):
                mask = ir.Constant(ir.VectorType(_I32, SIDE), lanes)
                turned[to] = builder.shuffle_vector(rows[i], rows[i + half], mask)
        rows = turned
    return rows
