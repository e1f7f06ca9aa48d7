"""Functions that are not translated: closed over what they use, for a compiler of whole functions.

A closed function computes as a program does: numbers are float32, every operation is rounded to it, and nothing that
changes later has a part in it.  exp, log, tanh, erf, pow and their like, division, max and min are words, whose meaning
a backend gives; other functions of math and NumPy are computed in float64 and rounded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from pymoe.errors import ArgumentError, complaint
from pymoe.formula.outside import text_of
from pymoe.formula.rewriting import Part, PartOf, Rewriting
from pymoe.formula.source import RELOAD, NoSource, where
from pymoe.formula.words import Word

__all__ = ["ClosedFunction", "close_function"]


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
    number = closing.close(fn, where(getattr(fn, "py_func", fn)), arity)
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

    def close(self, fn: Any, place: str, arity: int | None = None) -> int:
        """Add a function that is called at `place`, after all that it calls; return its number.

        Of `arity` arguments the rest are defaults, which no caller gives.
        """
        fn = getattr(fn, "py_func", fn)
        if fn in self.known:
            return self.known[fn]
        if fn.__code__ in self.running:
            raise self.refusal("not call itself", fn.__name__, place)
        self.running.append(fn.__code__)
        try:
            part = Rewriting(self, fn, arity).part()
        except NoSource as reason:
            raise self.refusal("have its source text at hand", f"{fn.__name__}: {reason}", place, RELOAD) from None
        self.running.pop()
        names = [f"{name} {text_of(value)}" for name, value in part.names.items()]
        self.known[fn] = len(self.parts)
        self.parts.append(part)
        self.texts += [*names, f"defaults {text_of(part.defaults)}"]
        return self.known[fn]

    def refusal(self, rule: str, got: str, place: str, remedy: str = "") -> ArgumentError:
        return ArgumentError(complaint(self.call, "fn", rule, f"{got} at {place}", remedy))
