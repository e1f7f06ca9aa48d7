"""Ranks that disagree, parts of the ranks, threads, checkpoints, thread levels, many layers."""

from __future__ import annotations

import pytest

from tests.mpi.launch import run
from tests.mpi.test_correctness import check

TRANSPORTS = ("host", "shm")
pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300, func_only=True), pytest.mark.usefixtures("compiled")]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_rank_names_the_odd_one_and_goes_on_I5_I6_I10(transport):
    check(run(3, "agreement", transport, limit=120, PYMOE_TIMEOUT_S="20"), 22)


@pytest.mark.parametrize("level", ["single", "funneled", "serialized"])
def test_thread_levels_I7(level):
    check(run(2, "correctness", "auto", "layer", limit=120, MPI4PY_RC_THREAD_LEVEL=level), 22)
    check(run(2, "correctness", "host", "layer", limit=120, MPI4PY_RC_THREAD_LEVEL=level), 22)


@pytest.mark.stress
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_five_thousand_layers_I14(transport):
    """MPICH has no communicator left after 2,046 that are not freed."""
    ended = run(2, "cycles", transport, 5000, limit=280)
    assert ended.status == 0 and "5000 layers" in ended.out, ended


@pytest.mark.large
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_than_two_gigabytes_to_one_rank_I4(transport):
    ended = run(2, "large", transport, limit=280)
    assert ended.status == 0 and "right" in ended.out, ended
