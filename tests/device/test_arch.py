"""Which architecture's code a device runs, and what is said of devices that have none."""

from __future__ import annotations

import pytest

from pymoe.device.arch import ARCHS, arch_of, current_arch, limits, number_of
from pymoe.errors import ArgumentError, BackendUnavailableError, UnsupportedError
from tests import gpu


@pytest.mark.parametrize(
    "capability, arch",
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"), ((12, 0), "sm_120"), ((12, 1), "sm_120"),
    ],
)  # fmt: skip
def test_a_device_runs_the_code_of_its_generation(capability, arch):
    assert arch_of(*capability) == arch


@pytest.mark.parametrize("capability", [(5, 2), (7, 0), (7, 5)])
def test_too_old(capability):
    with pytest.raises(UnsupportedError, match=r"the GPU must be of sm_80 or later; got sm_\d\d\. The NumPy path"):
        arch_of(*capability)


@pytest.mark.parametrize("capability", [(10, 3), (11, 0), (13, 0)])
def test_J5_newer_than_this_version_or_bound_to_another_chip(capability):
    with pytest.raises(UnsupportedError, match=f"got sm_{capability[0]}{capability[1]}"):
        arch_of(*capability)


def test_limits():
    assert {arch: limits(arch).shared_bytes for arch in ARCHS} == {
        "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90a": 232448, "sm_100a": 232448, "sm_120": 101376,
    }  # fmt: skip
    assert [number_of(arch) for arch in ARCHS if limits(arch).clusters] == [90, 100, 120]
    with pytest.raises(ArgumentError, match="arch must be one of sm_80, .*; got 'sm_90'"):
        limits("sm_90")


@pytest.mark.skipif(not gpu.why_no_gpu(), reason="there is a device")
def test_without_a_device_the_current_arch_says_what_is_missing():
    with pytest.raises(BackendUnavailableError, match="(CuPy|CUDA driver|CUDA device) must be"):
        current_arch()


@pytest.mark.gpu
def test_on_a_device(cuda):
    """The table agrees with what the driver says of this device."""
    attributes = cuda.cuda.Device().attributes
    assert limits(current_arch()).shared_bytes == attributes["MaxSharedMemoryPerBlockOptin"]
    assert attributes["MaxThreadsPerBlock"] == 1024
