"""The text of a function: found by where its code says it is, and believed only if it compiles to that very code."""

from __future__ import annotations

import ast
import builtins
import linecache
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

__all__ = ["RELOAD", "NoSource", "find_outside", "find_source", "where"]

RELOAD = "Define it in a file or a notebook, and load that anew"
"""The remedy where there is no text."""

Definition = ast.FunctionDef | ast.Lambda

_lock = threading.Lock()
"""Python's cache of lines has none, and Python 3.11's parser counts its depth for all threads together."""


class NoSource(Exception):
    """The text of a function cannot be found, or is no longer that of its code; says why."""


def find_source(fn: FunctionType) -> Definition:
    """Return the definition of a function as a syntax tree, whose line numbers are those of its file."""
    code = fn.__code__
    with _lock:
        tree, module = _parsed(fn)
    if not any(_is_same(code, other) for other in _codes(module)):
        raise NoSource("the file has changed since it was loaded")
    found: list[Any] = [node for node in ast.walk(tree) if _may_be(node, code)]
    if len(found) > 1 and code.co_name == "<lambda>":  # several of one line: the columns tell
        positions = set(code.co_positions())
        told = [node for node in found if _result_position(node) in positions]
        # Python 3.12 has no position for a constant that is all a lambda returns; then equal code is the same function.
        found = told or [node for node in found if _is_same(code, _code_of(node, code.co_filename))][:1]
    if len(found) != 1:
        raise NoSource("its line holds several functions that cannot be told apart")
    definition = found[0]
    assert isinstance(definition, ast.FunctionDef | ast.Lambda)
    return definition


def _parsed(fn: FunctionType) -> tuple[ast.Module, CodeType]:
    """Return the file of a function, parsed and compiled."""
    file = fn.__code__.co_filename
    linecache.checkcache(file)
    text = "".join(linecache.getlines(file, fn.__globals__))
    if not text:
        raise NoSource("there is no source text of it")
    try:
        return ast.parse(text), compile(text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        raise NoSource("the file has changed since it was loaded") from None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Return a code object and all that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_same(a: CodeType, b: CodeType) -> bool:
    return _content(a) == _content(b)


def _content(code: CodeType) -> tuple[Any, ...]:
    """Return what decides what a code object computes; repr keeps 1, 1.0 and True apart."""
    constants = repr([c for c in code.co_consts if not isinstance(c, CodeType)])
    return (
        code.co_name, code.co_firstlineno, code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars,
        code.co_cellvars, code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount,
    )  # fmt: skip


def _code_of(node: Any, file: str) -> CodeType:
    """Return the code of a lambda without what stands around it."""
    module = compile(ast.fix_missing_locations(ast.Expression(node)), file, "eval", dont_inherit=True)
    return next(constant for constant in module.co_consts if isinstance(constant, CodeType))


def _may_be(node: ast.AST, code: CodeType) -> bool:
    if isinstance(node, ast.Lambda):
        return code.co_name == "<lambda>" and node.lineno == code.co_firstlineno
    if not isinstance(node, ast.FunctionDef) or node.name != code.co_name:
        return False
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) == code.co_firstlineno


def _result_position(node: Any) -> tuple[Any, ...]:
    body = node.body if isinstance(node, ast.Lambda) else node.body[-1]
    return body.lineno, body.end_lineno, body.col_offset, body.end_col_offset


def where(fn: Callable[..., Any], line: int | None = None) -> str:
    """Return "file:line" of a function, or of a line of its file."""
    code = getattr(fn, "__code__", None)
    if code is None:
        return repr(fn)
    return f"{code.co_filename}:{code.co_firstlineno if line is None else line}"


def find_outside(fn: FunctionType, name: str) -> Any:
    """Return the object that a name of a function stands for outside it; raises KeyError where it stands for none."""
    if name in fn.__code__.co_freevars:
        cell = (fn.__closure__ or ())[fn.__code__.co_freevars.index(name)]
        try:
            return cell.cell_contents
        except ValueError:
            raise KeyError(name) from None
    return fn.__globals__[name] if name in fn.__globals__ else vars(builtins)[name]
