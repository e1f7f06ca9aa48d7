"""From the syntax tree of a Python function to a program; what is not float32 arithmetic is refused by its line."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Hashable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from pymoe.errors import ArgumentError, complaint
from pymoe.formula import elementary
from pymoe.formula.functions import COMPARISONS, FUNCTIONS, OPERATORS, choose
from pymoe.formula.program import LONGEST, Builder, Program, TooLarge, TooLong, Value, float32
from pymoe.formula.source import RELOAD, NoSource, find_outside, find_source, where

__all__ = ["Untranslated", "known_number", "read_function"]

_MOST_TURNS = 64
"""Turns of a loop at most, all of which are written out."""


_CALLED = "abs, min, max, exp, expm1, log, log1p, tanh, sqrt, erf, pow and floor of math or NumPy are, np.where too"


class Untranslated(ArgumentError):
    """A function holds what is not translated; it may be one that a compiler of whole functions takes."""


def read_function(call: str, fn: Callable[..., Any], arity: int) -> Program:
    """Return the program of a Python function of `arity` float32 scalars.

    Numbers that it finds in closures, globals, modules and defaults are taken as they are now.

    Raises
    ------
    Untranslated
        An expression or a statement that is not translated; names the file and the line.
    ArgumentError
        Not a function whose text can be read, other parameters, or a mistake; names the file and the line.
    """
    reader = _Reader(call, Builder(arity))
    try:
        result = reader.inline(fn, reader.builder.arguments(), None)
        return reader.builder.finish(reader.as_float(result))
    except TooLong:
        raise reader.refusal(f"take at most {LONGEST} operations", "more", where(fn), kind=Untranslated) from None
    except RecursionError:
        raise reader.refusal("nest less deeply", "a very deep expression", where(fn)) from None
    except TooLarge:  # a path's answer, which no expression around it names
        raise reader.refusal("return numbers that float32 can hold", "a larger one", where(fn)) from None


def known_number(call: str, fn: FunctionType, node: ast.expr, names: dict[str, Any]) -> bool | int | float:
    """Return the number that an expression of a function gives by itself, as Python does; raises as `read_function`."""
    try:
        return _Scope(_Reader(call, Builder(0)), fn, names).evaluate(node)
    except TooLong:
        raise Untranslated("too long") from None


class _Reader:
    """Reads functions into one builder; values are `Value`, or Python's numbers as long as nothing else is known."""

    def __init__(self, call: str, builder: Builder) -> None:
        self.call, self.builder = call, builder
        self.running: list[FunctionType] = []
        self.statements = 0

    def inline(self, fn: Any, arguments: list[Any], caller: tuple[FunctionType, ast.AST] | None) -> Any:
        """Return what a function gives for `arguments`; `caller` is who calls it and where."""
        fn = getattr(fn, "py_func", fn)  # what Numba has compiled
        place = where(fn) if caller is None else where(caller[0], caller[1].lineno)  # type: ignore[attr-defined]
        if not isinstance(fn, FunctionType):
            raise self.refusal("be a Python function", repr(fn), place, "Write it with def or lambda")
        if any(fn.__code__ is other.__code__ for other in self.running):
            raise self.refusal("not call itself", fn.__name__, place)
        if fn.__code__.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            raise self.refusal("return a number", f"the generator or coroutine {fn.__name__}", place)
        names = self.bind(fn, arguments, place)
        try:
            definition = find_source(fn)
        except NoSource as reason:
            raise self.refusal("have its source text at hand", f"{fn.__name__}: {reason}", place, RELOAD) from None
        self.running.append(fn)
        try:
            scope = _Scope(self, fn, names)
            if isinstance(definition, ast.Lambda):
                return scope.evaluate(definition.body)
            found, result = scope.run(definition.body)
            if not found:
                raise self.refusal("return a number on every path", f"{fn.__name__} that does not", where(fn))
            return result
        finally:
            self.running.pop()

    def bind(self, fn: FunctionType, arguments: list[Any], place: str) -> dict[str, Any]:
        """Return the parameters' values: the arguments in order, then defaults."""
        parameters = inspect.signature(fn, follow_wrapped=False).parameters.values()
        rule = f"take {len(arguments)} positional argument{'s' * (len(arguments) != 1)}"
        got = f"{fn.__name__}{inspect.signature(fn, follow_wrapped=False)}"
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise self.refusal(f"{rule} and neither *args nor **kwargs", got, place)
        names: dict[str, Any] = {}
        given = iter(arguments)
        for p in parameters:
            value = p.default if p.kind is p.KEYWORD_ONLY else next(given, p.default)
            if value is p.empty:
                raise self.refusal(rule, got, place)
            names[p.name] = (
                value if isinstance(value, Value) else self.constant(value, f"the default of {p.name}", place)
            )
        if len(list(given)):
            raise self.refusal(rule, got, place)
        return names

    def constant(self, value: Any, name: str, place: str) -> bool | int | float:
        """Return a number as Python's own."""
        if isinstance(value, bool | np.bool_):
            return bool(value)
        if isinstance(value, int | np.integer):
            return int(value)
        if isinstance(value, float | np.floating):
            return float(value)
        got = f"{name}, which is a {type(value).__name__},"
        kind = ArgumentError if isinstance(value, complex) else Untranslated
        raise self.refusal("use numbers only", got, place, kind=kind)

    def as_float(self, value: Any) -> Any:
        """Return a value as float32: 1 and 0 for truth values."""
        if isinstance(value, Value):
            return elementary.select(value, 1.0, 0.0) if value.is_truth else value
        return value

    def as_truth(self, value: Any) -> Any:
        """Return a value as a truth value: whether it is other than zero."""
        if not isinstance(value, Value):
            return bool(value)
        return value if value.is_truth else self.builder.step("ne", value, 0.0)

    def refusal(
        self, rule: str, got: str, place: str, remedy: str = "", kind: type[ArgumentError] = ArgumentError
    ) -> ArgumentError:
        return kind(complaint(self.call, "fn", rule, f"{got} at {place}", remedy))


