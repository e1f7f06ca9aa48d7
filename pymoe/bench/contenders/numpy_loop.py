"""What one writes without a library: tokens sorted by expert, a float32 BLAS call for each matrix of each expert."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pymoe.bench import machine
from pymoe.bench.cases import Shape, Weights
from pymoe.bench.contenders.contender import Contender

Array = Any


class NumpyLoop(Contender):
    """The loop in NumPy, float32."""

    name, scheme = "numpy", "fp32"

    def __init__(self, shape: Shape, sets: Sequence[Weights], threads: int) -> None:
        self._topk, self._sets = shape.topk, sets
        self._held = contextlib.ExitStack()
        self.threads = self._held.enter_context(machine.blas_threads(threads))

    def bind(self, number: int, x: Array, variant: str = "") -> Callable[[], Any]:
        weights = self._sets[number]
        return lambda: moe(x, weights, self._topk)

    def as_float32(self, result: Any) -> Array:
        return result

    def close(self) -> None:
        self._held.close()


def moe(x: Array, weights: Weights, topk: int) -> Array:
    """Return the layer's output for tokens (M, K) float32."""
    M, K = x.shape
    logits = x @ weights.gate.T
    ids = np.argpartition(logits, -topk, axis=1)[:, -topk:]
    chosen = np.take_along_axis(logits, ids, axis=1)
    scale = np.exp(chosen - chosen.max(axis=1, keepdims=True))
    scale /= scale.sum(axis=1, keepdims=True)
    order = np.argsort(ids, axis=None, kind="stable")
    rows = x[order // topk]
    ends = np.cumsum(np.bincount(ids.reshape(-1), minlength=len(weights.gate)))
    y = np.empty((M * topk, K), np.float32)
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            gate, up = np.split(rows[start:end] @ weights.w1[e].T, 2, axis=1)
            np.matmul(gate / (1 + np.exp(-gate)) * up, weights.w2[e].T, out=y[start:end])
            start = end
    by_slot = np.empty_like(y)
    by_slot[order] = y
    return np.matmul(scale[:, None], by_slot.reshape(M, topk, K))[:, 0]
