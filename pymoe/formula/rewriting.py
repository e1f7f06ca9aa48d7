"""A function that is not translated, rewritten: words around its operations, and numbers for names from outside."""

from __future__ import annotations

import ast
import contextlib
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any, Protocol

import numpy as np

from pymoe.errors import ArgumentError
from pymoe.formula.assigned import find_unassigned
from pymoe.formula.calls import Call
from pymoe.formula.outside import NotNumbers, is_builtin, is_of_libraries, numbers, text_of
from pymoe.formula.program import TooLarge
from pymoe.formula.reader import Untranslated, known_number
from pymoe.formula.source import find_outside, find_source, where
from pymoe.formula.words import Word

__all__ = ["OWN", "Part", "PartOf", "Rewriting"]

OWN: Any = object()
"""Stands for what a function itself makes."""

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


class Closing(Protocol):
    """What knows the parts of a closed function."""

    call: str
    texts: list[str]

    def close(self, fn: Any, place: str) -> int: ...

    def refusal(self, rule: str, got: str, place: str, remedy: str = "") -> ArgumentError: ...


class Rewriting(ast.NodeTransformer):
    """Rewrites one function; of `arity` arguments the rest are defaults, which no caller gives."""

    def __init__(self, closing: Closing, fn: FunctionType, arity: int | None) -> None:
        self.closing, self.fn, self.arity = closing, fn, arity
        self.names: dict[str, Any] = {}
        self.own: set[str] = set()
        self.given: dict[str, Any] = {}
        """Parameters that are as good as names outside: no caller gives them, and nothing assigns them."""

    def part(self) -> Part:
        definition: Any = find_source(self.fn)
        if isinstance(definition, ast.Lambda):
            body: list[ast.stmt] = [ast.copy_location(ast.Return(definition.body), definition.body)]
        else:
            body = definition.body
        arguments = definition.args
        names = [argument.arg for argument in ast.walk(arguments) if isinstance(argument, ast.arg)]
        self.own = set(names) | {name for x in body for name in _stored(x)}
        for inner in (node for x in body for node in ast.walk(x) if isinstance(node, ast.NamedExpr)):
            raise self.refuse(inner, "assign names in statements of their own")  # Numba knows no other way
        first, defaults = self.bind(arguments, body)
        unassigned = find_unassigned(names, body, self.turns)
        if unassigned is not None:
            raise self.refuse(unassigned, "assign names before use, on every path")
        arguments.defaults = []
        for argument in (*arguments.posonlyargs, *arguments.args):
            argument.annotation = None
        body = [*first, *map(self.visit, body)]
        rewritten: Any = ast.FunctionDef(self.fn.__name__, arguments, body, [], None, None)
        rewritten.type_params = []  # Python 3.12 asks for them
        ast.copy_location(rewritten, definition)
        module = ast.fix_missing_locations(ast.Module([rewritten], []))
        self.closing.texts.append(ast.dump(module))
        code = compile(module, self.fn.__code__.co_filename, "exec", dont_inherit=True)
        return Part(self.fn.__name__, code, self.names, defaults or None)

    def bind(self, arguments: ast.arguments, body: list[ast.stmt]) -> tuple[list[ast.stmt], tuple[Any, ...]]:
        """Take parameters beyond the arity out of `arguments`.

        Return assignments of those that the body assigns, and the defaults that a caller may leave to the function.
        """
        if self.arity is None:
            if any(arguments.kw_defaults):
                raise self.refuse(arguments.kwonlyargs[0], "take no keyword-only arguments with defaults")
            text = f"a default of {self.fn.__name__}"
            return [], tuple(self.number(text, value, None) for value in self.fn.__defaults__ or ())
        positional = [*arguments.posonlyargs, *arguments.args]
        values = dict(zip(reversed([x.arg for x in positional]), reversed(self.fn.__defaults__ or ()), strict=False))
        values |= self.fn.__kwdefaults__ or {}
        extra = {x.arg for x in (*positional[self.arity :], *arguments.kwonlyargs)}
        arguments.posonlyargs = [x for x in arguments.posonlyargs if x.arg not in extra]
        arguments.args = [x for x in arguments.args if x.arg not in extra]
        arguments.kwonlyargs, arguments.kw_defaults = [], []
        stored = {name for x in body for name in _stored(x)}
        self.given = {name: values[name] for name in extra - stored}
        self.own -= self.given.keys()
        return [self.assignment(name, values[name], body[0]) for name in sorted(extra & stored)], ()

    def assignment(self, name: str, value: Any, place: ast.AST) -> ast.stmt:
        number = self.bound("number", self.number(f"the default of {name}", value, None), place)
        return ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], number), place)

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
        """Return the object outside that a name, or an attribute of a module, stands for; `OWN` if it is inside."""
        if isinstance(node, ast.Attribute):
            owner = self.look_up(node.value)
            if not isinstance(owner, ModuleType):
                return OWN
            try:
                return getattr(owner, node.attr)
            except AttributeError:
                raise self.refuse(node, "use names that exist") from None
        if not isinstance(node, ast.Name) or node.id in self.own:
            return OWN
        if node.id in self.given:
            return self.given[node.id]
        try:
            return find_outside(self.fn, node.id)
        except KeyError:
            raise self.refuse(node, "use names that exist") from None

    def bound(self, name: str, value: Any, place: ast.AST) -> ast.expr:
        """Return an expression for a value; equal ones share a name."""
        for known, other in self.names.items():
            if other is value or type(other) is type(value) and text_of(other) == text_of(value):
                return ast.copy_location(ast.Name(known, ast.Load()), place)
        name = f"pymoe_{name}_{len(self.names)}"
        self.names[name] = value
        return ast.copy_location(ast.Name(name, ast.Load()), place)

    def outside(self, node: ast.expr, value: Any) -> ast.expr:
        """Return an expression for an object that is found outside the function."""
        if isinstance(getattr(value, "py_func", value), FunctionType) and not is_of_libraries(value):
            return self.bound("part", PartOf(self.closing.close(value, where(self.fn, node.lineno))), node)
        if is_of_libraries(value) or is_builtin(value):
            # Under another name it would be the compiler's own, which has other answers for NaN, or other last bits.
            raise self.refuse(
                node, "call Python's and libraries' functions by their names, and do nothing else with them"
            )
        return self.bound("number", self.number(ast.unparse(node), value, node), node)

    def number(self, name: str, value: Any, node: ast.expr | None) -> Any:
        """Return numbers as they are now, floats as float32."""
        try:
            return numbers(value)
        except TooLarge:
            raise self.refuse(node, "use numbers that float32 can hold", name) from None
        except NotNumbers as kind:
            got = f"{name}, which is a {kind},"
            raise self.refuse(node, "use numbers, and tuples and arrays of numbers, only", got) from None

    def word(self, name: str, *operands: ast.expr, place: ast.AST) -> ast.Call:
        call = ast.Call(self.bound(name, Word(name), place), list(operands), [])
        return ast.copy_location(call, place)

    def single(self, node: ast.expr) -> ast.expr:
        """Return an expression as float32."""
        return ast.copy_location(ast.Call(self.bound("float32", np.float32, node), [node], []), node)

    # Expressions

    def visit(self, node: ast.AST) -> Any:
        """Rewrite a node; numbers that are known now are computed as Python does, and rounded once."""
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.Compare | ast.IfExp | ast.Call) and self.is_outside(node):
            with contextlib.suppress(Untranslated):
                value = known_number(self.closing.call, self.fn, node, dict(self.given))
                return self.bound("number", self.number(ast.unparse(node), value, node), node)
        return super().visit(node)

    def is_outside(self, node: ast.AST) -> bool:
        """Return whether an expression has no name of the function's own, and no parameter that is no number."""
        names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
        return all(isinstance(self.given.get(name, 0), int | float) for name in names) and not names & self.own

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, complex):
            raise self.refuse(node, "use real numbers only")
        number = self.number(ast.unparse(node), node.value, node) if isinstance(node.value, int | float) else 0
        return node if isinstance(number, int) else self.bound("number", number, node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = self.look_up(node) if isinstance(node.ctx, ast.Load) else OWN
        return node if value is OWN else self.outside(node, value)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        value = self.look_up(node)
        if value is OWN:
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
        if not is_builtin(function) and not is_of_libraries(function):
            arguments = [self.visit(x) for x in node.args]
            keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
            call = ast.copy_location(ast.Call(self.visit(node.func), arguments, keywords), node)
            return self.word("rounded", call, place=node)
        return Call(self, node, function).rewritten()

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


def _stored(node: ast.AST) -> set[str]:
    """Return the names that a statement, and what is in it, assigns or defines."""
    found = {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and not isinstance(x.ctx, ast.Load)}
    found |= {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}
    return found | {x.name for x in ast.walk(node) if isinstance(x, ast.FunctionDef)}
