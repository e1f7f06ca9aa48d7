"""A rank fails: every survivor says which, the job ends in time, nothing is left behind, the next job works.

Each case is a job of its own, with a deadline of 2 s between ranks and a time limit that no hang survives.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

from tests.mpi.launch import run

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(120)]
RANKS, DEADLINE = 3, 2.0
STAGES = ("dispatch", "experts", "combine", "close")
VICTIMS = range(RANKS)


def shared_memory():
    """Return what this machine's shared memory holds, but for what other users and programs put there meanwhile."""
    names = re.compile(r"mpich|ucx|osc_sm|sm_segment|vader|ompi|psm")
    found = {path for path in Path("/dev/shm").iterdir() if names.search(path.name)}
    return {path.name for path in found if path.stat().st_uid == os.getuid() and not in_use(path)}


def in_use(path):
    """Return whether a process that runs maps a file."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(path) in maps.read_text():
                return True
        except OSError:
            continue
    return False


def transport_of(stage, victim):
    """Take turns, so that both transports meet every stage and every place."""
    if stage not in STAGES:
        return "auto"
    return ("shm", "host")[(STAGES.index(stage) + victim) % 2]


def job(fault, stage, victim, transport=None, limit=60.0, **environment):
    """Run a job with a folder of its own for temporary files, which must be empty at its end."""
    transport = transport or transport_of(stage, victim)
    with tempfile.TemporaryDirectory(prefix="ep") as folder:
        environment = {"PYMOE_TIMEOUT_S": str(DEADLINE), "TMPDIR": folder} | environment
        ended = run(RANKS, "faults", transport, fault, stage, victim, limit=limit, **environment)
        left = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
        assert left == [], ended
    return ended


def raised(ended):
    """Return {rank: (blamed rank, text)} of what ranks raised."""
    found = re.findall(r"RANK (\d+) RAISED by=(\w+) (.*)", ended.out)
    return {int(rank): (blamed, text) for rank, blamed, text in found}


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("stage", STAGES[:3])
def test_every_rank_raises_the_same_error_and_a_new_layer_works(stage, victim):
    ended = job("raise", stage, victim)
    assert ended.status == 0, ended
    errors = raised(ended)
    assert sorted(errors) == list(range(RANKS)), ended
    (only,) = set(errors.values())
    assert only[0] == str(victim) and f"rank {victim} must complete the call; got RuntimeError: planted" in only[1]
    assert ended.out.count("WORKS AGAIN") == RANKS, ended


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", ["kill", "exit"])
def test_a_rank_that_dies_ends_the_job_and_leaves_nothing(fault, stage, victim):
    before = shared_memory()
    ended = job(fault, stage, victim)
    assert ended.status not in (0, None), ended
    assert shared_memory() - before == set()
    if victim == 0:
        again = job("none", "none", victim)
        assert again.status == 0 and raised(again) == {}, again


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stalled_rank_is_named_by_every_survivor(stage, victim):
    before = shared_memory()
    ended = job("stop", stage, victim)
    assert ended.status not in (0, None), ended
    errors = raised(ended)
    # The first survivor that ends takes the job with it; those that raised before that named the victim.
    assert errors and victim not in errors, ended
    assert {blamed for blamed, _ in errors.values()} == {str(victim)}, ended
    assert all(f"rank {victim} must answer within 2 s" in text for _, text in errors.values()), ended
    assert shared_memory() - before == set()


@pytest.mark.parametrize("stage", STAGES[:3])
def test_an_error_between_nodes(stage):
    """Rows under way between nodes cannot be taken back: the layer is lost, and a new one works."""
    ended = job("raise", stage, 1, "hier", PYMOE_NODE_SIZE="2")
    assert ended.status == 0 and set(raised(ended)) == set(range(RANKS)), ended
    assert ended.out.count("WORKS AGAIN") == RANKS, ended


@pytest.mark.parametrize("victim", VICTIMS)
def test_an_error_at_close_ends_the_job(victim):
    ended = job("raise", "close", victim)
    assert ended.status not in (0, None), ended
    assert "RuntimeError: planted" in ended.err


@pytest.mark.parametrize("stage", ["experts", "close"])
def test_a_rank_that_leaves_is_named_at_once(stage):
    ended = job("leave", stage, 1, PYMOE_TIMEOUT_S="30")
    assert ended.status not in (0, None) and ended.seconds < 25, ended
    assert {blamed for blamed, _ in raised(ended).values()} == {"1"}, ended
