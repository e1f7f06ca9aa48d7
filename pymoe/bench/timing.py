"""Samples of calls that take turns."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Pace", "Samples", "take_turns"]

PAUSE_S = 0.1
"""Between two contenders: the threads of BLAS and OpenMP spin on for tens of milliseconds after their last call."""


@dataclass(frozen=True)
class Pace:
    """How long to measure: `rounds` turns of each contender, each at least `calls` calls and `seconds`.

    A turn ends with the call that exceeds `limit` seconds, however few there were.
    """

    rounds: int = 5
    calls: int = 5
    seconds: float = 0.4
    limit: float = 4.0


QUICK = Pace(rounds=2, calls=2, seconds=0.02)


@dataclass
class Samples:
    """Seconds of each timed call, by round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(s for block in self.rounds for s in block)

    @property
    def least(self) -> float:
        return min(s for block in self.rounds for s in block)

    @property
    def calls(self) -> int:
        return sum(map(len, self.rounds))

    @property
    def spread(self) -> float:
        """How many times the slowest round's median is the fastest round's: 1 on a quiet machine."""
        medians = [statistics.median(block) for block in self.rounds]
        return max(medians) / min(medians)


def take_turns(contenders: Mapping[Any, Sequence[Callable[[], Any]]], pace: Pace) -> dict[Any, Samples]:
    """Time each contender's rotating calls, all of them in every round, so that a slow minute slows all alike."""
    samples: dict[Any, Samples] = {key: Samples() for key in contenders}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(pace.rounds):
            for key, calls in contenders.items():
                time.sleep(PAUSE_S if pace.seconds >= PAUSE_S else 0)
                samples[key].rounds.append(_turn(calls, pace))
    finally:
        if was_enabled:
            gc.enable()
    return samples


def _turn(calls: Sequence[Callable[[], Any]], pace: Pace) -> list[float]:
    """Warm up by going once around, or for a third of the turn; then time call after call, still rotating."""
    around = itertools.cycle(calls)
    started = time.perf_counter()
    for _ in calls:
        next(around)()
        if time.perf_counter() - started > pace.seconds / 3:
            break
    taken: list[float] = []
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < pace.limit and (len(taken) < pace.calls or spent < pace.seconds):
        call = next(around)
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return taken
