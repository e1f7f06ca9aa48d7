"""Programs run by NumPy on float32 arrays, and functions from text."""

from __future__ import annotations

import linecache

import numpy as np

from pymoe.formula import read_function
from pymoe.ops.activation._numpy import _evaluator


def run(fn, *arrays):
    """Return what the program of a function gives for float32 arrays."""
    program = read_function("call", fn, len(arrays))
    with np.errstate(all="ignore"):
        return np.broadcast_to(_evaluator(program)(*arrays), arrays[0].shape)


def same(a, b):
    """Return whether two float32 arrays have the same bits, any NaN being as good as another."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(
        np.where(np.isnan(a), 0, a.view(np.uint32)), np.where(np.isnan(b), 0, b.view(np.uint32))
    )


def defined(text, name="f", **names):
    """Return the function `name` of a source text that Python finds again, as it finds that of a notebook."""
    file = f"<cell {abs(hash(text))}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    exec(compile(text, file, "exec"), names)
    return names[name]


EDGES = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 0.5, -0.5, 2, 3, -3, 1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38,
     3.4028235e38, -3.4028235e38, 88.72283, 88.7229, 89.5, -87.336, -103.97, -104.1, 2.0**24, 2.0**23 - 0.5, 0.6, 4],
    np.float32,
)  # fmt: skip


def sample(size=20_000, seed=0):
    """Return float32 numbers of any bits, near 0, near 1, of everyday size, and the edges."""
    rng = np.random.default_rng(seed)
    anything = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
    everyday = [rng.normal(0, scale, size) for scale in (0.01, 1, 20)] + [1 + rng.normal(0, 0.1, size)]
    return np.concatenate([EDGES, anything, *(x.astype(np.float32) for x in everyday)])
