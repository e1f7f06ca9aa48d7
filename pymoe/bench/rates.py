"""The two rates of this machine that the floor divides by, measured in the run they belong to."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from pymoe.bench import machine

__all__ = ["best_gemm", "measure_gemm", "measure_read"]

Array = Any

GEMM_SIDE = 2048
"""Of the square matrices: 17 GFLOP, out of the first two caches, long enough to be at full rate."""

WINDOWS = 16
"""Parts that are read in turn: as many as there are calls in the rotation."""

_INT8 = ("int8", "int8_w8a8", "int8_w8a8_tensor", "int8_w8a8_block", "mxfp4")
"""Schemes whose operands int8 holds exactly on both sides."""


def measure_read(nbytes: int, seconds: float) -> float:
    """Return the rate, in bytes a second, at which all threads together read `nbytes` again and again.

    As many bytes as the rotating weights have, window after window like the calls of the rotation: a cache that helps
    the layer helps the floor.  The fastest tenth of the windows counts, not one that had to share its cores.
    """
    from pymoe.bench import _numba

    pieces = max(1, nbytes // (8 * _numba.LINE))
    words = np.arange(pieces * _numba.LINE, dtype=np.int64)
    results = np.empty(pieces, np.int64)
    ends = [pieces * (i + 1) // WINDOWS for i in range(WINDOWS)]
    windows = [(start, end) for start, end in zip([0, *ends], ends, strict=False) if end > start]
    rates: list[float] = []
    started = time.perf_counter()
    while len(rates) < 4 * len(windows) or time.perf_counter() - started < seconds:
        for start, end in windows:
            part = words[start * _numba.LINE : end * _numba.LINE]
            begin = time.perf_counter()
            _numba.read_all(part, results[start:end])
            rates.append(part.nbytes / (time.perf_counter() - begin))
    return float(np.quantile(rates[len(windows) :], 0.9))


def measure_gemm(side: int, seconds: float, threads: int) -> dict[str, dict[str, float]]:
    """Return format -> library -> operations a second, of one GEMM of square matrices in each library that is here."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    out = np.empty_like(a)
    flops = 2 * side**3
    with machine.blas_threads(threads):
        rates = {"fp32": {"numpy": flops / _best(lambda: np.matmul(a, b, out=out), seconds)}}
    if importlib.util.find_spec("torch") is not None:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        pairs: dict[str, Callable[[], Any]] = {"fp32": lambda: x @ y}
        x16, y16 = x.bfloat16(), y.bfloat16()
        pairs["bf16"] = lambda: x16 @ y16
        if hasattr(torch, "_int_mm"):  # private, but the only int8 GEMM of PyTorch on the CPU
            x8, y8 = ((t * 30).clamp(-127, 127).to(torch.int8) for t in (x, y))
            pairs["int8"] = lambda: torch._int_mm(x8, y8)
        with torch.inference_mode():
            for name, call in pairs.items():
                rates.setdefault(name, {})["torch"] = flops / _best(call, seconds)
        torch.set_num_threads(before)
    return rates


def best_gemm(rates: dict[str, dict[str, float]], scheme: str) -> tuple[float, str]:
    """Return the fastest measured GEMM whose format holds the operands of `scheme` exactly, and its name."""
    formats = ("fp32",) if scheme == "fp32" else ("int8", "bf16", "fp32") if scheme in _INT8 else ("bf16", "fp32")
    return max((rate, f"{library} {name}") for name in formats for library, rate in rates.get(name, {}).items())


def _best(call: Callable[[], Any], seconds: float) -> float:
    """Return the least seconds of a call, over at least five after two to warm up."""
    call()
    call()
    least, started, count = float("inf"), time.perf_counter(), 0
    while count < 5 or time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - begin)
        count += 1
    return least