class _Scope:
    """One function being read: its names and, by its code, where other names lead."""

    def __init__(self, reader: _Reader, fn: FunctionType, names: dict[str, Any]) -> None:
        self.reader, self.fn, self.names = reader, fn, names

    def refuse(
        self, node: Any, rule: str, got: str | None = None, remedy: str = "", kind: type[ArgumentError] = Untranslated
    ) -> ArgumentError:
        text = ast.unparse(node).splitlines()[0] if got is None else got
        return self.reader.refusal(rule, text, where(self.fn, node.lineno), remedy, kind)

    def mistake(self, node: ast.AST, rule: str, got: str | None = None) -> ArgumentError:
        """Return the error of what no compiler can make right."""
        return self.refuse(node, rule, got, kind=ArgumentError)

    # Statements

    def run(self, body: list[ast.stmt]) -> tuple[bool, Any]:
        """Run statements; return whether they end in a return, and with what."""
        for at, statement in enumerate(body):
            rest = body[at + 1 :]
            self.reader.statements += 1
            if self.reader.statements > LONGEST:
                raise TooLong
            if isinstance(statement, ast.Return):
                if statement.value is None:
                    raise self.mistake(statement, "return a number on every path")
                return True, self.evaluate(statement.value)
            if isinstance(statement, ast.If):
                return self.branch(statement, rest)
            if isinstance(statement, ast.For):
                return self.run([*self.turns(statement), *rest])
            self.step(statement)
        return False, None

    def step(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[target], value=value):
                self.assign(target, value)
            case ast.Assign(targets=names, value=value) if all(isinstance(name, ast.Name) for name in names):
                self.names |= dict.fromkeys([name.id for name in names], self.evaluate(value))  # type: ignore[attr-defined]
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                self.names[name] = self.evaluate(value)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                self.names[name] = self.evaluate(ast.copy_location(ast.BinOp(target, op, value), statement))
            case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
                pass
            case _:
                remedy = "Assignments, if, for over range and return are"
                raise self.refuse(statement, "hold translated statements only", remedy=remedy)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        match target, value:
            case ast.Name(id=name), _:
                self.names[name] = self.evaluate(value)
            case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
                results = [self.evaluate(v) for v in values]
                for part, result in zip(names, results, strict=True):
                    if not isinstance(part, ast.Name):
                        raise self.refuse(target, "assign to names only")
                    self.names[part.id] = result
            case _:
                raise self.refuse(target, "assign to names only")

    def branch(self, statement: ast.If, rest: list[ast.stmt]) -> tuple[bool, Any]:
        """Run both branches, each with what comes after, unless the condition is a known number."""
        truth = self.reader.as_truth(self.evaluate(statement.test))
        if isinstance(truth, bool):
            return self.run([*(statement.body if truth else statement.orelse), *rest])
        before = self.names
        if not any(isinstance(node, ast.Return) for node in ast.walk(statement)):  # what comes after is read only once
            self.names = dict(before)
            self.run(statement.body)
            this, self.names = self.names, dict(before)
            self.run(statement.orelse)
            that = self.names
            both = this.keys() & that.keys()  # a name of one branch only is unknown afterwards
            self.names = {name: self.choose(truth, this[name], that[name]) for name in both}
            return self.run(rest)
        results = []
        for body in (statement.body, statement.orelse):
            self.names = dict(before)
            found, result = self.run([*body, *rest])
            if not found:
                raise self.mistake(statement, "return a number on every path")
            results.append(result)
        return True, self.choose(truth, *results)

    def turns(self, statement: ast.For) -> Iterator[ast.stmt]:
        """Return the statements of a loop over a range of known numbers, turn by turn."""
        rule = "loop over a range of known whole numbers only, without break, continue and else"
        left = any(isinstance(node, ast.Break | ast.Continue) for child in statement.body for node in ast.walk(child))
        match statement:
            case ast.For(ast.Name(), ast.Call(func, args, []), _, []) if self.look_up(func) is range and not left:
                numbers = [self.evaluate(argument) for argument in args]
            case _:
                raise self.refuse(statement, rule)
        if not all(type(number) is int for number in numbers) or not 1 <= len(numbers) <= 3:
            raise self.refuse(statement, rule)
        try:
            turns = range(*numbers)
        except ValueError:
            raise self.refuse(statement, rule) from None
        if len(turns) > _MOST_TURNS:
            raise self.refuse(statement, f"loop at most {_MOST_TURNS} times", f"{len(turns)} turns")
        for number in turns:
            value = ast.copy_location(ast.Constant(number), statement)
            yield ast.copy_location(ast.Assign([statement.target], value), statement)
            yield from statement.body

    # Expressions

    def evaluate(self, node: ast.expr) -> Any:
        """Return the value of an expression: a `Value`, or a number that is known now."""
        try:
            return self.found(node)
        except TooLarge:
            raise self.mistake(node, "use numbers that float32 can hold") from None

    def found(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                return self.known(node, value)
            case ast.Name():
                return self.name(node)
            case ast.Attribute():
                return self.known(node, self.look_up(node))
            case ast.UnaryOp(op=op, operand=operand):
                return self.unary(node, op, self.evaluate(operand))
            case ast.BinOp(left=left, op=op, right=right):
                return self.compute(node, op, self.evaluate(left), self.evaluate(right))
            case ast.BoolOp(op=op, values=values):
                return self.logic("and" if isinstance(op, ast.And) else "or", [self.evaluate(v) for v in values], node)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                return self.compare(node, ops, [self.evaluate(x) for x in (left, *rights)])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                truth = self.reader.as_truth(self.evaluate(test))
                if isinstance(truth, bool):
                    return self.evaluate(body if truth else orelse)
                return self.choose(truth, self.evaluate(body), self.evaluate(orelse))
            case ast.Call(func=func, args=args, keywords=[]) if not any(isinstance(a, ast.Starred) for a in args):
                return self.call(node, self.look_up(func), [self.evaluate(a) for a in args])
        raise self.refuse(node, f"hold translated expressions only, not {type(node).__name__}")

    def name(self, node: ast.Name) -> Any:
        if node.id in self.names:
            return self.names[node.id]
        return self.known(node, self.look_up(node))

    def look_up(self, node: ast.expr) -> Any:
        """Return the object that a name, or an attribute of a module, stands for outside the function."""
        if isinstance(node, ast.Attribute):
            owner = self.look_up(node.value)
            if not isinstance(owner, ModuleType):
                raise self.refuse(node, "use attributes of modules only")
            try:
                return getattr(owner, node.attr)
            except AttributeError:
                raise self.mistake(node, "use names that exist") from None
        if not isinstance(node, ast.Name):
            raise self.refuse(node, f"hold translated expressions only, not {type(node).__name__}")
        name = node.id
        if name in self.names or name in self.fn.__code__.co_varnames:
            if name in self.names:
                raise self.refuse(node, "use functions and modules from outside only")
            raise self.mistake(node, "assign names before use")
        try:
            return find_outside(self.fn, name)
        except KeyError:
            raise self.mistake(node, "use names that exist") from None

    def known(self, node: ast.expr, value: Any) -> Any:
        """Return a number from outside as Python's own."""
        number = self.reader.constant(value, ast.unparse(node), where(self.fn, node.lineno))
        float32(number)
        return number

    def unary(self, node: ast.expr, op: ast.unaryop, x: Any) -> Any:
        if isinstance(op, ast.Not):
            truth = self.reader.as_truth(x)
            return not truth if isinstance(truth, bool) else self.reader.builder.step("not", truth)
        if isinstance(op, ast.Invert):
            raise self.refuse(node, "hold translated operators only")
        x = self.reader.as_float(x)
        return -x if isinstance(op, ast.USub) else x

    def compute(self, node: ast.AST, op: ast.operator, a: Any, b: Any) -> Any:
        apply = OPERATORS.get(type(op))
        if apply is None:
            raise self.refuse(node, "hold translated operators only", remedy="+, -, *, / and ** are")
        return self.result(node, apply, self.reader.as_float(a), self.reader.as_float(b))

    def logic(self, operation: str, values: list[Any], node: ast.expr) -> Any:
        result = self.truth(node, values[0])
        for value in values[1:]:
            other = self.truth(node, value)
            if isinstance(result, bool) or isinstance(other, bool):
                known, free = (result, other) if isinstance(result, bool) else (other, result)
                result = free if known == (operation == "and") else known
            else:
                result = self.reader.builder.step(operation, result, other)
        return result

    def truth(self, node: ast.expr, value: Any) -> Any:
        if isinstance(value, Value) and not value.is_truth or not isinstance(value, Value | bool):
            raise self.refuse(node, "join truth values only, by and and or", remedy="Compare with 0")
        return value

    def compare(self, node: ast.expr, ops: list[ast.cmpop], values: list[Any]) -> Any:
        links = []
        for op, a, b in zip(ops, values, values[1:], strict=False):
            a, b = self.reader.as_float(a), self.reader.as_float(b)
            apply = COMPARISONS.get(type(op))
            if apply is None:
                raise self.refuse(node, "hold translated comparisons only", remedy="<, <=, >, >=, == and != are")
            links.append(apply(a, b))
        return self.logic("and", links, node)

    def choose(self, truth: Value, this: Any, that: Any) -> Any:
        if not isinstance(this, Value) and not isinstance(that, Value) and repr(this) == repr(that):
            return this
        if isinstance(this, Value) and this.is_truth and isinstance(that, Value) and that.is_truth:
            step = self.reader.builder.step
            return step("or", step("and", truth, this), step("and", step("not", truth), that))
        return elementary.select(truth, self.reader.as_float(this), self.reader.as_float(that))

    def call(self, node: ast.Call, function: Any, arguments: list[Any]) -> Any:
        if isinstance(function, Hashable) and function in FUNCTIONS:
            counts, apply = FUNCTIONS[function]
            if len(arguments) not in counts:
                rule = f"give {ast.unparse(node.func)} {' or '.join(map(str, counts))} arguments"
                raise self.mistake(node, rule)
            if function is np.where:
                return choose(self.reader.as_truth(arguments[0]), *map(self.reader.as_float, arguments[1:]))
            return self.result(node, apply, *map(self.reader.as_float, arguments))
        if isinstance(getattr(function, "py_func", function), FunctionType):
            return self.reader.inline(function, arguments, (self.fn, node))
        raise self.refuse(node, "call translated functions only", remedy=_CALLED)

    def result(self, node: ast.AST, apply: Callable[..., Any], *operands: Any) -> Any:
        """Compute, for numbers that are known as Python does."""
        try:
            found = apply(*operands)
        except (ArithmeticError, ValueError) as error:
            raise self.mistake(node, "compute numbers that exist", f"{ast.unparse(node)} ({error})") from None
        if isinstance(found, Value):
            return found
        return self.reader.constant(found, ast.unparse(node), where(self.fn, node.lineno))  # type: ignore[attr-defined]
