"""Routings without a router: load for benchmarks and tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.device.arrays import as_numpy
from pymoe.errors import ArgumentError, complaint

__all__ = ["simulate_routing"]

Array = Any

DISTRIBUTIONS = ("uniform", "normal", "zipf", "balanced", "single")
_ROWS = 4096


def simulate_routing(
    M: int, E: int, topk: int, distribution: str | Array = "uniform", seed: int = 0
) -> tuple[Array, Array]:
    """Draw a routing of M tokens to `topk` of E experts.

    Parameters
    ----------
    M, E, topk : int
        M at least 0, E at least 1, topk in 1..E.
    distribution : str, or ndarray (E,), float, finite and at least 0
        How likely each expert is: "uniform", "normal" (a bell over the ids, deviation E / 6), "zipf" (1 / (id + 1)), or
        an array of at least `topk` probabilities above 0, of any sum.  "balanced" gives token m the experts
        ``(m * topk + j) % E``, "single" gives every token the experts 0..topk-1.
    seed : int

    Returns
    -------
    topk_weights : ndarray, (M, topk), float32
        Positive, each row summing to 1; descending for the drawn distributions.
    topk_ids : ndarray, (M, topk), int32
        Different experts in a row.

    Raises
    ------
    DTypeError, ShapeError, ArgumentError

    Notes
    -----
    A row of fewer tokens is a row of more: row m depends on m, E, topk, the distribution and the seed alone.  Experts
    are drawn without replacement, as the largest of ``log(probability) + Gumbel noise``.

    Source
    ------
    vLLM 0.33.0 `RoutingSimulatorRouter`.  Differs: no expert twice in a row.

    Examples
    --------
    >>> from pymoe.ops.route import simulate_routing
    >>> weights, ids = simulate_routing(3, 8, 2, "balanced")
    >>> ids.tolist()
    [[0, 1], [2, 3], [4, 5]]
    """
    call = "simulate_routing"
    M, E, topk = (checks.integer(call, n, v, least) for n, v, least in (("M", M, 0), ("E", E, 1), ("topk", topk, 1)))
    seed = checks.integer(call, "seed", seed, 0)
    if topk > E:
        raise ArgumentError(complaint(call, "topk", "be in 1..E", f"{topk} with E = {E}"))
    if isinstance(distribution, str) and distribution not in DISTRIBUTIONS:
        rule = f"be one of {', '.join(DISTRIBUTIONS)}"
        raise ArgumentError(complaint(call, "distribution", rule, repr(distribution)))
    if isinstance(distribution, str) and distribution in ("balanced", "single"):
        step = topk if distribution == "balanced" else 0
        ids = (np.arange(M)[:, None] * step + np.arange(topk)) % E
        return np.full((M, topk), 1 / topk, np.float32), ids.astype(np.int32)
    chances = _chances(call, distribution, E, topk)
    random = np.random.Generator(np.random.Philox(seed))
    ids = np.empty((M, topk), np.int32)
    weights = np.empty((M, topk), np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, M, _ROWS):
            rows = slice(start, min(start + _ROWS, M))
            draws = random.random((rows.stop - start, E + topk))
            # 1 - draw is in (0, 1], so no logarithm of 0 appears inside.
            keys = np.log(chances) - np.log(-np.log1p(-np.maximum(draws[:, :E], 2.0**-60)))
            ids[rows] = np.argsort(-keys, axis=1, kind="stable")[:, :topk]
            parts = -np.sort(-(draws[:, E:] + 2.0**-20), axis=1)
            weights[rows] = parts / parts.sum(axis=1, keepdims=True)
    return weights, ids


def _chances(call: str, distribution: str | Array, E: int, topk: int) -> np.ndarray:
    """Return (E,) relative probabilities."""
    experts = np.arange(E)
    if isinstance(distribution, str):
        bell = np.exp(-0.5 * ((experts - (E - 1) / 2) / max(E / 6, 1e-9)) ** 2)
        return {"uniform": np.ones(E), "normal": bell, "zipf": 1.0 / (experts + 1)}[distribution]
    chances = as_numpy(call, "distribution", distribution)
    checks.shape(call, "distribution", chances, (E,))
    checks.float_dtype(call, "distribution", chances)
    chances = chances.astype(np.float64)
    if not np.isfinite(chances).all() or (chances < 0).any():
        wrong = int(np.flatnonzero(~np.isfinite(chances) | (chances < 0))[0])
        raise ArgumentError(complaint(call, "distribution", "be finite and at least 0", chances[wrong]))
    if np.count_nonzero(chances) < topk:
        got = f"{np.count_nonzero(chances)} of them"
        raise ArgumentError(complaint(call, "distribution", f"have at least topk = {topk} entries above 0", got))
    return chances
