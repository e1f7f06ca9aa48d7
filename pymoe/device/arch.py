"""GPU architectures: the name that kernels are compiled for, and the limits a launch must keep."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from pymoe.device import toolkit
from pymoe.errors import ArgumentError, UnsupportedError, complaint

__all__ = [
    "ARCHS",
    "MAX_THREADS",
    "Limits",
    "arch_of",
    "current_arch",
    "current_multiprocessors",
    "limits",
    "number_of",
]

MAX_THREADS = 1024
"""Threads of one block, on every architecture."""


class Limits(NamedTuple):
    """What one block may ask of an architecture."""

    shared_bytes: int
    """Static and dynamic shared memory of a block with the opt-in, bytes."""
    clusters: bool
    """Whether blocks form clusters and launches may overlap (programmatic dependent launch)."""


ARCHS = {
    "sm_80": Limits(163 * 1024, False),
    "sm_86": Limits(99 * 1024, False),
    "sm_89": Limits(99 * 1024, False),
    "sm_90a": Limits(227 * 1024, True),
    "sm_100a": Limits(227 * 1024, True),
    "sm_120": Limits(99 * 1024, True),
}
"""The architectures that kernels are compiled for.  The suffix "a" gives wgmma and tcgen05, which bind the code to
that very architecture; code without it runs on later minor versions too."""

_OLDEST = 80


def arch_of(major: int, minor: int) -> str:
    """Return the architecture whose code a device of compute capability ``major.minor`` runs.

    Raises
    ------
    UnsupportedError
        The device is older than sm_80, or of a generation that this version knows no code for.
    """
    number = 10 * major + minor
    if number < _OLDEST:
        remedy = "The NumPy path runs on any processor"
        raise UnsupportedError(complaint("pymoe", "the GPU", "be of sm_80 or later", f"sm_{number}", remedy))
    for name in (f"sm_{number}a", f"sm_{number}"):
        if name in ARCHS:
            return name
    portable = [n for n in map(number_of, ARCHS) if n // 10 == major and n < number and f"sm_{n}" in ARCHS]
    if not portable:
        known = ", ".join(ARCHS)
        raise UnsupportedError(complaint("pymoe", "the GPU", f"run code for one of {known}", f"sm_{number}"))
    return f"sm_{max(portable)}"


def current_arch() -> str:
    """Return the architecture of CuPy's current device, or say what is missing to have one."""
    try:
        from cupy.cuda import runtime

        return _device_arch(runtime.getDevice())
    except (ImportError, OSError, RuntimeError):  # no CuPy, no library, CUDA's own errors
        toolkit.device_count()  # says what is missing, where that is the reason
        raise


@lru_cache(maxsize=64)
def _device_arch(device: int) -> str:
    from cupy.cuda import Device

    capability = Device(device).compute_capability
    return arch_of(int(capability[:-1]), int(capability[-1]))


def current_multiprocessors() -> int:
    """Return the number of multiprocessors of CuPy's current device."""
    from cupy.cuda import runtime

    return _device_multiprocessors(runtime.getDevice())


@lru_cache(maxsize=64)
def _device_multiprocessors(device: int) -> int:
    from cupy.cuda import Device

    return int(Device(device).attributes["MultiProcessorCount"])


def limits(arch: str) -> Limits:
    """Return the limits of an architecture by name."""
    if arch not in ARCHS:
        raise ArgumentError(complaint("pymoe", "arch", f"be one of {', '.join(ARCHS)}", repr(arch)))
    return ARCHS[arch]


def number_of(arch: str) -> int:
    """Return 90 for "sm_90a"."""
    return int(arch.removeprefix("sm_").removesuffix("a"))
