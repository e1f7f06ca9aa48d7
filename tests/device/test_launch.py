"""Launch plans: what they refuse before a launch, what they pass on, and that kernels run."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import numpy as np
import pytest

from pymoe.device import launch
from pymoe.device.jit import PROBE, KernelId, load_kernel
from pymoe.device.launch import LaunchPlan, Loaded, check_arguments
from pymoe.errors import ArgumentError, BackendUnavailableError, DTypeError, UnsupportedError
from tests import gpu

PARAMETERS = (8, 4, 8)  # float* out, float value, int64 count


def plan(**changes):
    return LaunchPlan(**{"kernel": PROBE, "grid": (2, 1, 1), "block": (128, 1, 1)} | changes)


@pytest.fixture
def device(monkeypatch):
    """Stands in for a device: what was launched, and a kernel of which a test may change what it allows."""

    class Device:
        launches: list = []
        limits: list = []
        current = 0
        kernel = Loaded(None, "sm_90a", 1024, 0, PARAMETERS)

    found = Device()
    found.launches, found.limits = [], []

    def function(grid, block, args, shared_bytes):
        found.launches.append((found.current, grid, block, args, shared_bytes))

    monkeypatch.setattr(launch, "_current_device", lambda: found.current)
    monkeypatch.setattr(launch, "_loaded", lambda kernel, device: found.kernel._replace(function=function))
    monkeypatch.setattr(Loaded, "allow_shared", lambda self, nbytes: found.limits.append(nbytes))
    return found


def test_a_plan_is_frozen_and_shows_itself():
    assert plan(shared_bytes=64) == plan(shared_bytes=64) != plan()
    assert len({plan(), plan(), plan(programmatic=True)}) == 2
    text = repr(plan(cluster=(2, 1, 1)))
    assert text == (
        "LaunchPlan(kernel=KernelId('common/probe.cu', 'pymoe::probe_kernel<float>'), grid=(2, 1, 1), "
        "block=(128, 1, 1), shared_bytes=0, cluster=(2, 1, 1), programmatic=False)"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().grid = (1, 1, 1)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"grid": (0, 1, 1)}, r"grid must be three numbers from 1 to .*got \(0, 1, 1\)"),
        ({"grid": (2**31, 1, 1)}, "grid must be"),
        ({"grid": (1, 65536, 1)}, "grid must be"),
        ({"grid": (1, 1, 65536)}, "grid must be"),
        ({"grid": (1, 1)}, "grid must be three"),
        ({"block": (1025, 1, 1)}, "block must be"),
        ({"block": (1, 1, 65)}, "block must be"),
        ({"block": (32, 33, 1)}, "block must have at most 1024 threads"),
        ({"shared_bytes": -1}, "shared_bytes must be 0 or more"),
        ({"cluster": (0, 1, 1)}, "cluster must be"),
        ({"cluster": (4, 1, 1)}, "cluster must be"),
        ({"grid": (16, 1, 1), "cluster": (16, 1, 1)}, "cluster must have at most 8 blocks"),
        ({"grid": (3, 1, 1), "cluster": (2, 1, 1)}, "cluster must divide the grid"),
    ],
)
def test_impossible_sizes_are_refused_by_name(changes, text):
    with pytest.raises(ArgumentError, match=text):
        plan(**changes)


@pytest.mark.parametrize(
    "changes", [{"grid": (2**31 - 1, 65535, 65535)}, {"block": (16, 1, 64)}, {"block": (1024, 1, 1)}]
)
def test_the_largest_sizes_are_possible(changes):
    plan(**changes)


def test_a_call_passes_grid_block_arguments_and_shared_memory(device):
    args = (np.int64(0), np.float32(1), np.int64(5))
    one = plan(shared_bytes=96)
    one(*args)
    one(*args)
    assert device.launches == [(0, (2, 1, 1), (128, 1, 1), args, 96)] * 2 and device.limits == []


def test_H1_each_device_has_its_own_function(device):
    one = plan()
    for number in (0, 1, 0):
        device.current = number
        one(0, np.float32(1), np.int64(5))
    assert [entry[0] for entry in device.launches] == [0, 1, 0] and sorted(one._functions) == [0, 1]


@pytest.mark.parametrize(
    "kernel, changes, error, text",
    [
        ({"threads": 96}, {}, ArgumentError, "block must have at most 96 threads, by the kernel's registers"),
        ({}, {"shared_bytes": 227 * 1024 + 1}, ArgumentError, "shared_bytes must be at most 232448 on sm_90a"),
        ({"static_bytes": 8}, {"shared_bytes": 227 * 1024}, ArgumentError, "shared_bytes must be at most 232440"),
        (
            {"arch": "sm_89"},
            {"shared_bytes": 100 * 1024},
            ArgumentError,
            "shared_bytes must be at most 101376 on sm_89",
        ),
        ({"arch": "sm_80"}, {"cluster": (2, 1, 1)}, UnsupportedError, "cluster must not .*; got sm_80"),
        ({"arch": "sm_89"}, {"programmatic": True}, UnsupportedError, "programmatic must not .*; got sm_89"),
    ],
)
def test_what_kernel_or_device_does_not_allow_is_refused_before_the_launch(device, kernel, changes, error, text):
    device.kernel = device.kernel._replace(**kernel)
    for _ in range(2):  # a refusal is not remembered as a success
        with pytest.raises(error, match=text):
            plan(**changes)(0, np.float32(1), np.int64(5))
    assert device.launches == []


def test_shared_memory_beyond_48_kib_is_asked_for_up_to_the_limit_of_the_device(device):
    args = (0, np.float32(1), np.int64(5))
    plan(shared_bytes=48 * 1024)(*args)
    assert device.limits == []
    plan(shared_bytes=48 * 1024 + 1)(*args)
    device.kernel = device.kernel._replace(static_bytes=1024)
    plan(shared_bytes=48 * 1024)(*args)
    # Not to what the plan needs: a later, smaller plan would lower the limit of an earlier one.
    assert device.limits == [227 * 1024, 226 * 1024] and len(device.launches) == 3


@pytest.mark.parametrize(
    "args, text",
    [
        ((0, np.float32(1)), "args must be 3 arguments; got 2"),
        ((0, np.float32(1), np.int64(1), 0), "args must be 3 arguments; got 4"),
        ((0, 1.0, np.int64(1)), r"args\[1\] must be typed; got the Python number 1.0"),
        ((0, np.float32(1), True), r"args\[2\] must be typed; got the Python number True"),
        ((0, np.float64(1), np.int64(1)), r"args\[1\] must be 4 bytes; got 8 \(float64\)"),
        ((0, np.float32(1), np.int32(1)), r"args\[2\] must be 8 bytes; got 4 \(int32\)"),
        ((np.float32(0), np.float32(1), np.int64(1)), r"args\[0\] must be 8 bytes"),
        ((0, 7, np.int64(1)), r"args\[1\] must be 4 bytes; got 8 \(int\)"),
    ],
)
def test_arguments_of_another_number_or_width_are_refused(device, args, text):
    with pytest.raises(DTypeError, match=text):
        plan()(*args)
    assert device.launches == []


def kinds_of_arguments():
    """(argument, bytes) of every kind that wrappers pass."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    opaque = np.zeros(16, np.uint64).view("V128")  # a CUtensorMap by value
    yield from ((np.dtype(code).type(1), np.dtype(code).itemsize) for code in "bBhHiIlLefd")
    yield from [(ml_dtypes.bfloat16(1), 2), (opaque, 128), (opaque[0], 128), (0, 8), (None, 8)]


