"""Calls of Python's and libraries' functions in what is not translated: each with the same answers on every backend."""

from __future__ import annotations

import ast
import builtins
import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pymoe.errors import ArgumentError
from pymoe.formula.outside import is_of_libraries, operation_of, word_of
from pymoe.formula.words import ELEMENTARY, program_of

if TYPE_CHECKING:
    from pymoe.formula.rewriting import Rewriting

__all__ = ["Call"]

_MOST_NUMBERS = 64
"""Of max, min and sum, which are written out."""
_OF_TABLES = (enumerate, zip, reversed)
_COUNTING = (range, len, *_OF_TABLES)
"""What has no float to round."""
_TO_WHOLE = (int, np.int64, round, math.trunc)
_SIZES = (math.fabs, np.abs, np.fabs)


class Call:
    """A call of a `function` that Python or a library brings."""

    def __init__(self, body: Rewriting, node: ast.Call, function: Any) -> None:
        self.body, self.node, self.function = body, node, function
        self.text = ast.unparse(node)  # as it was written

    def rewritten(self) -> ast.expr:
        """Return the call as its words and operators, or as it is, on operands that every compiler takes alike."""
        body, node, function = self.body, self.node, self.function
        self.check_kind()
        if function in (max, min, sum):
            return self.joined()
        if function is np.where and len(node.args) == 3:
            return body.word("rounded", body.visit(self.at(ast.IfExp(*node.args))), place=node)
        if function is divmod and len(node.args) == 2:
            parts = [ast.BinOp(a, op, b) for op in (ast.FloorDiv(), ast.Mod()) for a, b in [copy.deepcopy(node.args)]]
            return body.visit(self.at(ast.Tuple([self.at(part) for part in parts], ast.Load())))
        operator = operation_of(function)
        if operator is not None and len(node.args) == 2:
            return body.visit(self.at(ast.BinOp(node.args[0], operator, node.args[1])))
        operands = list(self.operands())
        return self.by_word(operands) or self.as_it_is(operands)

    def check_kind(self) -> None:
        function = self.function
        if function is print:
            raise self.refuse("not print")
        module = str(getattr(function, "__module__", ""))
        if function is complex or module == "cmath" or self.is_kind(np.complexfloating):
            raise self.refuse("use real numbers only")
        if self.is_kind(np.integer) and function is not np.int64:
            raise self.refuse("use whole numbers of 64 bits only, which int makes")

    def is_kind(self, kind: type) -> bool:
        return isinstance(self.function, type) and issubclass(self.function, kind)

    def joined(self) -> ast.expr:
        """Return max, min or sum as operations on two numbers, in Python's order."""
        body, node, function = self.body, self.node, self.function
        numbers: list[ast.expr] = []
        if function is not sum and not node.keywords:
            numbers = list(self.operands(one_tuple=True))
        elif not node.keywords and 1 <= len(node.args) <= 2:
            start = body.visit(node.args[1]) if len(node.args) == 2 else self.at(ast.Constant(0))
            numbers = [start, *self.elements(node.args[0])]
        if not 1 <= len(numbers) <= _MOST_NUMBERS:
            raise self.refuse(f"give {function.__name__} 1 to {_MOST_NUMBERS} numbers and no keywords")
        result = numbers[0]
        for number in numbers[1:]:
            if function is sum:
                result = body.word("rounded", self.at(ast.BinOp(result, ast.Add(), number)), place=node)
            else:
                result = body.word(str(word_of(function)), result, number, place=node)
        return body.word("rounded", result, place=node)

    def operands(self, one_tuple: bool = False) -> Iterator[ast.expr]:
        """Yield the rewritten arguments; those of a star, and of `one_tuple` alone, one by one."""
        body = self.body
        for argument in self.node.args:
            if isinstance(argument, ast.Starred):
                yield from self.elements(argument.value)
            elif one_tuple and len(self.node.args) == 1:
                yield from self.elements(argument)
            elif self.function in _OF_TABLES:
                yield body.table(argument)
            else:
                yield self.operand(argument)

    def operand(self, node: ast.expr) -> ast.expr:
        """Return a rewritten argument, which may be a type, as of an array."""
        kind = self.body.look_up(node)
        return self.body.bound("object", kind, node) if isinstance(kind, type) else self.body.visit(node)

    def elements(self, node: ast.expr) -> Iterator[ast.expr]:
        """Yield the rewritten elements of a tuple that is written here, or known."""
        body, value = self.body, self.body.look_up(node)
        if isinstance(node, ast.Tuple | ast.List):
            for element in node.elts:
                if isinstance(element, ast.Starred):
                    yield from self.elements(element.value)
                else:
                    yield body.visit(element)
        elif isinstance(value, tuple) or isinstance(value, np.ndarray) and value.ndim == 1:
            for number in value:
                yield body.bound("number", body.number(ast.unparse(node), number, node), node)
        else:
            raise self.refuse("give functions their numbers one by one, or in a tuple that stands there or is known")

    def by_word(self, operands: list[ast.expr]) -> ast.expr | None:
        """Return the call as a word, if one stands for the function."""
        body, node, function = self.body, self.node, self.function
        if node.keywords:
            return None
        word = word_of(function)
        if word in ELEMENTARY:
            if len(operands) != program_of(word).arity:
                raise self.refuse(f"give {ast.unparse(node.func)} {program_of(word).arity} arguments")
            return (
                body.power(node, *operands)
                if word == "power"
                else body.word(word, *map(body.single, operands), place=node)
            )
        if len(operands) != 1:
            return None
        if function is np.square:
            return body.power(node, body.single(operands[0]), self.at(ast.Constant(2)))
        if function is np.negative:
            return self.at(ast.UnaryOp(ast.USub(), body.single(operands[0])))
        if function in _SIZES:
            return self.at(ast.Call(self.at(ast.Name("abs", ast.Load())), [body.single(operands[0])], []))
        return None

    def as_it_is(self, operands: list[ast.expr]) -> ast.expr:
        """Return the call of a function that stays; functions of libraries get float64."""
        body, node, function = self.body, self.node, self.function
        keywords = [ast.keyword(k.arg, self.operand(k.value)) for k in node.keywords]
        if function in _TO_WHOLE and len(operands) == 1:
            operands = [body.word("bounded", operands[0], place=node)]
        elif is_of_libraries(function) and not isinstance(function, type):
            operands = [x if self.is_object(x) else body.word("wide", x, place=node) for x in operands]
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        known = getattr(builtins, name, None) is function
        callee = node.func if known else body.bound("object", function, node)
        call = self.at(ast.Call(callee, operands, keywords))
        return call if function in _COUNTING else body.word("rounded", call, place=node)

    def is_object(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and isinstance(self.body.names.get(node.id), type)

    def at(self, node: Any) -> Any:
        return ast.copy_location(node, self.node)

    def refuse(self, rule: str) -> ArgumentError:
        return self.body.refuse(self.node, rule, self.text)
