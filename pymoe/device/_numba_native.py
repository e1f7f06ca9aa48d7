"""Compiled kernels as plain functions of a range and a block of memory that holds their other arguments.

The arguments lie in that memory as Numba's machine code takes them, arrays without an owner: whoever keeps the memory
keeps the arrays.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.np import numpy_support

__all__ = ["Native", "Unpackable", "packed"]

_names = itertools.count()
_entries: dict[Any, Any] = {}


class Unpackable(Exception):
    """A kernel or an argument that has no such form."""


class Native(NamedTuple):
    """The address of ``int32 entry(int64 start, int64 stop, void *arguments)``, and the arguments."""

    entry: int
    words: np.ndarray
    addresses: list[int]
    """Which of the words are addresses."""


def packed(kernel: Any, args: tuple[Any, ...]) -> Native:
    """Return a kernel that has been called with these arguments, and a range, as a plain function of that memory."""
    try:
        kinds = tuple(kernel.typeof_pyval(arg) for arg in args)
        compiled = kernel.overloads[(types.int64, types.int64, *kinds)]
    except (AttributeError, KeyError, ValueError) as error:
        raise Unpackable(str(error)) from error
    context = compiled.target_context
    form = ir.LiteralStructType([context.get_value_type(kind) for kind in kinds])
    data = context.target_data
    memory = np.zeros(-(-form.get_abi_size(data) // 8) * 8, np.uint8)
    addresses: list[int] = []
    for number, (arg, kind) in enumerate(zip(args, kinds, strict=True)):
        _write(context, memory, form.get_element_offset(data, number), form.elements[number], kind, arg, addresses)
    return Native(_entry_of(compiled, form), memory.view(np.int64), addresses)


def _write(context: Any, memory: np.ndarray, at: int, form: Any, kind: Any, value: Any, addresses: list[int]) -> None:
    """Write one value as Numba's value of type `kind`, an LLVM `form`, to the bytes from `at` on."""
    data = context.target_data
    if isinstance(kind, types.Array):
        content = (0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides)
        cells = memory[at : at + form.get_abi_size(data)].view(np.int64)
        cells[:] = content
        addresses.append(at // 8 + 4)
    elif isinstance(kind, types.BaseTuple):  # type: ignore[attr-defined]
        for place, (part, of) in enumerate(zip(value, kind, strict=True)):
            if isinstance(form, ir.ArrayType):
                inner, offset = form.element, place * form.element.get_abi_size(data)
            else:
                inner, offset = form.elements[place], form.get_element_offset(data, place)
            _write(context, memory, at + offset, inner, of, part, addresses)
    elif isinstance(kind, types.Number | types.Boolean):
        number = np.array([value], numpy_support.as_dtype(kind)).view(np.uint8)
        memory[at : at + number.size] = number
        if kind == types.int64:
            addresses.append(at // 8)
    else:
        raise Unpackable(f"an argument of type {kind}")


def _entry_of(compiled: Any, form: Any) -> int:
    """Return the address of the function that loads the arguments and calls the kernel."""
    key = compiled.fndesc.llvm_func_name, id(compiled.library)
    with global_compiler_lock:
        if key not in _entries:
            _entries[key] = *_compile_entry(compiled, form), compiled
        return _entries[key][0]


def _compile_entry(compiled: Any, form: Any) -> tuple[int, Any]:
    """Return the address of a new entry, and what keeps its code."""
    descriptor = compiled.fndesc
    context, word = compiled.target_context, ir.IntType(64)
    library = context.codegen().create_library("pymoe_entry")
    name = f"pymoe_entry_{next(_names)}"
    module = library.create_ir_module(name)
    function = ir.Function(module, ir.FunctionType(ir.IntType(32), [word, word, word]), name)
    builder = ir.IRBuilder(function.append_basic_block())
    start, stop, memory = function.args
    memory = builder.inttoptr(memory, form.as_pointer())
    index = ir.IntType(32)
    values = [builder.load(builder.gep(memory, [index(0), index(n)])) for n in range(len(form.elements))]
    kind = context.call_conv.get_function_type(descriptor.restype, descriptor.argtypes)
    address = compiled.library.get_pointer_to_function(descriptor.llvm_func_name)
    kernel = builder.inttoptr(word(address), kind.as_pointer())
    status, _ = context.call_conv.call_function(
        builder, kernel, descriptor.restype, descriptor.argtypes, [start, stop, *values]
    )
    builder.ret(builder.select(status.is_ok, index(0), index(1)))
    library.add_ir_module(module)
    library.finalize()
    return library.get_pointer_to_function(name), library
