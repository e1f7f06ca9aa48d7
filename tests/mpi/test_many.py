"""More ranks than any machine of ours has cores."""

from __future__ import annotations

import pytest

from tests.mpi.launch import run
from tests.mpi.test_correctness import TRANSPORTS, check

pytestmark = [pytest.mark.mpi, pytest.mark.stress, pytest.mark.timeout(600)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_thirty_two_ranks(transport):
    nodes = {"PYMOE_NODE_SIZE": "8"} if transport == "hier" else {}
    check(run(32, "many", transport, 6, limit=500, PYMOE_TIMEOUT_S="300", **nodes), 6)