def test_CuPys_own_launcher_packs_what_we_pass_and_refuses_what_we_refuse():
    """Bad types raise TypeError before CuPy asks for a driver; whatever comes after that is not about the arguments."""
    cupy = pytest.importorskip("cupy")
    function = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)

    def packs(arg):
        try:
            function((1, 1, 1), (1, 1, 1), (arg,), 0, cupy.cuda.Stream.null)
        except TypeError:
            return False
        except Exception as error:
            assert type(error).__name__ in ("CUDARuntimeError", "CUDADriverError")
        return True

    for arg, width in kinds_of_arguments():
        check_arguments(PROBE, (width,), (arg,))
        assert packs(arg), arg
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(4096, 64, None, 0), 0) if cupy.is_available() else None
    if memory is not None:
        check_arguments(PROBE, (8,), (cupy.ndarray(4, "float32", memory),))
    for arg in ([1], b"\0" * 8, np.zeros(16, np.uint64), "text"):
        assert not packs(arg)


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_H10_a_fork_is_told_why_it_cannot_launch(monkeypatch):
    """Only if its parent has launched before."""
    for used, fits in ((launch._first_device, "_first_device"), (lambda: 0, "_refuse_in_a_fork")):
        monkeypatch.setattr(launch, "_current_device", used)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if launch._current_device.__name__ == fits else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    monkeypatch.setattr(launch, "_current_device", launch._refuse_in_a_fork)
    with pytest.raises(BackendUnavailableError, match="the process must begin to use CUDA itself; got a fork"):
        plan()(0, np.float32(1), np.int64(5))


