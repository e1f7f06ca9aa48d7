"""What a function that is not translated finds outside itself: functions of libraries, numbers, and what tells them."""

from __future__ import annotations

import ast
import hashlib
import math
from types import ModuleType
from typing import Any

import numpy as np

from pymoe.formula.functions import FUNCTIONS
from pymoe.formula.program import TooLarge, float32
from pymoe.formula.words import ELEMENTARY, Word

__all__ = ["NotNumbers", "is_builtin", "is_of_libraries", "numbers", "operation_of", "text_of", "word_of"]


class NotNumbers(Exception):
    """An object is neither number nor tuple or array of numbers; the message is its kind."""


def is_builtin(value: Any) -> bool:
    return getattr(value, "__module__", None) == "builtins" and callable(value)


def is_of_libraries(value: Any) -> bool:
    """Return whether an object is a function of math or NumPy."""
    if isinstance(value, np.ufunc):
        return True
    module = getattr(value, "__module__", None) or ""
    return callable(value) and module.split(".")[0] in ("math", "cmath", "numpy")


def word_of(function: Any) -> Word | None:
    """Return the word that stands for a function of Python, math or NumPy, if one does."""
    return _WORDS.get(id(function))


def operation_of(function: Any) -> ast.operator | None:
    """Return the operator that a function of NumPy stands for, if it is one."""
    return _OPERATIONS.get(id(function))


def numbers(value: Any) -> Any:
    """Return numbers as they are now, floats and what 64 bits cannot hold as float32, and arrays as copies.

    Raises
    ------
    NotNumbers
        It is something else.
    TooLarge
        A number is finite, and float32 cannot hold it.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer) and -(2**63) <= value < 2**63:  # what compilers have
        return int(value)
    if isinstance(value, int | float | np.integer | np.floating):
        return np.float32(float32(value))
    if isinstance(value, tuple):
        return tuple(map(numbers, value))
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        raise NotNumbers(type(value).__name__)
    with np.errstate(over="ignore"):
        kept = value.astype(np.float32) if value.dtype.kind == "f" else value.copy()
    if (np.isinf(kept) & ~np.isinf(value)).any():
        raise TooLarge
    kept.flags.writeable = False
    return kept


def text_of(value: Any) -> str:
    """Return what tells a value from others: its type and its bits."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, tuple):
        return f"({', '.join(map(text_of, value))})"
    if isinstance(value, np.floating):
        return f"{type(value).__name__} {value.tobytes().hex()}"
    if callable(value) or isinstance(value, ModuleType):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', value))}"
    return f"{type(value).__name__} {value!r}"


_WORDS: dict[int, Word] = {id(max): Word("larger"), id(min): Word("smaller")}
_WORDS |= {id(f): Word(f.__name__) for f in FUNCTIONS if getattr(f, "__name__", "") in ELEMENTARY}
_WORDS |= dict.fromkeys(map(id, (pow, math.pow, np.power)), Word("power"))
_OPERATIONS: dict[int, ast.operator] = {
    id(np.add): ast.Add(), id(np.subtract): ast.Sub(), id(np.multiply): ast.Mult(), id(np.divide): ast.Div(),
    id(np.remainder): ast.Mod(), id(np.floor_divide): ast.FloorDiv(),
}  # fmt: skip
