"""Tapes on the CPU: kernels packed as machine code takes them, and the crew that runs them."""

from __future__ import annotations

import os
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest

from pymoe.device.cpu_tape import CpuRecorder
from pymoe.device.threads import refuse_recording, run_blocks
from tests.device.forks import assert_child_succeeds

numba = pytest.importorskip("numba")

from pymoe.device._numba_words import get, pause, put  # noqa: E402  loads Numba


class Pair(NamedTuple):
    first: np.ndarray
    factor: float


class Numbers(NamedTuple):
    pair: Pair
    sizes: tuple[int, int]
    flag: bool
    small: np.float32
    address: int


@numba.njit(nogil=True)
def scale(start, stop, numbers, x, y):
    for i in range(start, stop):
        value = x[i] * numbers.pair.factor + numbers.pair.first[i % numbers.sizes[1]] + numbers.small
        y[i] = -value if numbers.flag else value


@numba.njit(nogil=True)
def count_positive(start, stop, x, count):
    count[0] = 0
    for i in range(x.size):
        count[0] += x[i] > 0


@numba.njit(nogil=True)
def mark(start, stop, y):
    for i in range(start, stop):
        y[i] += 1


@numba.njit(nogil=True)
def too_much(start, stop, size, y):
    y[0] = np.empty(size[0]).size


def numbers():
    return Numbers(Pair(np.arange(7.0), 2.5), (3, 7), True, np.float32(0.25), 12)


def plays(tape, addresses):
    return tape.play(addresses, np.zeros(1)) is not None


def recorded(x, y):
    recorder = CpuRecorder([x, y])
    with recorder.active():
        run_blocks(scale, len(x), numbers(), x, y, grain=8)
    return recorder.tape()


@pytest.fixture(params=["1", "2", "5"])
def threads(request, monkeypatch):
    monkeypatch.setenv("PYMOE_NUM_THREADS", request.param)
    return int(request.param)


def test_a_tape_computes_with_other_arrays(threads):
    rng = np.random.default_rng(0)
    x, y = rng.random(1000), np.empty(1000)
    tape = recorded(x, y)
    for _ in range(50):
        x2, y2, expected = rng.random(1000), np.full(1000, np.nan), np.empty(1000)
        scale(0, 1000, numbers(), x2, expected)
        assert plays(tape, [x2.ctypes.data, y2.ctypes.data])
        assert (y2 == expected).all()
    before = y.copy()
    assert (y == before).all()


def test_a_part_of_an_array_is_found_in_another_one():
    x, y = np.arange(64.0), np.zeros(64)
    recorder = CpuRecorder([x, y])
    with recorder.active():
        run_blocks(scale, 32, numbers(), x[32:], y[16:48])
    x2, y2, expected = np.arange(64.0)[::-1].copy(), np.zeros(64), np.zeros(64)
    scale(0, 32, numbers(), x2[32:], expected[16:48])
    assert plays(recorder.tape(), [x2.ctypes.data, y2.ctypes.data])
    assert (y2 == expected).all()


def test_a_count_that_a_kernel_writes_is_read_anew(threads):
    x, y, count = np.ones(100), np.zeros(100), np.empty(1, np.int64)
    recorder = CpuRecorder([x, y])
    with recorder.active():
        run_blocks(count_positive, 1, x, count)
        run_blocks(mark, count, y, grain=3)
    tape = recorder.tape()
    assert y.sum() == 100
    for positive in (0, 1, 57, 100):
        x2, y2 = np.where(np.arange(100) < positive, 1.0, -1.0), np.zeros(100)
        assert plays(tape, [x2.ctypes.data, y2.ctypes.data])
        assert y2.sum() == positive and (y2[:positive] == 1).all()


