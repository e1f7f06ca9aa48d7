"""Balancing over real ranks: loads summed, one plan on all, the layer's rows to the bit."""

from __future__ import annotations

import pytest

from tests.mpi.launch import run
from tests.mpi.test_correctness import check

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300)]


@pytest.mark.parametrize("ranks", [2, 5])
def test_layers_by_a_plan(ranks):
    check(run(ranks, "balance", limit=240), 6)
