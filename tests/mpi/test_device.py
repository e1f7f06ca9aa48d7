"""CuPy arrays over ranks, by way of the host: two ranks on one GPU, and two ranks on two."""

from __future__ import annotations

import importlib.util

import pytest

from tests.mpi.launch import mpiexec, run
from tests.mpi.test_correctness import NODES, check

pytestmark = pytest.mark.timeout(300)
LEAST = 33


def check_device(ranks, transport, **environment):
    """Run the program of device arrays on `ranks` ranks."""
    if mpiexec() is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("MPI is not installed")
    ended = run(ranks, "device", transport, limit=240, PYMOE_TIMEOUT_S="60", **environment)
    check(ended, LEAST)


@pytest.mark.gpu
@pytest.mark.parametrize("transport", ["host", "shm"])
def test_two_ranks_on_one_gpu(transport):
    check_device(2, transport, CUDA_VISIBLE_DEVICES="0")


@pytest.mark.gpu
def test_nodes_on_one_gpu():
    check_device(4, "hier", CUDA_VISIBLE_DEVICES="0", **NODES["hier"])


@pytest.mark.gpu2
@pytest.mark.parametrize("transport", ["host", "shm"])
def test_a_gpu_each(transport):
    check_device(2, transport)
