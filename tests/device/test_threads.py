"""The thread pool: full cover, errors, interrupts, nesting, many callers, fork."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pymoe.device.threads import run_blocks
from tests.device.forks import assert_child_succeeds


@pytest.fixture(params=["1", "2", "7"])
def threads(request, monkeypatch):
    monkeypatch.setenv("PYMOE_NUM_THREADS", request.param)
    return int(request.param)


@pytest.mark.parametrize("grain", [1, 3, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 15, 16, 17, 100])
def test_blocks_cover_the_range_once(threads, count, grain):
    seen = []
    lock = threading.Lock()

    def kernel(start, stop, label):
        assert label == "x" and start % grain == 0
        with lock:
            seen.extend(range(start, stop))

    run_blocks(kernel, count, "x", grain=grain)
    assert sorted(seen) == list(range(count))


def test_an_error_is_raised_once_no_block_runs(threads):
    running = []

    def kernel(start, stop):
        running.append(start)
        try:
            time.sleep(0.01)
            if start == 0:
                raise ValueError("block 0")
        finally:
            running.remove(start)

    with pytest.raises(ValueError, match="block 0"):
        run_blocks(kernel, 20)
    assert running == []
    run_blocks(lambda start, stop: None, 20)


def test_an_interrupt_waits_for_running_blocks_and_leaves_the_pool_usable(monkeypatch, interrupts):
    monkeypatch.setenv("PYMOE_NUM_THREADS", "4")
    running = []
    main = threading.current_thread()

    def kernel(start, stop):
        running.append(start)
        try:
            for _ in range(20):
                time.sleep(0.005)
        finally:
            running.remove(start)

    timer = threading.Timer(0.05, lambda: signal.pthread_kill(main.ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_blocks(kernel, 16)
    timer.join()
    assert running == []
    done = []
    run_blocks(lambda start, stop: done.append(stop - start), 16)
    assert sum(done) == 16


def test_nested_calls_run_serially(threads):
    inner = []

    def outer(start, stop):
        run_blocks(lambda a, b: inner.append(b - a), 5)

    run_blocks(outer, 8)
    assert sum(inner) >= 5


def test_many_callers_share_the_pool(threads):
    totals = []

    def caller():
        for _ in range(50):
            done = []
            run_blocks(lambda start, stop, done=done: done.append(stop - start), 37)
            totals.append(sum(done))

    callers = [threading.Thread(target=caller) for _ in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert totals == [37] * 300


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_pool_of_its_own(monkeypatch):
    monkeypatch.setenv("PYMOE_NUM_THREADS", "3")
    run_blocks(lambda start, stop: None, 10)
    child = os.fork()
    if child == 0:
        done = []
        run_blocks(lambda start, stop: done.append(stop - start), 10)
        os._exit(0 if sum(done) == 10 else 1)
    assert_child_succeeds(child)
