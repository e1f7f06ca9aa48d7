"""Names of the CUDA runtime and driver functions that this process calls, as CUPTI reports them."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import ctypes.util
import glob
import re
import sys
from collections.abc import Iterator, Mapping

DRIVER_API, RUNTIME_API = 1, 2
"""`CUPTI_CB_DOMAIN_DRIVER_API` and `CUPTI_CB_DOMAIN_RUNTIME_API`."""
WAITS = re.compile(r"Synchronize|Query|Memcpy|Malloc|MemAlloc|Free")
"""What waits for the device, may wait for it, or asks whether it is done; copies to the host are among the copies."""


class _CallbackData(ctypes.Structure):
    """The first fields of `CUpti_CallbackData`; site 0 is the entry of a function."""

    _fields_ = [("site", ctypes.c_int), ("name", ctypes.c_char_p)]


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(_CallbackData))


@contextlib.contextmanager
def recorded() -> Iterator[collections.Counter[str]]:
    """Count the functions that the body calls, by name; the counter is complete after it."""
    counter: collections.Counter[str] = collections.Counter()
    cupti = ctypes.CDLL(_library())
    function = _Callback(lambda _, __, ___, data: _count(counter, data.contents))
    subscriber = ctypes.c_void_p()
    _must_work(cupti.cuptiSubscribe(ctypes.byref(subscriber), function, None), "cuptiSubscribe")
    try:
        for domain in (DRIVER_API, RUNTIME_API):
            _must_work(cupti.cuptiEnableDomain(1, subscriber, domain), "cuptiEnableDomain")
        yield counter
    finally:
        _must_work(cupti.cuptiUnsubscribe(subscriber), "cuptiUnsubscribe")


def waits(counter: Mapping[str, float]) -> dict[str, float]:
    """Return the functions of `counter` that wait for the device or may do so."""
    return {name: count for name, count in counter.items() if WAITS.search(name)}


def _count(counter: collections.Counter[str], data: _CallbackData) -> None:
    if data.site == 0:
        counter[data.name.decode()] += 1


def _must_work(status: int, call: str) -> None:
    if status:
        raise SystemExit(f"{call} failed with CUptiResult {status}")


def _library() -> str:
    """Return the path of CUPTI's library: of a package, of the toolkit, or the linker's."""
    toolkit = "/usr/local/cuda*"
    for folder in (*(f"{place}/nvidia/*/lib" for place in sys.path), f"{toolkit}/lib*", f"{toolkit}/extras/CUPTI/lib*"):
        for path in sorted(glob.glob(f"{folder}/libcupti.so*")):
            return path
    found = ctypes.util.find_library("cupti")
    if found is None:
        raise SystemExit("libcupti is not here: pip install nvidia-cuda-cupti, or the CUDA toolkit")
    return found
