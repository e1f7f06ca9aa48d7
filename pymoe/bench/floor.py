"""The time that no implementation beats on this machine: bytes by read rate, or operations by GEMM rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pymoe.bench.cases import Shape

__all__ = ["Floor", "Rates", "Work", "floor", "work"]


@dataclass(frozen=True)
class Work:
    """What a call must do at least: read `bytes`, of weights and tokens, and do `flops` operations."""

    flops: float
    bytes: float


class Rates(NamedTuple):
    """Measured in the same run: bytes a second, operations a second (a multiply-add is two)."""

    read: float
    gemm: float


class Floor(NamedTuple):
    """Seconds, and which of the two bounds them: "bytes" or "flops"."""

    seconds: float
    bound: str


def work(shape: Shape, M: int, distinct: int, expert_bytes: float, token_bytes: int) -> Work:
    """Return the least work of one call.

    Parameters
    ----------
    M : int
        Tokens.
    distinct : int
        Experts that the call's routing actually names: each is read once, whatever the number of its rows.
    expert_bytes : float
        Of both matrices of an expert, scales included.
    token_bytes : int
        Of one number of the tokens, the output and the router.

    Notes
    -----
    Two GEMMs, gated: 6 M topk K I operations; the router 2 M E K.  The intermediate and the routed rows are left out:
    a perfect kernel keeps them on chip.
    """
    flops = 6 * M * shape.topk * shape.K * shape.I + 2 * M * shape.E * shape.K
    return Work(flops, distinct * expert_bytes + (shape.E + 2 * M) * shape.K * token_bytes)


def floor(w: Work, rates: Rates) -> Floor:
    """Return the floor of `w` at the measured rates."""
    by_bytes, by_flops = w.bytes / rates.read, w.flops / rates.gemm
    return Floor(by_bytes, "bytes") if by_bytes >= by_flops else Floor(by_flops, "flops")
