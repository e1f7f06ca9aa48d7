"""Rows of a device that pass through the host, without a device: which copy waits for which message."""

from __future__ import annotations

import pytest

from tests.mpi.launch import run
from tests.mpi.test_correctness import NODES, TRANSPORTS, check

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300)]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_by_way_of_the_host(transport, ranks):
    check(run(ranks, "staged", transport, limit=120, PYMOE_TIMEOUT_S="20", **NODES.get(transport, {})), 60)


def test_one_rank():
    check(run(1, "staged", "auto", limit=120, PYMOE_TIMEOUT_S="20"), 60)
