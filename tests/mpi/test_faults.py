"""A rank fails: every survivor says which, the job ends in time, nothing is left behind, the next job works.

Each case is a job of its own, with a deadline of 2 s between ranks and a time limit that no hang survives.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.mpi.launch import mpiexec, run

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(120)]
RANKS, DEADLINE = 3, 2.0
STAGES = ("dispatch", "experts", "combine", "close")
VICTIMS = range(RANKS)


def shared_memory():
    """Return the names that MPIs put into this machine's shared memory and that no process has in use."""
    names = re.compile(r"mpich|ucx|osc_sm|sm_segment|vader|ompi|psm")
    return {path.name for path in Path("/dev/shm").iterdir() if names.search(path.name) and not in_use(path)}


def left_behind(before, seconds=10.0):
    """Return what is there that was not before; what another job is just making is in use a moment later."""
    end = time.monotonic() + seconds
    while (left := shared_memory() - before) and time.monotonic() < end:
        time.sleep(0.2)
    return left


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


def seconds_after_the_fault(ended):
    """Return how long a job that has just ended went on after its rank failed."""
    return time.time() - float(re.search(r"^FAULT (\S+)", ended.out, re.MULTILINE)[1])


def raised(ended):
    """Return {rank: (blamed rank, text)} of what ranks raised."""
    found = re.findall(r"RANK (\d+) RAISED by=(\w+) (.*)", ended.out)
    return {int(rank): (blamed, text) for rank, blamed, text in found}


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("stage", STAGES[:3])
def test_every_rank_raises_the_same_error_and_a_new_layer_works_I1(stage, victim):
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
    assert ended.status not in (0, None) and seconds_after_the_fault(ended) < DEADLINE + 10, ended
    assert left_behind(before) == set()
    if victim == 0:
        again = job("none", "none", victim)
        assert again.status == 0 and raised(again) == {}, again


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stalled_rank_is_named_by_every_survivor(stage, victim):
    before = shared_memory()
    ended = job("stop", stage, victim)
    assert ended.status not in (0, None) and seconds_after_the_fault(ended) < DEADLINE + 10, ended
    errors = raised(ended)
    # The first survivor that ends takes the job with it; those that raised before that named the victim.  A launcher
    # may wake the victim to end it: it then reads that it was given up, and names itself.
    assert errors.keys() - {victim}, ended
    assert {blamed for blamed, _ in errors.values()} == {str(victim)}, ended
    assert all(f"rank {victim} must answer within 2 s" in text for _, text in errors.values()), ended
    assert left_behind(before) == set()


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


def test_survivors_of_a_killed_rank_raise_where_the_launcher_lets_them_live():
    version = subprocess.run([mpiexec(), "--version"], capture_output=True, text=True).stdout
    if "(Open MPI) 5" not in version:
        pytest.skip(f"only Open MPI 5 has --with-ft ulfm: {version.splitlines()[0]}")
    for transport in ("host", "shm"):
        ended = job("kill", "experts", 1, transport, launcher=("--with-ft", "ulfm"))
        assert ended.status not in (0, None), ended
        errors = raised(ended)
        assert errors and {blamed for blamed, _ in errors.values()} == {"1"}, ended


@pytest.mark.parametrize("stage", ["experts", "close"])
def test_a_rank_that_leaves_is_named_at_once(stage):
    ended = job("leave", stage, 1, PYMOE_TIMEOUT_S="30")
    assert ended.status not in (0, None) and ended.seconds < 25, ended
    assert {blamed for blamed, _ in raised(ended).values()} == {"1"}, ended
