"""What all tests share: how Hypothesis runs, and no state of one test reaching the next."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from hypothesis import settings

import pymoe
from tests import gpu

# The same cases in every run, so that a red run can be repeated; no deadline, since the first case compiles kernels.
# More and other cases: pytest --hypothesis-profile=wide.
settings.register_profile("same", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("wide", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _process_state_is_left_alone():
    """The checked mode is reset for the next test; NumPy's error state must not have changed at all."""
    checked, errors = pymoe.environment.is_checked(), np.geterr()
    yield
    pymoe.checked(checked)
    changed = np.geterr()
    np.seterr(**errors)
    assert changed == errors


def pytest_runtest_setup(item):
    """Tests that need a device are skipped, with the reason, where there is none."""
    for marker, why_not in (("gpu", gpu.why_no_gpu), ("gpu2", gpu.why_not_two_gpus)):
        if item.get_closest_marker(marker) is not None and (reason := why_not()):
            pytest.skip(reason)


@pytest.fixture
def interrupts():
    """Ctrl-C raises KeyboardInterrupt, also where a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def cuda():
    """CuPy with a device; the test must leave device and stream as they were, and no error behind on the device."""
    if reason := gpu.why_no_gpu():
        pytest.skip(reason)
    import cupy

    before = cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr
    yield cupy
    cupy.cuda.runtime.deviceSynchronize()  # a fault of this test's kernels is this test's failure
    assert (cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr) == before


@pytest.fixture(params=gpu.FILLS, ids=[f"memory{fill:#04x}" for fill in gpu.FILLS])
def dirty_memory(cuda, request):
    """Run the test once for each byte that memory may hold before a kernel gets it; the byte is the fixture's value."""
    gpu.dirty_pool(request.param)
    return request.param
