"""Workspaces, on NumPy memory: layout, growth, captures, counters, streams, threads (reliability G2 to G5)."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pymoe.device.workspace import ALIGNMENT, Workspace, Workspaces, plan_workspace
from pymoe.errors import ArgumentError, UnsupportedError
from tests import gpu


class Memory:
    """An allocator that aligns badly, hands out dirt, counts what is alive, and fails when told to."""

    def __init__(self):
        self.allocated, self.fail, self.capturing = [], False, False

    def empty(self, shape, dtype):
        if self.fail:
            raise MemoryError("told to")
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        base = np.full(count + 512, 0xFF, np.uint8)
        start = -base.ctypes.data % ALIGNMENT + 16  # 16 bytes past a multiple of 256
        self.allocated.append(count)
        return base[start : start + count].view(dtype).reshape(shape)

    def workspace(self):
        return Workspace(self.empty, lambda: self.capturing)


@pytest.fixture
def memory():
    return Memory()


def request(rows):
    return plan_workspace(("h", (rows, 33), "float16"), ("none", (0, 7), "float32"), ("ids", (rows,), "int32"))


@pytest.mark.parametrize("rows", [0, 1, 3, 128, 1000])
def test_pieces_are_aligned_and_apart(memory, rows):
    plan = request(rows)
    arrays = memory.workspace().arrays(plan)
    assert list(arrays) == ["h", "none", "ids"]
    spans = []
    for name, shape, dtype in (("h", (rows, 33), "float16"), ("none", (0, 7), "float32"), ("ids", (rows,), "int32")):
        array = arrays[name]
        assert array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
        assert array.size == 0 or array.ctypes.data % ALIGNMENT == 0
        spans.append((array.ctypes.data, array.ctypes.data + array.nbytes))
        array[...] = 7  # NumPy would fail beyond the memory
    assert spans[0][1] <= spans[2][0] or rows == 0
    assert plan.nbytes == plan.pieces["ids"].offset + 4 * rows
    assert len(memory.allocated) == 1


def test_equal_requests_share_a_plan_and_a_name_is_used_once():
    assert request(5) is request(5) is not request(6)
    with pytest.raises(ArgumentError, match="requests must name each array once; got 'a'"):
        plan_workspace(("a", (1,), "int32"), ("a", (2,), "int32"))


def test_memory_is_kept_grows_and_is_never_asked_for_twice(memory):
    workspace = memory.workspace()
    assert workspace.nbytes == 0
    first = workspace.arrays(request(100))
    assert workspace.arrays(request(100)) is first
    workspace.arrays(request(50))
    assert len(memory.allocated) == 1
    workspace.arrays(request(1000))
    assert len(memory.allocated) == 2 and workspace.nbytes == memory.allocated[1]
    small = workspace.arrays(request(100))["h"]
    large = workspace.arrays(request(1000))["h"]
    assert np.shares_memory(small, large) and len(memory.allocated) == 2
    workspace.release()
    assert workspace.nbytes == 0
    workspace.arrays(request(1))
    assert len(memory.allocated) == 3


def test_many_plans_do_not_pile_up(memory):
    workspace = memory.workspace()
    workspace.arrays(request(2000))
    for rows in range(1000):
        workspace.arrays(request(rows))
    assert len(workspace._views) <= 64 and len(memory.allocated) == 1


def test_out_of_memory_leaves_a_workspace_that_works(memory):
    workspace = memory.workspace()
    workspace.arrays(request(10))
    memory.fail = True
    with pytest.raises(MemoryError):
        workspace.arrays(request(1000))
    assert workspace.nbytes == 0  # nothing is held on to
    memory.fail = False
    assert workspace.arrays(request(10))["h"].shape == (10, 33)


def test_G4_G5_a_capture_never_allocates(memory):
    workspace = memory.workspace()
    before = workspace.arrays(request(100))["h"].ctypes.data
    workspace.counters(10)
    allocated = len(memory.allocated)
    memory.capturing = True
    assert workspace.arrays(request(100))["h"].ctypes.data == before
    assert workspace.arrays(request(7))["h"].ctypes.data == before
    workspace.counters(64)
    for wanted in (lambda: workspace.arrays(request(101)), lambda: workspace.counters(65)):
        with pytest.raises(ArgumentError, match=r"the workspace must be large enough before; got .* bytes wanted"):
            wanted()
    with pytest.raises(ArgumentError, match="got 666 bytes wanted, 0 there. Call layer.warm_up"):
        memory.workspace().arrays(plan_workspace(("x", (666,), "uint8")))
    assert len(memory.allocated) == allocated
    assert workspace.arrays(request(100))["h"].ctypes.data == before


def test_G4_memory_that_a_graph_has_seen_outlives_growth(memory):
    workspace = memory.workspace()
    workspace.arrays(request(100))
    workspace.counters(1)
    memory.capturing = True
    held = workspace.arrays(request(100))["h"], workspace.counters(1)
    memory.capturing = False
    address, nbytes = held[0].ctypes.data, workspace.nbytes
    del held
    workspace.arrays(request(5000))
    workspace.counters(5000)
    assert workspace.nbytes == sum(memory.allocated) > nbytes
    assert any(address in range(a.ctypes.data, a.ctypes.data + a.nbytes) for a in workspace._kept)
    workspace.release()
    assert workspace.nbytes == 0


def test_memory_that_no_graph_has_seen_does_not(memory):
    workspace = memory.workspace()
    workspace.arrays(request(100))
    workspace.arrays(request(5000))
    assert workspace.nbytes == memory.allocated[-1]


def test_counters_begin_at_zero_and_are_never_reset(memory):
    workspace = memory.workspace()
    first = workspace.counters(10)
    assert first.dtype == np.int32 and first.tolist() == [0] * 10
    first += 3
    assert workspace.counters(64)[:10].tolist() == [3] * 10
    workspace.arrays(request(100000))[  # growth of the rest does not touch them
        "h"
    ][...] = 1
    assert workspace.counters(10).tolist() == [3] * 10
    assert workspace.counters(1000).tolist() == [0] * 1000


def streams(memory, current):
    return Workspaces(memory.empty, lambda: memory.capturing, lambda: (current[0], f"stream {current[0]}"))


def test_each_stream_has_its_own(memory):
    current = [1]
    many = streams(memory, current)
    with many.current() as workspace:
        one = workspace.arrays(request(10))["h"]
    with many.current() as again:
        assert again is workspace and again.arrays(request(10))["h"] is one
    current[0] = 2
    with many.current() as other:
        assert other is not workspace
        assert not np.shares_memory(other.arrays(request(10))["h"], one)
    assert many.nbytes == sum(memory.allocated)
    assert [entry.stream for entry in many._entries.values()] == ["stream 1", "stream 2"]  # their handles stay theirs
    many.release()
    assert many.nbytes == 0
    with many.current() as fresh:
        assert fresh not in (workspace, other)


def test_streams_that_come_and_go_do_not_pile_up_but_graphs_keep_theirs(memory):
    current = [0]
    many = streams(memory, current)
    with many.current() as captured:
        captured.arrays(request(10))
        memory.capturing = True
        captured.arrays(request(10))
        memory.capturing = False
    for number in range(1, 100):
        current[0] = number
        with many.current() as workspace:
            workspace.arrays(request(10))
    assert len(many._entries) <= 17 and many.nbytes <= 17 * memory.allocated[0]
    current[0] = 0
    with many.current() as workspace:
        assert workspace is captured


def test_one_caller_at_a_time(memory):
    """Two threads on one stream: the second waits until the first has queued all its launches."""
    many = streams(memory, [1])
    tried, entered, order = threading.Event(), threading.Event(), []

    def second():
        tried.set()
        with many.current() as workspace:
            entered.set()
            order.append(("second", workspace))

    thread = threading.Thread(target=second)
    with many.current() as workspace:
        thread.start()
        assert tried.wait(10) and not entered.wait(0.2)
        order.append(("first", workspace))
    thread.join(10)
    assert order == [("first", workspace), ("second", workspace)]


def test_a_call_from_within_its_own_call_is_refused_and_leaves_it_usable(memory):
    many = streams(memory, [1])
    with many.current(), pytest.raises(UnsupportedError, match="not be called from within its own call"):
        with many.current():
            pass
    with pytest.raises(ZeroDivisionError), many.current():
        raise ZeroDivisionError
    with many.current():
        pass


@pytest.mark.gpu
def test_on_the_device(cuda, dirty_memory):
    """bf16 views, zeroed counters in dirty memory, a workspace for each stream, the pool back at its baseline."""
    from pymoe.device.arrays import BFLOAT16

    pool = cuda.get_default_memory_pool()
    used = pool.used_bytes()
    many = Workspaces()
    plan = plan_workspace(("h", (100, 33), BFLOAT16), ("ids", (100,), "int32"))
    addresses = set()
    for stream in (cuda.cuda.Stream.null, cuda.cuda.Stream(non_blocking=True), cuda.cuda.Stream.null):
        with stream, many.current() as workspace:
            gpu.dirty_pool(dirty_memory, 1 << 20)
            arrays = workspace.arrays(plan)
            assert arrays["h"].dtype == BFLOAT16 and arrays["h"].data.ptr % ALIGNMENT == 0
            assert not workspace.counters(1000).get().any()
            addresses.add(arrays["h"].data.ptr)
            stream.synchronize()
    assert len(addresses) == 2
    many.release()
    del arrays, workspace
    assert pool.used_bytes() == used


@pytest.mark.gpu
def test_G4_a_capture_on_the_device(cuda):
    many, stream = Workspaces(), cuda.cuda.Stream(non_blocking=True)
    with stream, many.current() as workspace:
        workspace.arrays(request(10))
        stream.begin_capture()
        array = workspace.arrays(request(10))["ids"]
        array.data.memset_async(1, array.nbytes, stream)
        with pytest.raises(ArgumentError, match="Call layer.warm_up"):
            workspace.arrays(request(1000))
        graph = stream.end_capture()
        workspace.arrays(request(1000))
        graph.launch(stream)
        assert (array.get() == 0x01010101).all()
