"""Every rank's rows have the bits of one process, on every transport."""

from __future__ import annotations

import json
import os

import pytest

from tests.mpi.launch import mpiexec, run

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300, func_only=True), pytest.mark.usefixtures("compiled")]
TRANSPORTS = ("host", "shm", "hier")
# Nodes of two ranks; what does not know nodes does not care.
NODES = {"hier": {"PYMOE_NODE_SIZE": "2"}}


def check(ended, least):
    """Refuse a job that failed, found a wrong row, or ran fewer cases than it should."""
    assert ended.status == 0, ended
    # Libraries may reset a terminal's colours behind it.
    result = json.loads([line[line.index("{") :] for line in ended.out.splitlines() if "{" in line][-1])
    assert result["wrong"] == [], ended
    assert result["cases"] >= least, ended


def test_there_is_a_launcher():
    """Without one, every test of this folder would be missed in silence."""
    assert mpiexec() is not None and os.access(mpiexec(), os.X_OK)


@pytest.mark.parametrize("ranks", [1, 2, 4, 5])
def test_one_rank_and_more_A4_A7_A8_I12(ranks):
    check(run(ranks, "correctness", "auto", "layer", limit=240), 22)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_schemes_and_formats_I11(transport):
    check(run(4, "correctness", transport, "layer", "schemes", "formats", limit=240, **NODES.get(transport, {})), 93)


@pytest.mark.parametrize("ranks, size", [(5, 2), (5, 3), (3, 1), (4, 4)])
def test_nodes_of_different_sizes(ranks, size):
    check(run(ranks, "correctness", "hier", "layer", limit=240, PYMOE_NODE_SIZE=str(size)), 22)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_thousand_rounds_with_jitter_A5_A6_G16_I13(transport):
    check(run(4, "correctness", transport, "rounds", limit=240, **NODES.get(transport, {})), 1)
