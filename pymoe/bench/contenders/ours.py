"""pymoe's layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pymoe import environment
from pymoe.bench.cases import Shape, Weights, hidden_dtype
from pymoe.bench.contenders.contender import Contender
from pymoe.bench.reference import Quantized
from pymoe.layer import MoELayer

Array = Any


class Ours(Contender):
    """`MoELayer` with its gate, tokens in and out in the scheme's hidden dtype."""

    name = "ours"

    def __init__(self, shape: Shape, scheme: str, sets: Sequence[Weights], quantized: Sequence[Quantized]) -> None:
        self.scheme, self._dtype = scheme, hidden_dtype(scheme)
        self.threads = environment.num_threads()
        self._layers = [
            MoELayer(q.w1, q.w2, topk=shape.topk, gate=w.cast(self._dtype).gate, quant_config=q.quant_config)
            for w, q in zip(sets, quantized, strict=True)
        ]

    def bind(self, number: int, x: Array, variant: str = "") -> Callable[[], Any]:
        layer, tokens = self._layers[number], x.astype(self._dtype)
        return lambda: layer(tokens)

    def as_float32(self, result: Any) -> Array:
        return result.astype(np.float32)
