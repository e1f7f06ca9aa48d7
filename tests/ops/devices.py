"""Stages as tests call them: NumPy arrays in and out, whatever computes.

The same test bodies run on the host ("numpy", "numba"), on a GPU ("cuda", and "numba_cuda" where Numba has kernels of
the stage, marked `gpu`) and, without one, on the kernels that g++ has compiled ("emulated", marked `compile`).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import inspect
import sys
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest

from pymoe.codec.weights import WeightOperand
from pymoe.contracts import DeviceRowMap, RowMap
from pymoe.device import arch
from pymoe.device.launch import LaunchPlan
from tests.emulator import emulator

HOST = ("numpy", "numba")
DEVICES = (
    pytest.param(
        "emulated",
        marks=[pytest.mark.compile, pytest.mark.skipif(not emulator.AVAILABLE, reason="g++ is not installed")],
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
BACKENDS = (*HOST, *DEVICES)
PORTABLE = (*BACKENDS, pytest.param("numba_cuda", marks=pytest.mark.gpu))
"""For stages, or parts of one, that Numba's kernels compute too."""
ON_GPU = ("cuda", "numba_cuda")
ON_DEVICE = ("emulated", *ON_GPU)

current: str | None = None
"""The backend of calls that name none; tests set it with `monkeypatch`."""


def staged(function):
    """Return `function` for NumPy arrays on any backend, which its keyword `backend` or `current` names."""
    own = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args, backend=None, **kwargs):
        backend = current if backend is None else backend
        if backend not in ON_DEVICE:
            if "backend" in own:
                kwargs["backend"] = backend
            return function(*args, **kwargs)
        on_gpu = backend in ON_GPU
        send, fetch, out = (to_cupy, from_cupy, kwargs.get("out")) if on_gpu else (_as_it_is, _kept, None)
        args = [_sent(x, send) for x in args]
        kwargs = {name: _sent(x, send) for name, x in kwargs.items()}
        if backend == "numba_cuda" and "backend" in own:
            kwargs["backend"] = backend
        if backend == "emulated":
            with emulation():
                return _fetched(function(*args, **kwargs), fetch)
        result = _fetched(function(*args, **kwargs), fetch)
        if isinstance(out, np.ndarray):  # the test looks for the answer in its own array
            out[...] = result
            return out
        return result

    return call


class emulation:
    """Within it the ops take NumPy arrays for CuPy's, and launches run on the host."""

    def __enter__(self):
        names = [name for name in sys.modules if name.startswith("pymoe.ops.") and not name.endswith("_cuda")]
        self._patches = [
            mock.patch.object(LaunchPlan, "__call__", emulator.emulated),
            mock.patch.object(arch, "current_arch", lambda: "sm_80"),
        ]
        for name in names:
            if hasattr(sys.modules[name], "is_cuda"):
                self._patches.append(mock.patch.object(sys.modules[name], "is_cuda", _is_array))
        for patch in self._patches:
            patch.start()

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()


@dataclass(frozen=True)
class HostMap(RowMap):
    """A row map as the host's tests expect it, beside the one it was made of."""

    device: DeviceRowMap | None = None


def to_cupy(x):
    """Return a CuPy array with the values and the strides of `x`, in memory of its own."""
    import cupy

    if x.dtype.itemsize == 1 and x.dtype.kind == "V":  # CuPy has no fp8
        x = x.view(np.uint8)
    if not x.size or x.flags.c_contiguous:
        return cupy.asarray(np.asarray(x))
    low, high = np.lib.array_utils.byte_bounds(x)
    memory = cupy.asarray(np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), np.uint8))
    return cupy.ndarray(x.shape, x.dtype, memory.data + (x.ctypes.data - low), strides=x.strides)


def from_cupy(x):
    """Return the NumPy copy of a CuPy array."""
    return x.get()


def _as_it_is(x):
    return x


def _kept(x):
    return x


def _is_array(x):
    return isinstance(x, np.ndarray)


def _sent(x, send):
    if isinstance(x, WeightOperand):
        fields = {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
        return WeightOperand(**{name: _sent(value, send) for name, value in fields.items()})
    if isinstance(x, HostMap):
        return x.device
    if isinstance(x, RowMap):
        slots = np.full(x.slot_to_row.size, -1, np.int32)
        slots[: len(x.row_to_slot)] = x.row_to_slot
        arrays = (x.expert_offsets.astype(np.int32), slots, x.slot_to_row.astype(np.int32))
        return DeviceRowMap(*map(send, arrays), None, None, 1)
    return send(x) if isinstance(x, np.ndarray) else x


def _fetched(x, fetch):
    if isinstance(x, tuple):
        return tuple(_fetched(part, fetch) for part in x)
    if isinstance(x, DeviceRowMap):
        offsets, slots, rows = (fetch(part) for part in (x.expert_offsets, x.row_to_slot, x.slot_to_row))
        assert offsets.dtype == slots.dtype == rows.dtype == np.int32
        P = int(offsets[-1])
        assert (slots[P:] == -1).all()
        return HostMap(offsets.astype(np.int64), slots[:P].astype(np.int64), rows.astype(np.int64), x)
    return fetch(x) if hasattr(x, "shape") and not isinstance(x, np.generic) else x
