"""A formula as a sequence of operations, each rounded to float32 as IEEE 754 says, in the order they are done."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["OPERATIONS", "PYTHON", "Program", "TooLarge", "TooLong", "Value", "float32", "spell"]

PYTHON = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "neg": "-{0}", "fma": "fma({0}, {1}, {2})",
    "power_of_two": "power_of_two({0})", "exponent": "exponent({0})", "mantissa": "mantissa({0})", "lt": "{0} < {1}",
    "le": "{0} <= {1}", "eq": "{0} == {1}", "ne": "{0} != {1}", "and": "{0} & {1}", "or": "{0} | {1}",
}  # fmt: skip
"""How NumPy and Numba both spell operations; the rest is each one's own."""
OPERATIONS = {
    "add": "sum", "sub": "difference", "mul": "product", "div": "quotient", "fma": "a * b + c, rounded once",
    "neg": "the other sign", "abs": "without sign", "sqrt": "square root", "floor": "largest whole number not above",
    "power_of_two": "2**n of 1.5 * 2**23 + n, n whole in -126..127",
    "exponent": "n of m * 2**n, m in [1, 2), of a positive normal",
    "mantissa": "m of the same", "lt": "<", "le": "<=", "eq": "==", "ne": "!=", "and": "both", "or": "one or both",
    "not": "the other", "select": "the second where the first is true, else the third",
}  # fmt: skip
"""Every operation that a backend spells.  Comparisons, "and", "or" and "not" give truth values; the rest float32."""
_TRUTHS = {"lt", "le", "eq", "ne", "and", "or", "not"}

LONGEST = 4000
"""Operations of a program at most; a GEMM holds its activation four times over."""


class TooLong(Exception):
    """A program would have more than `LONGEST` operations."""


class TooLarge(Exception):
    """A number is finite, and float32 cannot hold it."""


class Step(NamedTuple):
    """One operation on earlier steps: on their numbers, on the names of arguments, or on constants."""

    operation: str
    operands: tuple[int | str | float, ...]


@dataclass(frozen=True)
class Program:
    """A checked formula: `steps` in order, the last of which is the result, of `arity` arguments "a0", "a1".

    Two are equal if their texts are: as numbers 0.0 equals -0.0, and the constant 1.0 the number of step 1.
    """

    arity: int
    steps: tuple[Step, ...] = field(compare=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(repr((self.arity, self.steps)).encode()).hexdigest())


class Value:
    """What a step gives, to be computed with; Python's operators append steps."""

    __array_ufunc__ = None  # NumPy's scalars leave their operators to this class
    __slots__ = ("builder", "is_truth", "operand")

    def __init__(self, builder: Builder, operand: int | str, is_truth: bool = False) -> None:
        self.builder, self.operand, self.is_truth = builder, operand, is_truth

    def __add__(self, other: Any) -> Value:
        return self.builder.step("add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self.builder.step("add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self.builder.step("sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.builder.step("sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.builder.step("mul", self, other)

    def __rmul__(self, other: Any) -> Value:
        return self.builder.step("mul", other, self)

    def __truediv__(self, other: Any) -> Value:
        return self.builder.step("div", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self.builder.step("div", other, self)

    def __neg__(self) -> Value:
        return self.builder.step("neg", self)

    def __abs__(self) -> Value:
        return self.builder.step("abs", self)

    def __lt__(self, other: Any) -> Value:
        return self.builder.step("lt", self, other)

    def __le__(self, other: Any) -> Value:
        return self.builder.step("le", self, other)

    def __gt__(self, other: Any) -> Value:
        return self.builder.step("lt", other, self)

    def __ge__(self, other: Any) -> Value:
        return self.builder.step("le", other, self)

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return self.builder.step("eq", self, other)

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return self.builder.step("ne", self, other)

    def __bool__(self) -> bool:
        raise TypeError("a value of the formula is known on the device only")  # a fault of ours, not of the user's


class Builder:
    """A program under construction; a step that is there already is not done twice."""

    def __init__(self, arity: int) -> None:
        self.arity = arity
        self._steps: list[Step] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def arguments(self) -> list[Value]:
        """Return the formula's arguments."""
        return [Value(self, f"a{i}") for i in range(self.arity)]

    def step(self, operation: str, *operands: Any) -> Value:
        """Append an operation on values and Python numbers, which are rounded to float32."""
        return Value(self, self._numbered(operation, *operands), operation in _TRUTHS)

    def _numbered(self, operation: str, *operands: Any) -> int:
        cells = tuple(x.operand if isinstance(x, Value) else float32(x) for x in operands)
        # -0.0 equals 0.0 and NaN nothing, so constants are told apart by their bits.
        key = (operation, *(struct.pack("<f", x) if isinstance(x, float) else x for x in cells))
        if key not in self._numbers:
            if len(self._steps) == LONGEST:
                raise TooLong
            self._numbers[key] = len(self._steps)
            self._steps.append(Step(operation, cells))
        return self._numbers[key]

    def finish(self, result: Value | float) -> Program:
        """Return the program of the steps that `result` needs."""
        last = result.operand if isinstance(result, Value) else None
        if not isinstance(last, int):  # the last step is the result, also where that is an argument or a number
            last = self._numbered("mul", result, 1.0)
        needed: set[int] = set()
        pending = [last]
        while pending:
            number = pending.pop()
            if number not in needed:
                needed.add(number)
                pending += [x for x in self._steps[number].operands if isinstance(x, int)]
        order = {old: new for new, old in enumerate(sorted(needed - {last}))} | {last: len(needed) - 1}
        steps = [
            Step(self._steps[old].operation, tuple(order[x] if isinstance(x, int) else x for x in self._steps[old][1]))
            for old in order
        ]
        return Program(self.arity, tuple(steps))


def float32(number: Any) -> float:
    """Return a Python number rounded to float32.

    Raises
    ------
    TooLarge
        It is finite, and the nearest float32 is not.
    """
    try:
        return struct.unpack("<f", struct.pack("<f", float(number)))[0]
    except OverflowError:  # of a whole number that float64 cannot hold, too
        raise TooLarge from None


def spell(program: Program, words: Mapping[str, str], number: Any, line: str) -> list[str]:
    """Return a program as text, a line a step.

    Parameters
    ----------
    program : Program
    words : mapping of str to str
        Of each operation its expression, with ``{0}``, ``{1}``, ``{2}`` for the operands.
    number : callable
        Returns the text of a float32 constant.
    line : str
        The statement of a step: ``{kind}`` ("float" or "bool"), ``{name}`` and ``{value}``.
    """

    def text(operand: int | str | float) -> str:
        if isinstance(operand, str):
            return operand
        return f"t{operand}" if isinstance(operand, int) else number(operand)

    return [
        line.format(
            kind="bool" if step.operation in _TRUTHS else "float",
            name=f"t{i}",
            value=words[step.operation].format(*map(text, step.operands)),
        )
        for i, step in enumerate(program.steps)
    ]