@pytest.mark.gpu
def test_launch(cuda, dirty_memory):
    out = gpu.filled(1000, "float32", dirty_memory)
    plan(grid=(8, 1, 1))(out, np.float32(2.5), np.int64(900))
    got = out.get()
    assert (got[:900] == 2.5).all()
    assert got[900:].tobytes() == bytes([dirty_memory]) * 400


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{"cluster": (2, 1, 1)}, {"programmatic": True}, {"cluster": (4, 2, 1), "grid": (8, 2, 1)}]
)
def test_launch_with_clusters_and_programmatic_launches(cuda, changes):
    if cuda.cuda.Device().compute_capability < "90":
        pytest.skip("clusters begin with sm_90")
    stream = cuda.cuda.Stream(non_blocking=True)
    with stream:
        out = cuda.zeros(2000, "float32")
        for value in (1.5, 2.5):
            plan(**{"grid": (16, 1, 1), "block": (128, 1, 1)} | changes)(out, np.float32(value), np.int64(900))
        got = out.get()
    assert (got[:900] == 2.5).all() and (got[900:] == 0).all()


@pytest.mark.gpu
def test_the_driver_knows_the_parameters(cuda):
    assert launch.parameter_sizes(load_kernel(PROBE)) == PARAMETERS
    with pytest.raises(DTypeError, match=r"args\[1\] must be 4 bytes"):
        plan()(cuda.zeros(4, "float32"), np.float64(1), np.int64(4))


@pytest.mark.gpu
def test_a_plan_launches_on_the_current_stream_and_is_captured(cuda):
    stream = cuda.cuda.Stream(non_blocking=True)
    out = cuda.zeros(256, "float32")
    cuda.cuda.Device().synchronize()
    one = plan()
    one(out, np.float32(1), np.int64(256))
    with stream:
        stream.begin_capture()
        one(out, np.float32(7), np.int64(256))
        graph = stream.end_capture()
    cuda.cuda.Device().synchronize()
    assert (out.get() == 1).all()
    graph.launch(stream)
    stream.synchronize()
    assert (out.get() == 7).all()


@pytest.mark.gpu
def test_the_first_launch_ever_may_be_inside_a_capture(cuda):
    """G7: compiling and loading happen while the stream captures."""
    kernel = KernelId("common/probe.cu", "pymoe::probe_kernel<unsigned short>")
    stream = cuda.cuda.Stream(non_blocking=True)
    out = cuda.zeros(256, "uint16")
    cuda.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        plan(kernel=kernel)(out, np.uint16(7), np.int64(256))
        graph = stream.end_capture()
        graph.launch(stream)
        assert (out.get() == 7).all()


@pytest.mark.gpu
def test_threads_launch_on_their_own_streams(cuda):
    faults = []

    def work(number):
        try:
            with cuda.cuda.Stream(non_blocking=True) as stream:
                out = cuda.zeros(1 << 16, "int64")
                kernel = KernelId("common/probe.cu", "pymoe::probe_kernel<long long>")
                one = plan(kernel=kernel, grid=(512, 1, 1))
                for repeat in range(50):
                    one(out, np.int64(number * 1000 + repeat), np.int64(1 << 16))
                    got = out.get(stream=stream)
                    if not (got == number * 1000 + repeat).all():
                        faults.append((number, repeat))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert faults == []


@pytest.mark.gpu
@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_H10_a_fork_of_a_process_that_used_cuda_is_told_so(cuda):
    one, out = plan(), cuda.zeros(4, "float32")
    one(out, np.float32(1), np.int64(4))
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        status = 1
        try:
            one(out, np.float32(2), np.int64(4))
        except BackendUnavailableError as error:
            status = 0 if "spawn" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    one(out, np.float32(3), np.int64(4))
    assert (out.get() == 3).all()


@pytest.mark.gpu2
def test_H1_H4_a_plan_follows_the_current_device(cuda):
    one = plan()
    for number in (0, 1, 0, 1):
        with cuda.cuda.Device(number):
            out = cuda.zeros(256, "float32")
            one(out, np.float32(number + 1), np.int64(256))
            assert (out.get() == number + 1).all()
    load_kernel(KernelId("common/probe.cu", "pymoe::probe_kernel<char>"), 1)
