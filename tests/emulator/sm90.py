"""An emulated device that is taken for an sm_90a: few multiprocessors, and tensor maps that the emulator reads."""

from __future__ import annotations

import math
import struct
from contextlib import ExitStack, contextmanager
from unittest import mock

from pymoe.device import arch
from pymoe.ops.grouped_gemm import _sm90
from tests.ops import devices

MULTIPROCESSORS = 5
"""Room for two clusters, and one left over."""


def tensor_map(address, itemsize, shape, box, pitches=None):
    """Return `EmulatedMap` of ``common/ptx_sm90.cuh`` in the place of the driver's map."""
    assert address % 16 == 0 and box[-1] * itemsize == 128 and all(extent <= 256 for extent in box)
    assert shape[-1] * itemsize % 16 == 0
    pitches = pitches or [math.prod(shape[i:]) for i in range(1, len(shape))]
    assert all(pitch * itemsize % 16 == 0 for pitch in pitches)
    extents, boxes = ((*reversed(x), *[1] * (4 - len(x))) for x in (shape, box))
    pitches = (1, *reversed(pitches), *[0] * (4 - len(shape)))
    return struct.pack("<9Q5I", address, *extents, *pitches, *boxes, itemsize).ljust(128, b"\0")


@contextmanager
def emulation():
    with devices.emulation(), ExitStack() as patches:
        patches.enter_context(mock.patch.object(arch, "current_arch", lambda: "sm_90a"))
        patches.enter_context(mock.patch.object(arch, "current_multiprocessors", lambda: MULTIPROCESSORS))
        patches.enter_context(mock.patch.object(_sm90, "tensor_map", tensor_map))
        yield
