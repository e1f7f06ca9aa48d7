"""Functions that are not translated: closed over what they use, for a compiler of whole functions.

A closed function computes as a program does: numbers are float32, every operation is rounded to it, and nothing that
changes later has a part in it.  exp, log, tanh, erf, pow and their like, division, max and min are words, whose meaning
a backend gives; other functions of math and NumPy are computed in float64 and rounded.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from pymoe.errors import ArgumentError, complaint
from pymoe.formula.assigned import find_unassigned
from pymoe.formula.functions import FUNCTIONS
from pymoe.formula.program import float32
from pymoe.formula.source import RELOAD, NoSource, find_source, where
from pymoe.formula.words import ELEMENTARY, WORDS, Word

__all__ = ["ClosedFunction", "close_function"]

_MOST_FACTORS = 4
"""As of `pymoe.formula.functions`: whole exponents up to here are products."""


@dataclass(frozen=True)
class Part:
    """One function of a closed one: its code, and what the names in it stand for: numbers, words, or earlier parts."""

    name: str
    code: CodeType
    names: dict[str, Any]
    defaults: tuple[Any, ...] | None


@dataclass(frozen=True)
class PartOf:
    """Where a part calls another: its number."""

    number: int


@dataclass(frozen=True)
class ClosedFunction:
    """A function of `arity` float32 scalars that depends on nothing outside.  Two are equal if their digests are."""

    arity: int
    digest: str
    place: str = field(compare=False)
    """File and line, for errors."""
    parts: tuple[Part, ...] = field(compare=False, repr=False)
    """What is called stands before its callers; the last is the function itself."""

    @property
    def words(self) -> set[str]:
        """The words that it uses."""
        return {str(value) for part in self.parts for value in part.names.values() if isinstance(value, Word)}

    def build(self, words: Mapping[str, Any], jit: Callable[[Any], Any]) -> Any:
        """Return the function for a backend: each part made callable by `jit`, with the backend's `words`."""
        built: list[Any] = []
        for part in self.parts:
            names: dict[str, Any] = {}
            for name, value in part.names.items():
                if isinstance(value, PartOf):
                    value = built[value.number]
                names[name] = words[value] if isinstance(value, Word) else value
            exec(part.code, names)  # the user's own function, which its module ran as well
            function = names[part.name]
            function.__defaults__ = part.defaults
            built.append(jit(function))
        return built[-1]


def close_function(call: str, fn: Callable[..., Any], arity: int) -> ClosedFunction:
    """Return a Python function of `arity` float32 scalars, closed over the numbers and functions that it uses now.

    Raises
    ------
    ArgumentError
        It uses what is neither number, tuple or array of numbers, function nor module; or raises, catches or prints.
    """
    closing = _Closing(call)
    number = closing.close(fn, where(getattr(fn, "py_func", fn)))
    parts = tuple(closing.parts)
    assert number == len(parts) - 1
    digest = hashlib.sha256("\n".join([str(arity), *closing.texts]).encode()).hexdigest()
    return ClosedFunction(arity, digest, where(getattr(fn, "py_func", fn)), parts)


