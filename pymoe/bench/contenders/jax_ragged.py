"""JAX: one jitted function around two ``jax.lax.ragged_dot``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pymoe.bench.cases import Shape, Weights, hidden_dtype
from pymoe.bench.contenders.contender import Contender

Array = Any


class JaxRagged(Contender):
    """The layer in JAX, compiled by XLA; weights lie as `ragged_dot` wants them, (E, k, n)."""

    name = "jax"

    def __init__(self, shape: Shape, scheme: str, sets: Sequence[Weights], threads: int) -> None:
        import jax

        self.scheme, self._jax, self._shape, self.threads = scheme, jax, shape, threads
        self._dtype = hidden_dtype(scheme)
        self._sets = [self._arrays(w.cast(self._dtype)) for w in sets]
        self._layer = jax.jit(self._moe)

    def _arrays(self, weights: Weights) -> tuple[Any, ...]:
        turned = (weights.gate, weights.w1.transpose(0, 2, 1), weights.w2.transpose(0, 2, 1))
        return tuple(self._jax.numpy.asarray(np.ascontiguousarray(w)) for w in turned)

    def _moe(self, x: Any, gate: Any, w1: Any, w2: Any) -> Any:
        jax, jnp, topk = self._jax, self._jax.numpy, self._shape.topk
        logits = jnp.dot(x, gate.T, preferred_element_type=jnp.float32)
        chosen, ids = jax.lax.top_k(logits, topk)
        order = jnp.argsort(ids.reshape(-1))
        sizes = jnp.bincount(ids.reshape(-1), length=self._shape.E)
        z = jax.lax.ragged_dot(x[order // topk], w1, sizes, preferred_element_type=jnp.float32)
        gates, up = jnp.split(z, 2, axis=-1)
        h = (jax.nn.silu(gates) * up).astype(x.dtype)
        y = jax.lax.ragged_dot(h, w2, sizes, preferred_element_type=jnp.float32)
        by_slot = y[jnp.argsort(order)].reshape(-1, topk, self._shape.K)
        return jnp.einsum("mj,mjk->mk", jax.nn.softmax(chosen, axis=-1), by_slot).astype(x.dtype)

    def bind(self, number: int, x: Array, variant: str = "") -> Callable[[], Any]:
        tokens, weights = self._jax.numpy.asarray(x.astype(self._dtype)), self._sets[number]
        return lambda: self._layer(tokens, *weights).block_until_ready()

    def as_float32(self, result: Any) -> Array:
        return np.asarray(result).astype(np.float32)
