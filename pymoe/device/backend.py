"""Which implementation of a stage runs."""

from __future__ import annotations

from pymoe.errors import ArgumentError, complaint


def uses_numba(call: str, backend: str | None) -> bool:
    """Return whether `backend` means Numba, as None does; refuse anything but "numpy", "numba" and None."""
    if backend not in (None, "numpy", "numba"):
        raise ArgumentError(complaint(call, "backend", "be numpy, numba or None", repr(backend)))
    return backend != "numpy"
