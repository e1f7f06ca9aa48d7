"""O1: problems whose answer is a gather, exact in every format, so that a whole layer is checked bit for bit.

Tokens are ternary with x[:, 0] = 1.  Every gate row reads 32 times column 0, where act(32) = 32 exactly; every up row
reads one column, plus or minus; every row of w2 reads one column of h.  Router weights are 1, 1/2, 1/4.  Then
``y[m, c] = sum_j weight_j * 32 * sign * x[m, column]``: no sum of a GEMM has two terms, every number on the way is
exact in bfloat16, and the oracle has no arithmetic in common with a GEMM.
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
ACTIVATIONS = {"silu": 32.0, "gelu": 32.0, "gelu_tanh": 32.0}
"""Value of act(32) in float32, exactly."""


@dataclasses.dataclass
class Selection:
    """A problem and its answer."""

    x: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    topk_weights: np.ndarray
    topk_ids: np.ndarray
    expert_map: np.ndarray | None
    activation: str
    gate_value: float
    up_column: np.ndarray
    up_sign: np.ndarray
    down_column: np.ndarray
    down_sign: np.ndarray

    def expected(self, rows=None) -> np.ndarray:
        """Return the answer for `rows` (all by default), (rows, K) in the hidden dtype; a gather."""
        rows = np.arange(len(self.x)) if rows is None else np.asarray(rows)
        x = self.x[rows].astype(np.float64)
        y = np.zeros((len(rows), self.w2.shape[1]))
        number = len(self.w1) if self.expert_map is None else len(self.expert_map)
        for j in range(self.topk_ids.shape[1]):
            ids = self.topk_ids[rows, j].astype(np.int64)
            legal = (ids >= 0) & (ids < number)
            local = np.where(legal, ids, 0)
            if self.expert_map is not None and number:
                local = self.expert_map[local]
                legal &= local >= 0
            for e in np.unique(local[legal]):
                mine = np.flatnonzero(legal & (local == e))
                columns = self.up_column[e][self.down_column[e]]
                sign = self.up_sign[e][self.down_column[e]] * self.down_sign[e]
                h = self.gate_value * x[mine][:, columns] * sign
                y[mine] += self.topk_weights[rows[mine], j].astype(np.float64)[:, None] * h
        return y.astype(self.x.dtype)

    def arguments(self) -> dict:
        """Return the keyword arguments of `fused_experts`, unquantized."""
        return {
            "hidden_states": self.x,
            "w1": self.w1,
            "w2": self.w2,
            "topk_weights": self.topk_weights,
            "topk_ids": self.topk_ids,
            "activation": self.activation,
            "expert_map": self.expert_map,
        }


def selection(
    M, K, width, E, topk, *, dtype=np.float32, activation="silu", seed=0, dead=0.1, mapped=False, ids_dtype=np.int64
) -> Selection:
    """Return a problem of M tokens; `dead` is the share of slots with an id that no expert serves."""
    rng = np.random.default_rng([seed, M, K, width, E, topk])
    x = rng.integers(-1, 2, (M, K)).astype(np.float64)
    x[:, 0] = 1
    E_local = max(1, E // 2) if mapped else E
    up_column, up_sign = rng.integers(0, K, (E_local, width)), rng.choice([-1, 1], (E_local, width))
    down_column, down_sign = rng.integers(0, width, (E_local, K)), rng.choice([-1, 1], (E_local, K))
    gate = np.zeros((E_local, width, K))
    gate[:, :, 0] = 32
    up = np.zeros((E_local, width, K))
    np.put_along_axis(up, up_column[:, :, None], up_sign[:, :, None].astype(float), axis=2)
    w2 = np.zeros((E_local, K, width))
    np.put_along_axis(w2, down_column[:, :, None], down_sign[:, :, None].astype(float), axis=2)
    w1 = np.concatenate([gate, up], axis=1)
    ids = rng.integers(0, E, (M, topk))
    if dead:
        odd = rng.choice([-1, -1, E, -5, 2**31 - 1], (M, topk))
        ids = np.where(rng.random((M, topk)) < dead, odd, ids)
    mapping = None
    if mapped:
        mapping = np.full(E, -1, np.int32)
        mapping[rng.permutation(E)[:E_local]] = np.arange(E_local)
    weights = rng.choice([1.0, 0.5, 0.25], (M, topk)).astype(np.float32)
    return Selection(
        x.astype(dtype), w1.astype(dtype), w2.astype(dtype), weights, ids.astype(ids_dtype), mapping, activation,
        ACTIVATIONS[activation], up_column, up_sign, down_column, down_sign,
    )  # fmt: skip
