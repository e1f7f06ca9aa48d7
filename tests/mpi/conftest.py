"""Kernels are compiled once, by one rank, before ranks that outnumber the cores do it side by side."""

from __future__ import annotations

import pytest

from tests.mpi.launch import mpiexec, run


@pytest.fixture(scope="session")
def compiled():
    """Four ranks with an empty cache took 247 s on two loaded cores for what takes 3 s afterwards."""
    if mpiexec() is not None:
        ended = run(1, "correctness", "auto", "layer", "schemes", limit=900)
        assert ended.status == 0, ended
