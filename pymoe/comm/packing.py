"""The search behind a plan: replicas of items, packs of equal room, and exchanges between packs.

Items are experts and packs are ranks, or groups of experts and nodes.  Nothing here is random, and sums are taken in a
fixed order: the same loads give the same packs everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["pack", "recount", "refine", "replicate"]

Array = Any
_MARGIN = 1e-12


def replicate(loads: Array, num_physical: int, most: int) -> Array:
    """Return how many slots each expert gets, (X, L) int64, at least 1 and at most `most`, in all `num_physical`.

    One more at a time for the expert with the greatest load a slot; among equals for the one with fewest slots, then
    for the lowest id.  No other counts have a smaller greatest load a slot.

    Parameters
    ----------
    loads : ndarray, (X, L), float64
    num_physical : int
        In L..L * most.
    most : int
    """
    X, L = loads.shape
    counts = np.ones((X, L), np.int64)
    rows = np.arange(X)
    for _ in range(num_physical - L):
        share = np.where(counts < most, loads / counts, -1.0)
        heaviest = share == share.max(axis=1, keepdims=True)
        chosen = np.where(heaviest, counts, np.iinfo(np.int64).max).argmin(axis=1)
        counts[rows, chosen] += 1
    return counts


def pack(loads: Array, counts: Array, packs: int) -> Array:
    """Return (X, packs, room): the items in each of `packs` packs of equal room, ascending.

    Parameters
    ----------
    loads : ndarray, (X, n), float64
        Load of each item, all replicas together.
    counts : ndarray, (X, n), int64
        Replicas of each item, at most `packs`; a pack takes an item once.
    """
    share = loads / counts
    X, n = share.shape
    room = int(counts[0].sum()) // packs if X else 1
    rows = np.arange(X)
    order = np.argsort(-share, axis=1, kind="stable")
    each = np.take_along_axis(counts, order, axis=1)
    items = np.repeat(order.reshape(-1), each.reshape(-1)).reshape(X, packs * room)
    total, filled = np.zeros((X, packs)), np.zeros((X, packs), np.int64)
    holds = np.zeros((X, packs, n), bool)
    chosen = np.empty((X, packs, room), np.int64)
    for item in items.T:
        full, twice = filled == room, holds[rows, :, item]
        # Where every pack with room holds the item already, `refine` puts it right.
        stuck = (full | twice).all(axis=1, keepdims=True)
        lightest = np.where(full | (twice & ~stuck), np.inf, total).argmin(axis=1)
        chosen[rows, lightest, filled[rows, lightest]] = item
        total[rows, lightest] += share[rows, item]
        filled[rows, lightest] += 1
        holds[rows, lightest, item] = True
    for row in range(X):
        refine(chosen[row], share[row])
    return np.sort(chosen, axis=2)


def recount(packs: Array, counts: Array, loads: Array) -> None:
    """Give each item its number of replicas, in place: surplus ones leave the heaviest packs, new ones enter there."""
    share = loads / counts
    total = share[packs].sum(axis=1)
    due = counts - np.bincount(packs.reshape(-1), minlength=len(counts))
    gaps = []
    for item in np.flatnonzero(due < 0):
        for _ in range(-due[item]):
            holders = np.argwhere(packs == item)
            pack, slot = holders[total[holders[:, 0]].argmax()]
            packs[pack, slot] = -1
            total[pack] -= share[item]
            gaps.append((pack, slot))
    for item in sorted(np.repeat(np.arange(len(due)), np.maximum(due, 0)), key=lambda item: -share[item]):
        best = min(gaps, key=lambda gap: (item in packs[gap[0]], total[gap[0]], gap))
        gaps.remove(best)
        packs[best] = item
        total[best[0]] += share[item]


def refine(packs: Array, share: Array, slack: float = 0.0) -> None:
    """Exchange items between packs (packs, room), in place, until the heaviest is within `slack` of the mean.

    First what a pack holds twice is exchanged, then items of the heaviest pack, while that lightens it.

    Parameters
    ----------
    packs : ndarray, (packs, room), int64
    share : ndarray, (n,), float64
        Load of one replica of each item.
    slack : float
    """
    for _ in range(8 * packs.size):
        total = share[packs].sum(axis=1)
        held = np.zeros((len(packs), len(share)), np.int64)
        np.add.at(held, (np.arange(len(packs))[:, None], packs), 1)
        twice = np.argwhere(held > 1)
        heavy = int(twice[0, 0]) if len(twice) else int(total.argmax())
        if not len(twice) and total[heavy] <= (1 + slack) * total.mean():
            return
        if not _exchange(packs, share, total, held, heavy):
            return


def _exchange(packs: Array, share: Array, total: Array, held: Array, heavy: int) -> bool:
    """Exchange the items of `heavy` and another pack that lighten it most, or that part what it holds twice."""
    load, mine = share[packs], packs[heavy]
    # Axes: the item that leaves `heavy`, the other pack, the item that comes from there.
    less = share[mine][:, None, None] - load
    worst = np.maximum(total[heavy] - less, total[None, :, None] + less)
    gained = (held[heavy, packs] > 0)[None] + (held[:, mine].T > 0)[:, :, None].astype(np.int64)
    shed = (held[heavy, mine] > 1)[:, None, None] + np.take_along_axis(held > 1, packs, axis=1)[None].astype(np.int64)
    # The margin keeps rounding from going round in circles.
    lighter = (gained == shed) & (worst < total[heavy] * (1 - _MARGIN))
    legal = gained < shed if (held > 1).any() else lighter
    legal[:, heavy] = False
    if not legal.any():
        return False
    i, other, j = np.unravel_index(np.argmin(np.where(legal, worst, np.inf)), worst.shape)
    packs[heavy, i], packs[other, j] = packs[other, j], packs[heavy, i]
    return True
