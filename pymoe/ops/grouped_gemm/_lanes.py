"""The inner loop as LLVM IR: a tile of dot products over 16 explicit lanes.

Every (row, n) sums k = l, l+16, l+32 ... in lane l by fused multiply-add, then adds the lanes in one fixed tree.  The
tile that a row falls into changes which sums share registers, never a sum's order: bits depend on the row alone.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16
_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT64 = ir.IntType(64)


def tile_of_dots(rows: int, columns: int) -> Any:
    """Return an intrinsic for ``out[i * columns + j] = dot(a[starts[i]:], w[w_start + j * stride:])``, i < rows.

    Arguments: a, starts, k (all flat arrays and the first k), w, w_start, stride, steps (of 16 k each), out.
    """

    @intrinsic
    def dots(
        typingctx: Any, a: Any, starts: Any, k: Any, w: Any, w_start: Any, stride: Any, steps: Any, out: Any
    ) -> Any:
        signature = types.void(a, starts, types.int64, w, types.int64, types.int64, types.int64, out)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            a_ptr, starts_ptr, w_ptr, out_ptr = (
                context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 1, 3, 7)
            )
            k, w_start, stride, steps = args[2], args[4], args[5], args[6]
            bases = []
            for i in range(rows):
                start = builder.load(builder.gep(starts_ptr, [_INT64(i)]))
                bases.append(builder.gep(a_ptr, [builder.add(start, k)]))
            columns_at = [
                builder.gep(w_ptr, [builder.add(w_start, builder.mul(_INT64(j), stride))]) for j in range(columns)
            ]
            sums = _loop(builder, bases, columns_at, steps)
            for index, total in enumerate(sums):
                builder.store(_add_lanes(builder, total), builder.gep(out_ptr, [_INT64(index)]))
            return context.get_dummy_value()

        return signature, codegen

    return dots


def _loop(builder: Any, bases: list, columns_at: list, steps: Any) -> list:
    """Emit the loop over steps of 16 k; return the vectors of lane sums, row-major."""
    count = len(bases) * len(columns_at)
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    before = builder.basic_block
    head = builder.append_basic_block("dots.head")
    body = builder.append_basic_block("dots.body")
    done = builder.append_basic_block("dots.done")
    builder.branch(head)
    builder.position_at_end(head)
    step = builder.phi(_INT64)
    step.add_incoming(_INT64(0), before)
    sums = [builder.phi(_VECTOR) for _ in range(count)]
    for total in sums:
        total.add_incoming(zero, before)
    builder.cbranch(builder.icmp_signed("<", step, steps), body, done)
    builder.position_at_end(body)
    offset = builder.mul(step, _INT64(LANES))
    left = [_load(builder, base, offset) for base in bases]
    right = [_load(builder, base, offset) for base in columns_at]
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.fma.v16f32")
    pairs = [(x, y) for x in left for y in right]
    for total, (x, y) in zip(sums, pairs, strict=True):
        total.add_incoming(builder.call(fma, [x, y, total]), body)
    step.add_incoming(builder.add(step, _INT64(1)), body)
    builder.branch(head)
    builder.position_at_end(done)
    return sums


def _load(builder: Any, base: Any, offset: Any) -> Any:
    pointer = builder.bitcast(builder.gep(base, [offset]), _VECTOR.as_pointer())
    return builder.load(pointer, align=4)


def _add_lanes(builder: Any, vector: Any) -> Any:
    """Add the halves of the vector, then of that, down to one number."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, ir.Undefined),
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(first, first + width))),
            )
            for first in (0, width)
        ]
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.IntType(32)(0))
