"""Turns: who is called when, and what the samples say."""

from __future__ import annotations

import gc

import pytest

from pymoe.bench import timing
from pymoe.bench.timing import Pace, Samples, take_turns


def test_statistics():
    samples = Samples([[3.0, 1.0, 2.0], [5.0, 4.0, 6.0]])
    assert (samples.median, samples.least, samples.calls, samples.spread) == (3.5, 1.0, 6, 2.5)


def test_contenders_alternate_and_their_calls_rotate():
    order = []

    def calls(name):
        return [lambda i=i: order.append((name, i)) for i in range(3)]

    samples = take_turns({"a": calls("a"), "b": calls("b")}, Pace(rounds=2, calls=4, seconds=0))
    turn = [0, 1, 2, 0, 1]  # one to warm up, since no time may be spent, and four timed
    assert order == [(name, i) for _ in range(2) for name in "ab" for i in turn]
    assert [samples[name].calls for name in "ab"] == [8, 8]


def test_a_turn_lasts_as_long_as_it_must(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.01

    (samples,) = take_turns({"a": [call]}, Pace(rounds=1, calls=2, seconds=0.095)).values()
    assert samples.calls == 10 and samples.median == pytest.approx(0.01)


def test_slow_calls_end_a_turn_early(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 3.0

    (samples,) = take_turns({"a": [call]}, Pace(rounds=2, calls=5, seconds=0.0, limit=4.0)).values()
    assert samples.calls == 4


def test_garbage_collection_is_restored_after_an_error():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        take_turns({"a": [lambda: 1 // 0]}, timing.QUICK)
    assert gc.isenabled()
