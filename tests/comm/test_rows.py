"""Rows stored by address into the parts of a window: against NumPy, with counts that lie, by two threads at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pymoe.comm.plan import counts_of, plan_dispatch
from pymoe.comm.transports import _numba_rows

FILLER = 0xA5
KERNELS = _numba_rows.Kernels()
AS_THEY_LIE = np.zeros(0, np.int64)


class Window:
    """A part and a word for each of some virtual ranks; a margin of bytes behind each part that nobody may write."""

    def __init__(self, ranks, size, margin=256):
        self.memory = np.full((ranks, size + margin), FILLER, np.uint8)
        self.parts = [line[:size] for line in self.memory]
        self.words = np.zeros((ranks, 8), np.int64)
        addresses = [self.words[rank].ctypes.data for rank in range(ranks)]
        self._desks = [_numba_rows.desk(rank, self.parts, addresses) for rank in range(ranks)]
        self.desks = [desk.ctypes.data for desk in self._desks]
        self.size = size


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_lands_where_the_counts_say(ranks, seed):
    rng = np.random.default_rng([ranks, seed])
    plans = [plan_dispatch(rng.integers(-1, ranks, (int(rng.integers(0, 30)), 3)), ranks) for _ in range(ranks)]
    matrix = np.stack([plan.counts for plan in plans])
    widths, most = (48, 5), int(matrix.sum(axis=0).max())
    firsts = (0, -(-48 * most // 64) * 64)
    window = Window(ranks, firsts[1] + 5 * most)
    expected = [[[] for _ in widths] for _ in range(ranks)]
    for rank, plan in enumerate(plans):
        counts = counts_of(matrix, rank)
        x = rng.integers(0, 256, (len(plan.row_of_token), widths[0]), np.uint8)
        x.flags.writeable = seed % 2 == 0
        beside = rng.integers(0, 256, (len(plan.token), widths[1]), np.uint8)
        assert KERNELS.store(window.desks[rank], x, plan.token, counts.send, counts.start, firsts[0], 0)
        assert window.words[rank, 0] == 0
        assert KERNELS.store(window.desks[rank], beside, AS_THEY_LIE, counts.send, counts.start, firsts[1], 5)
        for there, rows in enumerate(np.split(np.arange(len(plan.token)), np.cumsum(plan.counts)[:-1])):
            expected[there][0].append(x[plan.token[rows]])
            expected[there][1].append(beside[rows])
    assert (window.words[:, 0] == 5).all() and not window.words[:, 1:].any()
    for rank in range(ranks):
        for first, parts in zip(firsts, expected[rank], strict=True):
            rows = np.concatenate(parts)
            raw = window.parts[rank][first : first + rows.size].reshape(rows.shape)
            assert np.array_equal(raw, rows)
        assert KERNELS.all_here(window.desks[rank], matrix[:, rank].copy(), 5, 1)
    assert (window.memory[:, window.size :] == FILLER).all()


LIES = {
    "a negative count": ([2, -1], [0, 0]),
    "a negative start": ([2, 1], [0, -1]),
    "beyond the part": ([2, 1], [0, 4]),
    "more than there are rows": ([3, 1], [0, 0]),
    "a start whose bytes overflow": ([2, 1], [0, 2**60]),
    "bytes below zero": ([2, 1], [0, 2**59]),
}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_counts_that_lie_store_nothing(lie, ordered):
    send, start = (np.array(part, np.int64) for part in LIES[lie])
    window = Window(2, 4 * 16)
    order = np.arange(3) if ordered else AS_THEY_LIE
    assert not KERNELS.store(window.desks[0], np.ones((3, 16), np.uint8), order, send, start, 0, 1)
    assert (window.memory == FILLER).all() and not window.words.any()


def test_a_bad_index_reads_no_other_memory():
    window = Window(1, 3 * 8)
    rows = np.arange(16, dtype=np.uint8).reshape(2, 8)
    order, three, none = np.array([-7, 99, 1]), np.array([3]), np.array([0])
    assert KERNELS.store(window.desks[0], rows, order, three, none, 0, 1)
    assert np.array_equal(window.parts[0].reshape(3, 8), rows[[0, 1, 1]])


def test_who_has_no_rows_is_not_waited_for():
    window = Window(3, 64)
    window.words[1, 0] = 4
    assert KERNELS.all_here(window.desks[0], np.array([0, 2, 0]), 4, 1)
    assert not KERNELS.all_here(window.desks[0], np.array([0, 2, 1]), 4, 3)
    assert not KERNELS.all_here(window.desks[0], np.array([0, 2, 0]), 5, 3)
    assert KERNELS.all_here(window.desks[0], np.array([0, 0, 0]), 5, 1)


def test_who_sees_the_number_sees_the_rows():
    """Two ranks store and look, thousands of times, without Python's lock."""
    rounds, width, rows = 3000, 192, 16
    windows = [Window(2, rows * width) for _ in range(2)]  # turns, so that nobody overwrites what is still read
    counts = np.array([[0, rows], [rows, 0]])
    start, order, wrong = np.zeros(2, np.int64), np.arange(rows)[::-1].copy(), []

    def rank(me):
        for number in range(1, rounds + 1):
            window = windows[number % 2]
            source = np.full((rows, width), (7 * number + me) % 251, np.uint8)
            KERNELS.store(window.desks[me], source, order, counts[me], start, 0, number)
            while not KERNELS.all_here(window.desks[me], counts[me], number, 50):
                pass
            if not (window.parts[me] == (7 * number + 1 - me) % 251).all():
                wrong.append((me, number))

    threads = [threading.Thread(target=rank, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
