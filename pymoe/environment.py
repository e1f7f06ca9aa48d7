"""The one reader of ``PYMOE_*`` variables, and the process-wide checked mode.

Every variable is read when it is needed, so that a test or a script may set it after the import.  ``docs/environment``
lists them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pymoe.errors import ArgumentError, complaint

__all__ = [
    "cache_dir",
    "checked",
    "cpu_kernels",
    "for_ranks",
    "is_checked",
    "is_launched",
    "logger",
    "node_size",
    "num_threads",
    "show_debug",
    "timeout_s",
    "transport",
]

logger = logging.getLogger("pymoe")
logger.addHandler(logging.NullHandler())

_checked: bool | None = None


def checked(flag: bool = True) -> bool:
    """Switch the checked mode, in which an expert id other than -1 outside the range raises; return the old setting.

    Without a call the mode is on if ``PYMOE_CHECK`` is 1.
    """
    global _checked
    before = is_checked()
    _checked = bool(flag)
    return before


def is_checked() -> bool:
    """Return whether the checked mode is on."""
    return _flag("PYMOE_CHECK") if _checked is None else _checked


def cache_dir() -> Path:
    """Return the folder of compiled kernels: ``PYMOE_CACHE_DIR``, else pymoe's in the user's cache folder.

    Absolute, but for a user without a home folder: then "~/.cache/pymoe" as it stands, which is no place to write to.
    """
    if os.environ.get("PYMOE_CACHE_DIR"):
        return Path(os.environ["PYMOE_CACHE_DIR"]).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules have relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~"), ".cache")) / "pymoe"


def cpu_kernels() -> str:
    """Return the best instructions that CPU kernels may use, "amx", "avx512" or "plain": ``PYMOE_CPU_KERNELS``."""
    text = os.environ.get("PYMOE_CPU_KERNELS", "") or "amx"
    if text not in ("amx", "avx512", "plain"):
        raise ArgumentError(complaint("pymoe", "PYMOE_CPU_KERNELS", "be amx, avx512 or plain", repr(text)))
    return text


def num_threads() -> int:
    """Return how many CPU threads a call may use: ``PYMOE_NUM_THREADS``, else the cores this process may run on."""
    text = os.environ.get("PYMOE_NUM_THREADS", "")
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    value = _number("PYMOE_NUM_THREADS", text)
    if value < 1 or value != int(value):
        raise ArgumentError(complaint("pymoe", "PYMOE_NUM_THREADS", "be a positive whole number", repr(text)))
    return int(value)


def timeout_s() -> float:
    """Return the deadline of every wait between ranks in seconds: ``PYMOE_TIMEOUT_S``, default 60."""
    text = os.environ.get("PYMOE_TIMEOUT_S", "")
    value = _number("PYMOE_TIMEOUT_S", text) if text else 60.0
    if not value > 0:
        raise ArgumentError(complaint("pymoe", "PYMOE_TIMEOUT_S", "be above 0 seconds", repr(text)))
    return value


def transport() -> str:
    """Return the transport forced by ``PYMOE_TRANSPORT``, or "auto"."""
    return os.environ.get("PYMOE_TRANSPORT", "") or "auto"


def node_size() -> int | None:
    """Return how many ranks ``PYMOE_NODE_SIZE`` puts on a node, or None to find out."""
    text = os.environ.get("PYMOE_NODE_SIZE", "")
    if not text:
        return None
    value = _number("PYMOE_NODE_SIZE", text)
    if value < 1 or value != int(value):
        raise ArgumentError(complaint("pymoe", "PYMOE_NODE_SIZE", "be a positive whole number", repr(text)))
    return int(value)


def is_launched() -> bool:
    """Return whether an MPI launcher started this process."""
    return any(name in os.environ for name in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"))


def for_ranks(ranks: int) -> dict[str, str]:
    """Return the environment in which to launch `ranks` ranks on this machine; what is set already stays.

    Open MPI refuses root and more ranks than cores unless told otherwise; other MPIs read none of these.  Each rank
    gets its share of the cores.
    """
    settings = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_osc": "^ucx",
        "PYMOE_NUM_THREADS": str(max(1, num_threads() // ranks)),
    }
    return settings | os.environ


def show_debug() -> bool:
    """Return whether ``PYMOE_LOG=debug`` asks for tracebacks and debug lines."""
    return os.environ.get("PYMOE_LOG", "").lower() == "debug"


def _flag(name: str) -> bool:
    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise ArgumentError(complaint("pymoe", name, "be 0 or 1", repr(text)))
    return text == "1"


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(complaint("pymoe", name, "be a number", repr(text))) from None
