"""Rows and runs made by hand."""

from __future__ import annotations

from pymoe.bench.store import Row

RUN = {
    "device": {"processor": "P", "cores": 2, "features": ["avx2"]},
    "threads": 2,
    "load_before": 0.0,
    "versions": {"pymoe": "0", "python": "3.11", "blas": "b 1", "numpy": "2"},
    "commit": "0123456789abcdef",
    "sources": "s",
    "seed": 0,
    "pace": {"rounds": 1},
    "commands": ["python -m pymoe bench"],
    "rates": {"read": {"1000000": 2e10}, "gemm": {"fp32": {"numpy": 1e11}}},
}


def row(contender="ours", scheme="fp32", tokens=16, ms=10.0, **changes):
    """Return a row; its floor is half of its time."""
    fields = {
        "run": "r1", "shape": (32, 4, 1024, 512), "tokens": tokens, "contender": contender, "scheme": scheme,
        "variant": "", "threads": 2, "median_s": ms / 1e3, "min_s": ms / 1.25e3, "calls": 9, "spread": 1.1,
        "floor_s": ms / 2e3, "bound": "bytes", "gemm": "numpy fp32", "bytes": 1e6, "flops": 1e9, "error": 1e-7,
        "limit": 1e-6,
    }  # fmt: skip
    return Row(**(fields | changes))
