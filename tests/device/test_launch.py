"""Kernels compiled, loaded and launched by name."""

from __future__ import annotations

import numpy as np
import pytest

from pymoe.device.jit import KernelId, compile_kernel
from pymoe.device.launch import LaunchPlan
from tests import gpu

PROBE = KernelId("common/probe.cu", "pymoe::probe_kernel<float>")


def test_a_plan_is_frozen_and_shows_itself():
    plan = LaunchPlan(PROBE, (2, 1, 1), (128, 1, 1), shared_bytes=64)
    assert plan == LaunchPlan(PROBE, (2, 1, 1), (128, 1, 1), shared_bytes=64)
    assert repr(plan).startswith("LaunchPlan(kernel=KernelId(unit='common/probe.cu'")
    with pytest.raises(AttributeError):
        plan.grid = (1, 1, 1)


def test_compile_without_a_device():
    pytest.importorskip("cuda.core")
    compiled = compile_kernel(PROBE, "sm_90a")
    assert compiled.cubin.startswith(b"\x7fELF") and "probe_kernel" in compiled.symbol
    assert "0 bytes spill stores" in compiled.log


@pytest.mark.gpu
def test_launch(cuda, dirty_memory):
    out = gpu.filled(1000, "float32", dirty_memory)
    LaunchPlan(PROBE, (7, 1, 1), (128, 1, 1))(out, np.float32(2.5), np.int64(900))
    got = out.get()
    assert (got[:900] == 2.5).all()
    assert got[900:].tobytes() == bytes([dirty_memory]) * 400
