"""How Numba's kernels are queued, with a driver that only takes notes: what no device is needed to see."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numba
import numpy as np
import pytest

from pymoe import NumbaCudaExperts
from pymoe.device import tape
from tests.experts.test_pairs import SCHEMES, problem

pytestmark = pytest.mark.skipif(bool(numba.config.ENABLE_CUDASIM), reason="the simulator queues nothing")


class Array:
    """Stands for `cupy.ndarray`."""


@pytest.fixture
def noted(monkeypatch):
    """Return (numba_gpu, notes) with Numba's calls replaced; the current stream is number 1234."""
    from pymoe.device import numba_gpu

    stream = SimpleNamespace(ptr=1234)
    cupy = SimpleNamespace(ndarray=Array, cuda=SimpleNamespace(get_current_stream=lambda: stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    notes = []

    def as_cuda_array(x, sync=True):
        notes.append(("array", sync))
        return ("view of", x)

    fake = SimpleNamespace(as_cuda_array=as_cuda_array, external_stream=lambda ptr: ("stream", ptr))
    monkeypatch.setattr(numba_gpu, "cuda", fake)
    return numba_gpu, notes


class Kernel:
    def __init__(self, module, notes, error=None):
        self.module, self.notes, self.error = module, notes, error

    def __getitem__(self, configuration):
        self.notes.append(("warns", self.module._config.CUDA_LOW_OCCUPANCY_WARNINGS))
        if self.error is not None:
            raise self.error
        return lambda *args: self.notes.append(("launch", configuration, args))


def test_arrays_are_handed_over_without_waiting_on_cupys_stream(noted):
    gpu, notes = noted
    x = Array()
    gpu.launch(Kernel(gpu, notes), (2, 3), 32, x, 7, np.float32(1))
    assert notes == [
        ("warns", 0), ("array", False), ("launch", ((2, 3), 32, ("stream", 1234)), (("view of", x), 7, np.float32(1))),
    ]  # fmt: skip


def test_numbas_settings_are_as_they_were_after_an_error_too(noted, monkeypatch):
    gpu, notes = noted
    monkeypatch.setattr(gpu._config, "CUDA_LOW_OCCUPANCY_WARNINGS", 1)
    with pytest.raises(RuntimeError):
        gpu.launch(Kernel(gpu, notes, RuntimeError()), (1,), 32)
    assert gpu._config.CUDA_LOW_OCCUPANCY_WARNINGS == 1


def test_an_empty_grid_is_no_launch(noted):
    gpu, notes = noted
    gpu.launch(Kernel(gpu, notes), (4, 0), 32)
    assert notes == []


def test_a_tape_is_told_that_it_cannot_repeat_a_launch(noted, monkeypatch):
    gpu, notes = noted
    recorder = SimpleNamespace(refused=0, refuse=lambda: notes.append("refused"))
    monkeypatch.setattr(tape._thread, "recorder", recorder, raising=False)
    gpu.launch(Kernel(gpu, notes), (1,), 32)
    assert notes[0] == "refused"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_without_a_kernel_are_refused_by_name(scheme, monkeypatch):
    monkeypatch.setattr(NumbaCudaExperts, "_supports_current_device", staticmethod(lambda: True))
    p = problem(scheme)
    keys = p.quant_config.weight_key, p.quant_config.activation_key
    form = NumbaCudaExperts.activation_format()
    supported, reason = NumbaCudaExperts.is_supported_config(p.config(), *keys, form)
    has = scheme == "fp32" or scheme.startswith(("fp8", "int8_w8a8"))
    assert supported == has, reason
    names = " x ".join("None" if key is None else key.name for key in keys)
    assert has or reason == f"kernel does not support quant scheme {names}"


def test_host_arrays_are_refused_before_any_work():
    import pymoe
    from pymoe.ops.permute import permute

    with pytest.raises(pymoe.ArgumentError) as caught:
        permute(np.zeros((1, 1), int), 1, backend="numba_cuda")
    assert str(caught.value) == (
        "permute: backend must be numpy, numba or None for arrays in host memory; got numba_cuda. "
        "Set NUMBA_ENABLE_CUDASIM=1 to simulate a GPU."
    )
