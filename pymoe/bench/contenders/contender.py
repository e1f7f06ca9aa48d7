"""The interface of whoever is timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

__all__ = ["Contender"]

Array = Any


class Contender(ABC):
    """One implementation of the layer in one scheme, with both weight sets loaded.

    Attributes
    ----------
    name : str
        Such as "ours" or "torch".
    scheme : str
        What it computes in.
    threads : int
        CPU threads it uses.
    """

    name: str
    scheme: str
    threads: int

    def variants(self, M: int) -> tuple[str, ...]:
        """Return the implementations it offers for M tokens; the fastest is timed."""
        return ("",)

    @abstractmethod
    def bind(self, number: int, x: Array, variant: str = "") -> Callable[[], Any]:
        """Return a call without arguments: weight set `number` on tokens (M, K), given as float32.

        Tokens are converted here, and the call returns when its result is complete.
        """

    @abstractmethod
    def as_float32(self, result: Any) -> Array:
        """Return what a call returned as (M, K) float32."""

    def close(self) -> None:
        """Undo what was set for the whole process."""
        return None
