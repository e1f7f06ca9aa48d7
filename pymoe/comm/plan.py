"""Which row goes where: pure functions of ids and counts, without communication, so that virtual ranks can run them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pymoe.device.arrays import namespace
from pymoe.errors import CommError, complaint

Array = Any


class Counts(NamedTuple):
    """Rows of one way, as one rank sees it.

    Attributes
    ----------
    send : (R,) int64
        Rows from here to each rank.
    receive : (R,) int64
        Rows from each rank to here.
    start : (R,) int64 or None
        First row of this rank's among all rows that each rank receives; None where the control does not tell.
    most : int or None
        Most rows that one rank receives; None where the control does not tell.
    """

    send: Array
    receive: Array
    start: Array | None = None
    most: int | None = None


def counts_of(matrix: Array, rank: int) -> Counts:
    """Return what `rank` sees of all counts, (R, R) int64: rows from each rank (first axis) to each other."""
    start = matrix[:rank].sum(axis=0)
    return Counts(matrix[rank].copy(), matrix[:, rank].copy(), start, int(matrix.sum(axis=0).max(initial=0)))


class DispatchPlan(NamedTuple):
    """Which tokens travel, and where their rows come back.

    Attributes
    ----------
    token : (n,) int64
        Token of each row sent, by destination, tokens ascending.
    counts : (R,) int64
        Rows for each rank.
    row_of_token : (M, w) int64
        Row of each token's partial sums among those that come back, in rank order; -1 fills up.
    """

    token: Array
    counts: Array
    row_of_token: Array

    def destination(self) -> Array:
        """Return the rank of each row, (n,) int32."""
        return np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)


def plan_dispatch(owner: Array, ranks: int) -> DispatchPlan:
    """Plan that a token goes once to each rank that owns one of its experts.

    Parameters
    ----------
    owner : ndarray, (M, topk), integer
        Rank of each slot's expert; -1 where nobody has it.
    ranks : int
        R.
    """
    M = owner.shape[0]
    # One row more, the last, for slots that nobody owns; slot by slot is faster than all slots at once.
    hits, tokens = np.zeros((ranks + 1, M), bool), np.arange(M)
    for slot in owner.T:
        hits[slot, tokens] = True
    destination, token = np.nonzero(hits[:ranks])
    token = np.ascontiguousarray(token)  # NumPy's are columns of one array
    counts = np.bincount(destination, minlength=ranks).astype(np.int64)
    return DispatchPlan(token, counts, rows_of_tokens(token, M))


def plan_all(M: int, ranks: int) -> DispatchPlan:
    """Plan that every token goes to every rank."""
    rows = np.arange(ranks * M, dtype=np.int64).reshape(ranks, M).T
    return DispatchPlan(np.tile(np.arange(M, dtype=np.int64), ranks), np.full(ranks, M, np.int64), rows)


def rows_of_tokens(token: Array, M: int) -> Array:
    """Return (M, w) int64: the places in `token` (n,) that name each token, ascending; -1 fills up."""
    order = np.argsort(token, kind="stable")
    sorted_token = token[order]
    first = np.searchsorted(sorted_token, np.arange(M + 1))
    width = max(1, int(np.diff(first).max(initial=0)))
    rows = np.full((M, width), -1, np.int64)
    rows[sorted_token, np.arange(len(token)) - first[sorted_token]] = order
    return rows


def rows_of_slots(owner: Array) -> Array:
    """Return (M, topk) int64: each slot's row among rows that come by rank, token and slot; -1 without an owner."""
    token, slot = np.nonzero(owner >= 0)
    rows = np.full(owner.shape, -1, np.int64)
    order = np.argsort(owner[token, slot], kind="stable")
    rows[token[order], slot[order]] = np.arange(len(order))
    return rows


def check_counts(call: str, receive: Array, tokens: Array) -> None:
    """Refuse counts that no plan makes: negative, or more rows than their sender has tokens.

    Parameters
    ----------
    receive : ndarray, (R,)
        Rows that each rank says it sends here.
    tokens : ndarray, (R,)
        Tokens that each rank says it has.
    """
    wrong = (receive < 0) | (receive > tokens)
    if wrong.any():
        rank = int(np.argmax(wrong))
        got = f"{receive[rank]} rows of {tokens[rank]} tokens from rank {rank}"
        error = CommError(complaint(call, "count", "be between 0 and the sender's tokens", got))
        error.rank, error.field = rank, "count"
        raise error


def rank_offsets(counts: Array) -> Array:
    """Return (R + 1,) int64: where each rank's rows start, and their sum."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def as_bytes(rows: Array) -> Array:
    """Return `rows` (n, columns), NumPy or CuPy, as (n, bytes) uint8, without a copy where they are contiguous."""
    rows = namespace(rows).ascontiguousarray(rows)
    shape = len(rows), rows.shape[1] * rows.itemsize
    return rows.view(np.uint8).reshape(shape) if rows.size else namespace(rows).empty(shape, np.uint8)


def from_bytes(raw: Array, dtype: Any) -> Array:
    """Return rows of bytes (n, bytes), NumPy or CuPy, as (n, columns) of `dtype`."""
    shape = len(raw), raw.shape[1] // np.dtype(dtype).itemsize
    return raw.view(dtype).reshape(shape) if raw.size else namespace(raw).empty(shape, dtype)


def pack_meta(local: Array, topk_weights: Array | None, scale: Array | None) -> Array:
    """Return what travels beside each row, (n, width) uint8: local ids, router weights and scales, one after another.

    Parameters
    ----------
    local : ndarray, (n, topk), int32
    topk_weights : ndarray, (n, topk), float32, optional
    scale : ndarray, (n, s), any dtype, optional
    """
    parts = [part for part in (local, topk_weights, scale) if part is not None]
    raw = [as_bytes(part) for part in parts]
    return raw[0] if len(raw) == 1 else np.concatenate(raw, axis=1)


def unpack_meta(
    meta: Array, topk: int, weighted: bool, scale_dtype: Any = None
) -> tuple[Array, Array | None, Array | None]:
    """Return (local ids, router weights, scales) of rows packed by `pack_meta`."""

    def columns(start: int, stop: int, dtype: Any) -> Array:
        item = np.dtype(dtype).itemsize
        raw = np.ascontiguousarray(meta[:, start:stop])
        return raw.view(dtype).reshape(len(meta), (stop - start) // item)

    ids = columns(0, 4 * topk, np.int32)
    weights = columns(4 * topk, 8 * topk, np.float32) if weighted else None
    start = 8 * topk if weighted else 4 * topk
    return ids, weights, None if scale_dtype is None else columns(start, meta.shape[1], scale_dtype)