def test_what_cannot_be_repeated_makes_no_tape():
    x, y = np.ones(8), np.zeros(8)
    recorder = CpuRecorder([x, y])
    with recorder.active():
        run_blocks(scale, 8, numbers(), x.copy(), y)
    assert recorder.tape() is None  # computed with a copy
    recorder = CpuRecorder([x, y])
    with recorder.active():
        run_blocks(scale, 8, numbers(), x, y)
        refuse_recording()
    assert recorder.tape() is None
    recorder = CpuRecorder([x, y])
    with recorder.active():
        run_blocks(lambda start, stop, x, y: None, 8, x, y)
    assert recorder.tape() is None  # no machine code
    assert CpuRecorder([x]).tape() is None
    recorder = CpuRecorder([x, x])
    with recorder.active():
        run_blocks(scale, 8, numbers(), x, x)
    assert recorder.tape() is None  # which of the two is which is not known
    refuse_recording()


def test_a_kernel_that_fails_is_told():
    size, y = np.array([4]), np.zeros(1)
    recorder = CpuRecorder([size, y])
    with recorder.active():
        run_blocks(too_much, 1, size, y)
    tape = recorder.tape()
    assert plays(tape, [size.ctypes.data, y.ctypes.data])
    huge = np.array([1 << 60])
    assert not plays(tape, [huge.ctypes.data, y.ctypes.data])
    assert plays(tape, [size.ctypes.data, y.ctypes.data]) and y[0] == 4


def test_many_players_each_get_their_answer(threads):
    rng = np.random.default_rng(1)
    x, y = rng.random(500), np.empty(500)
    shared = recorded(x, y)
    wrong = []

    def player(seed):
        rng, own = np.random.default_rng(seed), recorded(x, y)
        for _ in range(200):
            x2, y2, expected = rng.random(500), np.empty(500), np.empty(500)
            scale(0, 500, numbers(), x2, expected)
            for tape in (own, shared):
                y2[:] = 0
                if plays(tape, [x2.ctypes.data, y2.ctypes.data]):
                    wrong.extend(np.flatnonzero(y2 != expected))
                elif tape is own:
                    wrong.append("own tape busy")

    y_before = y.copy()
    players = [threading.Thread(target=player, args=(seed,)) for seed in range(4)]
    for thread in players:
        thread.start()
    for thread in players:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == [] and y.shape == y_before.shape


def test_calls_after_a_pause_wake_the_crew():
    x, y = np.ones(4096), np.empty(4096)
    tape = recorded(x, y)
    for seconds in (0, 0.001, 0.02, 0):
        time.sleep(seconds)
        y[:] = np.nan
        assert plays(tape, [x.ctypes.data, y.ctypes.data])
        assert np.isfinite(y).all()


@numba.njit(nogil=True)
def meet(start, stop, arrived, met):
    """Wait for the other block to have begun, a tenth of a second: two threads meet, one alone does not."""
    for i in range(start, stop):
        put(arrived.ctypes.data + 8 * i, 1)
        for _ in range(10_000_000):
            pause()
            if get(arrived.ctypes.data + 8 * (1 - i)) != 0:
                met[i] = 1
                break


def test_the_crew_comes_to_every_call(monkeypatch):
    """A helper that falls asleep as the next call begins must still be seen: else every other call is alone."""
    monkeypatch.setenv("PYMOE_NUM_THREADS", "2")
    arrived, met = np.zeros(2, np.int64), np.zeros(2, np.int64)
    recorder = CpuRecorder([arrived, met])
    with recorder.active():
        run_blocks(meet, 2, arrived, met)
    tape = recorder.tape()

    def meets():
        arrived[:], met[:] = 0, 0
        assert plays(tape, [arrived.ctypes.data, met.ctypes.data])
        return met.sum() == 2

    for _ in range(5):  # on a busy machine nobody may have a core to come on
        missed = 0
        for turn in range(40):
            time.sleep(0 if turn % 4 else 0.002)
            missed += not meets()
        if missed <= 10:
            return
    pytest.fail(f"the helper missed {missed} of 40 calls, five times")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_plays_with_a_crew_of_its_own(monkeypatch):
    monkeypatch.setenv("PYMOE_NUM_THREADS", "3")
    x, y = np.ones(1000), np.empty(1000)
    tape = recorded(x, y)
    assert plays(tape, [x.ctypes.data, y.ctypes.data])
    child = os.fork()
    if child == 0:
        y[:] = np.nan
        played = plays(tape, [x.ctypes.data, y.ctypes.data])
        os._exit(0 if played and np.isfinite(y).all() else 1)
    assert_child_succeeds(child)
