"""Who sends how many rows to whom: counts from ids and owners, exact, and routings to count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pymoe import checks
from pymoe.device.arrays import as_numpy
from pymoe.errors import ArgumentError, ShapeError, complaint

Array = Any

ROUTES = ("expert", "rank", "node", "all")
"""How tokens travel: a row for each slot; one for each rank that owns one of its experts; one for each node of such
ranks and from there one for each rank; one for every rank."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one MoE layer.

    Attributes
    ----------
    name : str
    K, I : int
        Hidden width; width after the (gated) activation.
    E, topk : int
    groups, topk_group : int
        Groups of experts, and how many of them a token may choose from.
    """

    name: str
    K: int
    I: int
    E: int
    topk: int
    groups: int = 1
    topk_group: int = 1


class Traffic(NamedTuple):
    """Rows that a routing sends from rank to rank.

    Attributes
    ----------
    legs : tuple of ndarray, (R, R), int64
        One a hop: rows from each rank (first axis) to each other; the diagonal stays where it is.
    rows : ndarray, (R, most), int64
        Rows that each expert of each rank computes; 0 fills up.
    tokens : ndarray, (R,), int64
    node_size : int
    """

    legs: tuple[Array, ...]
    rows: Array
    tokens: Array
    node_size: int

    def back(self) -> Traffic:
        """Return the way back: every row returns along the way that it came."""
        return self._replace(legs=tuple(leg.T for leg in reversed(self.legs)))


def zipf(E: int, exponent: float = 1.0, seed: int = 0) -> Array:
    """Return (E,) popularities ``1 / rank**exponent`` in a random order; exponent 0 is uniform."""
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.permutation(1.0 / np.arange(1, E + 1) ** exponent)


def draw_routing(shape: ModelShape, M: int, popularity: Array | None = None, seed: int = 0) -> Array:
    """Draw the experts of M tokens, (M, topk) int32, different ones in a row.

    Parameters
    ----------
    shape : ModelShape
    M : int
    popularity : ndarray, (E,), above 0, optional
        How likely each expert is, relative to the others; default equal.
    seed : int

    Notes
    -----
    The largest of ``log(popularity) + Gumbel noise``; with groups, among the `topk_group` groups whose two largest sum
    to most, as DeepSeek-V3's router chooses them.
    """
    call = "draw_routing"
    M = checks.integer(call, "M", M, 0)
    if shape.E % shape.groups or shape.topk > shape.E // shape.groups * shape.topk_group:
        rule = "divide its experts into groups of which topk_group hold topk"
        raise ArgumentError(complaint(call, "shape", rule, shape))
    chances = np.ones(shape.E) if popularity is None else as_numpy(call, "popularity", popularity).astype(np.float64)
    checks.shape(call, "popularity", chances, (shape.E,))
    if not (np.isfinite(chances) & (chances > 0)).all():
        raise ArgumentError(complaint(call, "popularity", "be finite and above 0", np.min(chances)))
    rng = np.random.Generator(np.random.Philox(seed))
    keys = np.log(chances) + rng.gumbel(size=(M, shape.E))
    if shape.groups > 1:
        by_group = keys.reshape(M, shape.groups, -1)
        best = -np.sort(-by_group, axis=2)[:, :, :2].sum(axis=2)
        rank = np.argsort(np.argsort(-best, axis=1, kind="stable"), axis=1, kind="stable")
        keys = np.where((rank < shape.topk_group)[:, :, None], by_group, -np.inf).reshape(M, shape.E)
    return np.argsort(-keys, axis=1, kind="stable")[:, : shape.topk].astype(np.int32)


def count_rows(ids: Sequence[Array], owner: Array, *, route: str = "rank", node_size: int = 1) -> Traffic:
    """Count the rows that travel when rank r brings tokens with experts ``ids[r]``.

    Parameters
    ----------
    ids : sequence of ndarray, (M_r, topk), integer
        One a rank; ids outside 0..E-1 go nowhere.
    owner : ndarray, (E,), integer
        Rank of each expert, in 0..R-1.  With redundant experts: of each physical one, and physical ids.
    route : str
        One of `ROUTES`.  By "node", a row crosses the network to the rank with the sender's number in its node.
    node_size : int
        Ranks of a node; R is a multiple of it.

    Examples
    --------
    >>> from pymoe.ep_model import count_rows
    >>> ids = [np.array([[0, 1]]), np.array([[2, 3], [0, 3]])]  # two experts on each of two ranks
    >>> count_rows(ids, np.array([0, 0, 1, 1])).legs[0].tolist()
    [[1, 0], [1, 2]]
    >>> count_rows(ids, np.array([0, 0, 1, 1]), route="expert").legs[0].tolist()
    [[2, 0], [1, 3]]
    """
    call = "count_rows"
    R, node_size = len(ids), checks.integer(call, "node_size", node_size, 1)
    if route not in ROUTES:
        raise ArgumentError(complaint(call, "route", f"be one of {', '.join(ROUTES)}", repr(route)))
    if R % node_size:
        raise ArgumentError(complaint(call, "node_size", f"divide the {R} ranks", node_size))
    owner = as_numpy(call, "owner", owner)
    checks.shape(call, "owner", owner, (None,))
    if owner.size and (owner.dtype.kind not in "iu" or owner.min() < 0 or owner.max() >= R):
        raise ArgumentError(complaint(call, "owner", f"hold ranks in 0..{R - 1}", owner[:8]))
    owner = owner.astype(np.int64)
    legs = np.zeros((2 if route == "node" else 1, R, R), np.int64)
    computed = np.zeros(len(owner), np.int64)
    for source, chosen in enumerate(ids):
        chosen = as_numpy(call, "ids", chosen)
        if chosen.ndim != 2 or chosen.dtype.kind not in "iu":
            raise ShapeError(complaint(call, "ids", "hold integer arrays (M, topk)", f"{chosen.dtype} {chosen.shape}"))
        token, slot = np.nonzero((chosen >= 0) & (chosen < len(owner)))
        expert = chosen[token, slot].astype(np.int64)
        computed += np.bincount(expert, minlength=len(owner))
        if route == "all":
            legs[0, source] = len(chosen)
        else:
            _count_source(legs, source, token, owner[expert], route, node_size)
    rows = np.zeros((R, max(1, int(np.max(np.bincount(owner, minlength=R), initial=0)))), np.int64)
    for rank in range(R):
        mine = computed[owner == rank]
        rows[rank, : len(mine)] = mine
    return Traffic(tuple(legs), rows, np.array([len(chosen) for chosen in ids]), node_size)


def _count_source(legs: Array, source: int, token: Array, target: Array, route: str, node_size: int) -> None:
    """Add the rows of one rank's tokens, slot by slot ``token[i]`` to rank ``target[i]``."""
    R = legs.shape[1]
    if route == "expert":
        legs[0, source] += np.bincount(target, minlength=R)
        return
    unique = np.unique(token * R + target)
    token, target = unique // R, unique % R
    if route == "rank":
        legs[0, source] += np.bincount(target, minlength=R)
        return
    nodes = R // node_size
    node = np.unique(token * nodes + target // node_size) % nodes
    home = source // node_size
    # Own node: nothing crosses the network, and the sender itself forwards.
    gate = np.where(np.arange(nodes) == home, source, np.arange(nodes) * node_size + source % node_size)
    legs[0, source, gate] += np.bincount(node, minlength=nodes)
    np.add.at(legs[1], (gate[target // node_size], target), 1)
