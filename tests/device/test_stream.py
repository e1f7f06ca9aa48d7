"""Current device and stream: told right, and left as they were."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from pymoe import checks
from pymoe.device.arrays import device_of
from pymoe.device.stream import current_stream, is_capturing
from pymoe.errors import ArgumentError


def on(device):
    return SimpleNamespace(device=SimpleNamespace(id=device))


def test_arrays_on_two_devices_are_named(monkeypatch):
    monkeypatch.setattr(checks, "is_cuda", lambda x: True)
    checks.one_device("moe", x=on(1), w1=on(1), expert_map=None)
    with pytest.raises(ArgumentError, match=r"moe: w2 must be on the device of x, CUDA device 0; got CUDA device 3"):
        checks.one_device("moe", x=on(0), w1=on(0), w2=on(3))


@pytest.mark.gpu
def test_capturing(cuda):
    assert not is_capturing()
    stream = cuda.cuda.Stream(non_blocking=True)
    with stream:
        assert not is_capturing()
        stream.begin_capture()
        assert is_capturing()
        stream.end_capture()
        assert not is_capturing()


@pytest.mark.gpu
def test_G7_a_spoilt_capture_counts_as_one_and_the_stream_is_usable_after(cuda):
    stream = cuda.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(Exception, match="[Cc]apture"):
            stream.synchronize()
        assert is_capturing()
        with pytest.raises(Exception, match="[Cc]apture"):
            stream.end_capture()
        assert not is_capturing()
        assert cuda.ones(3).sum() == 3


@pytest.mark.gpu
def test_G2_streams_are_told_apart(cuda):
    keys = []
    for stream in (cuda.cuda.Stream.null, cuda.cuda.Stream(non_blocking=True), cuda.cuda.Stream.ptds):
        with stream:
            keys.append(current_stream()[0])

    def work():
        with cuda.cuda.Stream.ptds:
            keys.append(current_stream()[0])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(set(keys)) == 4


@pytest.mark.gpu
def test_a_device_is_left(cuda):
    with device_of(cuda.zeros(1)):
        assert cuda.cuda.runtime.getDevice() == 0


@pytest.mark.gpu2
def test_H5_another_device_is_left_also_after_an_error(cuda):
    with cuda.cuda.Device(1):
        x = cuda.zeros(1)
    with pytest.raises(ZeroDivisionError), device_of(x):
        assert cuda.cuda.runtime.getDevice() == 1
        raise ZeroDivisionError
    assert cuda.cuda.runtime.getDevice() == 0
