"""Which of the CPU's instructions kernels may use: found once, limited by ``PYMOE_CPU_KERNELS``."""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import lru_cache

from pymoe import environment

__all__ = ["best_dot"]

_LEVELS = {"amx": ("tiles", "vectors"), "avx512": ("vectors",), "plain": ()}
_FEATURES = {
    ("tiles", "bfloat16"): ("amx-tile", "amx-bf16", "avx512f", "avx512bw"),
    ("tiles", "int8"): ("amx-tile", "amx-int8", "avx512f", "avx512bw"),
    ("vectors", "bfloat16"): ("avx512bf16", "avx512bw"),
    ("vectors", "int8"): ("avx512vnni", "avx512bw"),
}

_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18


def best_dot(values: str) -> str | None:
    """Return the instructions for sums of products of `values`, "bfloat16" or "int8".

    Returns
    -------
    "tiles", "vectors" or None
        AMX; AVX512_BF16 or AVX512_VNNI; neither, so that float32 it is.  Fixed within a process but for
        ``PYMOE_CPU_KERNELS``.
    """
    for form in _LEVELS[environment.cpu_kernels()]:
        if _is_available(form, values):
            return form
    return None


@lru_cache(maxsize=4)
def _is_available(form: str, values: str) -> bool:
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features()
    if not all(features.get(name, False) for name in _FEATURES[form, values]):
        return False
    return form != "tiles" or _may_use_tiles()


@lru_cache(maxsize=1)
def _may_use_tiles() -> bool:
    """Ask Linux for the tiles' 8 KiB of state in every thread of this process, which it gives on request only."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    refused = ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA)
    if refused:
        environment.logger.warning("AMX is there, but the system refuses it (error %d)", ctypes.get_errno())
    return not refused