class _Closing:
    """The parts found so far, and the texts that tell them from others."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.parts: list[Part] = []
        self.texts: list[str] = []
        self.known: dict[FunctionType, int] = {}
        self.running: list[CodeType] = []

    def close(self, fn: Any, place: str) -> int:
        """Add a function that is called at `place`, after all that it calls; return its number."""
        fn = getattr(fn, "py_func", fn)
        if fn in self.known:
            return self.known[fn]
        if fn.__code__ in self.running:
            raise self.refusal("not call itself", fn.__name__, place)
        self.running.append(fn.__code__)
        try:
            part = _Body(self, fn).part()
        except NoSource as reason:
            raise self.refusal("have its source text at hand", f"{fn.__name__}: {reason}", place, RELOAD) from None
        self.running.pop()
        names = [f"{name} {_text(value)}" for name, value in part.names.items()]
        self.known[fn] = len(self.parts)
        self.parts.append(part)
        self.texts += [*names, f"defaults {_text(part.defaults)}"]
        return self.known[fn]

    def refusal(self, rule: str, got: str, place: str, remedy: str = "") -> ArgumentError:
        return ArgumentError(complaint(self.call, "fn", rule, f"{got} at {place}", remedy))


class _Body(ast.NodeTransformer):
    """Rewrites one function."""

    def __init__(self, closing: _Closing, fn: FunctionType) -> None:
        self.closing, self.fn = closing, fn
        self.cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        self.names: dict[str, Any] = {}
        self.own: set[str] = set()

    def part(self) -> Part:
        definition: Any = find_source(self.fn)
        if isinstance(definition, ast.Lambda):
            body: list[ast.stmt] = [ast.copy_location(ast.Return(definition.body), definition.body)]
        else:
            body = definition.body
        arguments = definition.args
        for nodes in ([arguments], body):
            self.own |= {node.arg for x in nodes for node in ast.walk(x) if isinstance(node, ast.arg)}
            self.own |= {
                node.id
                for x in nodes
                for node in ast.walk(x)
                if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
            }
            self.own |= {node.name for x in nodes for node in ast.walk(x) if isinstance(node, ast.FunctionDef)}
        names = [argument.arg for argument in ast.walk(arguments) if isinstance(argument, ast.arg)]
        unassigned = find_unassigned(names, body, self.turns)
        if unassigned is not None:
            raise self.refuse(unassigned, "assign names before use, on every path")
        if any(arguments.kw_defaults):
            raise self.refuse(arguments.kwonlyargs[0], "take no keyword-only arguments with defaults")
        arguments.defaults = []
        for argument in (*arguments.posonlyargs, *arguments.args):
            argument.annotation = None
        body = [self.visit(statement) for statement in body]
        rewritten: Any = ast.FunctionDef(self.fn.__name__, arguments, body, [], None, None)
        rewritten.type_params = []  # Python 3.12 asks for them
        ast.copy_location(rewritten, definition)
        module = ast.fix_missing_locations(ast.Module([rewritten], []))
        self.closing.texts.append(ast.dump(module))
        code = compile(module, self.fn.__code__.co_filename, "exec", dont_inherit=True)
        defaults = self.fn.__defaults__
        if defaults is not None:
            defaults = tuple(self.number(f"a default of {self.fn.__name__}", value, None) for value in defaults)
        return Part(self.fn.__name__, code, self.names, defaults)

    def refuse(self, node: Any, rule: str, got: str | None = None) -> ArgumentError:
        line = self.fn.__code__.co_firstlineno if node is None else node.lineno
        text = ast.unparse(node).splitlines()[0] if got is None else got
        return self.closing.refusal(rule, text, where(self.fn, line))

    def turns(self, node: ast.expr) -> bool:
        """Return whether a loop over an expression is known to turn at least once."""
        if isinstance(node, ast.Tuple | ast.List):
            return bool(node.elts)
        if isinstance(node, ast.Call):
            function = self.look_up(node.func)
            if function is range:
                numbers: list[Any] = [x.value if isinstance(x, ast.Constant) else self.look_up(x) for x in node.args]
                try:
                    return all(isinstance(x, int) for x in numbers) and len(range(*numbers)) > 0
                except (TypeError, ValueError) as error:
                    raise self.refuse(node, "loop over ranges that exist", f"{ast.unparse(node)} ({error})") from None
            return function in (enumerate, zip, reversed) and all(map(self.turns, node.args))
        value = self.look_up(node)
        return isinstance(value, tuple | np.ndarray) and len(value) > 0

    # What stands for what

    def look_up(self, node: ast.expr) -> Any:
        """Return the object outside that a name, or an attribute of a module, stands for; `_OWN` if it is inside."""
        if isinstance(node, ast.Attribute):
            owner = self.look_up(node.value)
            if not isinstance(owner, ModuleType):
                return _OWN
            try:
                return getattr(owner, node.attr)
            except AttributeError:
                raise self.refuse(node, "use names that exist") from None
        if not isinstance(node, ast.Name) or node.id in self.own:
            return _OWN
        if node.id in self.cells:
            try:
                return self.cells[node.id].cell_contents
            except ValueError:
                raise self.refuse(node, "use names that exist") from None
        for names in (self.fn.__globals__, vars(builtins)):
            if node.id in names:
                return names[node.id]
        raise self.refuse(node, "use names that exist")

    def bound(self, name: str, value: Any, place: ast.AST) -> ast.expr:
        """Return an expression for a value; equal ones share a name."""
        for known, other in self.names.items():
            if other is value or type(other) is type(value) and _text(other) == _text(value):
                return ast.copy_location(ast.Name(known, ast.Load()), place)
        name = f"pymoe_{name}_{len(self.names)}"
        self.names[name] = value
        return ast.copy_location(ast.Name(name, ast.Load()), place)

    def outside(self, node: ast.expr, value: Any) -> ast.expr:
        """Return an expression for an object that is found outside the function."""
        if isinstance(getattr(value, "py_func", value), FunctionType) and not _is_of_libraries(value):
            return self.bound("part", PartOf(self.closing.close(value, where(self.fn, node.lineno))), node)
        if _is_of_libraries(value) or _is_builtin(value):
            return self.bound("object", value, node)
        return self.bound("number", self.number(ast.unparse(node), value, node), node)

    def number(self, name: str, value: Any, node: ast.expr | None) -> Any:
        """Return numbers as they are now, floats as float32."""
        if isinstance(value, bool | np.bool_):
            return bool(value)
        if isinstance(value, int | np.integer):
            return int(value)
        if isinstance(value, float | np.floating):
            if math.isinf(float32(value)) and not math.isinf(value):
                raise self.refuse(node, "use numbers that float32 can hold", name)
            return np.float32(value)
        if isinstance(value, tuple):
            return tuple(self.number(name, x, node) for x in value)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            kept = value.astype(np.float32) if value.dtype.kind == "f" else value.copy()
            kept.flags.writeable = False
            return kept
        got = f"{name}, which is a {type(value).__name__},"
        raise self.refuse(node, "use numbers, and tuples and arrays of numbers, only", got)

    def word(self, name: str, *operands: ast.expr, place: ast.AST) -> ast.Call:
        call = ast.Call(self.bound(name, Word(name), place), list(operands), [])
        return ast.copy_location(call, place)

    def single(self, node: ast.expr) -> ast.expr:
        """Return an expression as float32."""
        return ast.copy_location(ast.Call(self.bound("float32", np.float32, node), [node], []), node)

    # Expressions

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, float):
            return self.bound("number", self.number(ast.unparse(node), node.value, node), node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = self.look_up(node) if isinstance(node.ctx, ast.Load) else _OWN
        return node if value is _OWN or _is_builtin(value) else self.outside(node, value)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        value = self.look_up(node)
        if value is _OWN:
            return self.generic_visit(node)  # type: ignore[return-value]
        return self.outside(node, value)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        left, right = self.visit(node.left), self.visit(node.right)
        if isinstance(node.op, ast.Div):
            return self.word("divide", self.single(left), self.single(right), place=node)
        if isinstance(node.op, ast.Pow):
            return self.power(node, left, right)
        if isinstance(node.op, ast.Mod | ast.FloorDiv):  # NVVM takes a remainder from a rounded quotient and product
            left, right = (self.word("wide", x, place=node) for x in (left, right))
        return self.word("rounded", ast.copy_location(ast.BinOp(left, node.op, right), node), place=node)

    def power(self, node: ast.expr, x: ast.expr, y: ast.expr) -> ast.expr:
        if isinstance(y, ast.Constant) and isinstance(y.value, int) and 0 < y.value <= _MOST_FACTORS:
            product = ast.BinOp(self.word("wide", x, place=node), ast.Pow(), y)
            return self.word("rounded", ast.copy_location(product, node), place=node)
        return self.word("power", self.single(x), self.single(y), place=node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt:
        if not isinstance(node.target, ast.Name):
            return self.generic_visit(node)  # type: ignore[return-value]
        before = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        value = self.visit(ast.copy_location(ast.BinOp(before, node.op, node.value), node))
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign([node.target], self.visit(node.value)), node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        function = self.look_up(node.func)
        if function is print:
            raise self.refuse(node, "not print")
        plain = not node.keywords and not any(isinstance(x, ast.Starred) for x in node.args)
        known = _KNOWN.get(function) if plain and _is_hashable(function) else None
        tables = _is_hashable(function) and function in (enumerate, zip, reversed, sum)
        operands = [self.table(x) if tables else self.visit(x) for x in node.args]
        if known in ("larger", "smaller") and len(operands) > 1:
            result = operands[0]
            for operand in operands[1:]:
                result = self.word(known, result, operand, place=node)
            return self.word("rounded", result, place=node)
        if known == "power" and len(operands) == 2:
            return self.power(node, *operands)
        if known in ELEMENTARY and known != "power" and len(operands) == 1:
            return self.word(known, self.single(operands[0]), place=node)
        if _is_of_libraries(function) and not isinstance(function, type):
            operands = [x if isinstance(x, ast.Starred) else self.word("wide", x, place=x) for x in operands]
        keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
        call = ast.copy_location(ast.Call(self.visit(node.func), operands, keywords), node)
        return call if function in (range, len, enumerate, zip, reversed) else self.word("rounded", call, place=node)

    def visit_For(self, node: ast.For) -> ast.stmt:
        node.iter = self.table(node.iter)
        node.body, node.orelse = ([self.visit(x) for x in part] for part in (node.body, node.orelse))
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        node.value = self.visit(node.value) if isinstance(node.slice, ast.Constant) else self.table(node.value)
        node.slice = self.visit(node.slice)
        return node

    def table(self, node: ast.expr) -> ast.expr:
        """Return a visited expression, a tuple of numbers as an array: Numba-CUDA's search of a tuple may raise."""
        value = self.look_up(node)
        if isinstance(node, ast.Tuple | ast.List):
            with contextlib.suppress(ValueError):
                value = tuple(ast.literal_eval(node))
        if not isinstance(value, tuple) or not all(isinstance(x, int | float | np.number) for x in value):
            return self.visit(node)
        return self.bound("table", self.number(ast.unparse(node), np.array(value), node), node)

    def refuse_statement(self, node: ast.AST) -> ast.AST:
        raise self.refuse(node, "neither raise, catch nor assert, which a GPU cannot, nor match or declare names")

    visit_Raise = visit_Assert = visit_Try = visit_TryStar = visit_With = refuse_statement
    visit_Match = visit_Global = visit_Nonlocal = refuse_statement


_OWN: Any = object()
"""Stands for what a function itself makes."""

_KNOWN: dict[Any, str] = {max: "larger", min: "smaller"}
for _function in FUNCTIONS:
    _name = getattr(_function, "__name__", "")
    if _name in WORDS:
        _KNOWN[_function] = _name
_KNOWN |= dict.fromkeys((pow, math.pow, np.power), "power")


def _is_hashable(value: Any) -> bool:
    return value is not _OWN and getattr(type(value), "__hash__", None) is not None


def _is_builtin(value: Any) -> bool:
    return getattr(value, "__module__", None) == "builtins"


def _is_of_libraries(value: Any) -> bool:
    """Return whether an object is a function of math or NumPy."""
    if isinstance(value, np.ufunc):
        return True
    module = getattr(value, "__module__", None) or ""
    return callable(value) and module.split(".")[0] in ("math", "cmath", "numpy")


def _text(value: Any) -> str:
    """Return what tells a value from others: its type and its bits."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if isinstance(value, np.floating):
        return f"{type(value).__name__} {value.tobytes().hex()}"
    if callable(value) or isinstance(value, ModuleType):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', value))}"
    return f"{type(value).__name__} {value!r}"
