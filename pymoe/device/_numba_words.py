"""Words that several threads or processes read and write, and bytes by address, for kernels that Numba compiles.

Accesses to words, but for `publish`, are in one order for everybody.  What a kernel stored before it wrote a word is
there for whoever reads that.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["I32", "WORD", "add", "copy", "get", "pause", "publish", "put"]

WORD = ir.IntType(64)
I32 = ir.IntType(32)
_BYTES = ir.IntType(8).as_pointer()
_X86, _ARM = ("llvm.x86.sse2.pause", ()), ("llvm.aarch64.hint", (1,))
_HINTS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
"""How a core is told that a loop waits; on Arm the hint 1 is YIELD."""


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, WORD.as_pointer())


@intrinsic
def add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to a word and return what it was."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def put(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a word."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.atomic_rmw("xchg", _pointer(builder, args[0]), args[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def publish(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a word without waiting until others can see it: what this kernel reads next may be read before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def get(typingctx: Any, address: Any) -> Any:
    """Return a word."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "seq_cst", align=8)

    return types.int64(types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the core that this is a loop that waits."""
    hint, operands = _HINTS.get(platform.machine(), ("", ()))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if hint:
            kind = ir.FunctionType(ir.VoidType(), [I32] * len(operands))
            function = cgutils.get_or_insert_function(builder.module, kind, hint)
            builder.call(function, [I32(operand) for operand in operands])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def copy(typingctx: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """Copy bytes that do not overlap."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target, source = (builder.inttoptr(address, _BYTES) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
