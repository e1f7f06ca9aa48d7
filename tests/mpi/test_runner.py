"""An uncaught exception on one rank ends the job, by each of the ways that pymoe offers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.mpi.launch import OPEN_MPI, PROGRAMS, ROOT, mpiexec, run

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(120)]
PROGRAM = str(PROGRAMS / "uncaught.py")


def test_abort_on_error_under_plain_python():
    ended = run(3, "uncaught", "guarded", runner=(), limit=60)
    assert ended.status not in (0, None) and "RuntimeError: planted" in ended.err, ended
    assert "uncaught exception on one rank" not in ended.err


def test_the_runner_inside_a_launcher():
    ended = run(3, "uncaught", "plain", runner=("-m", "pymoe", "mpirun"), limit=60)
    assert ended.status not in (0, None) and "RuntimeError: planted" in ended.err, ended


def test_a_warning_once_under_plain_python():
    ended = run(2, "uncaught", "fine", runner=(), limit=60)
    assert ended.status == 0 and ended.err.count("would leave the others waiting") == 2, ended
    assert "would leave the others" not in run(2, "uncaught", "fine", limit=60).err


@pytest.mark.parametrize("how, status", [("fine", 0), ("plain", 1)])
def test_the_runner_starts_the_ranks(how, status):
    command = [sys.executable, "-m", "pymoe", "mpirun", "-n", "2", PROGRAM, how, "--n", "-n"]
    folders = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": folders}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment)
    assert (done.returncode != 0) == bool(status), done.stdout + done.stderr
    if not status:
        assert sorted(done.stdout.split("\n"))[1:] == [f"rank {r} ends with ['fine', '--n', '-n']" for r in (0, 1)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_doctor_tries_the_transports(ranks):
    ended = doctor(ranks)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert f"ranks      {ranks} on 1 node" in lines
    assert f"transport  {'local' if ranks == 1 else 'shm'}" in lines
    assert sum(line.startswith("not ") for line in lines) == 3


@pytest.mark.parametrize(
    "asked, node_size, lines",
    [
        ("host", "", ["transport  host", "not shm    host is asked for"]),
        ("shm", "", ["transport  shm"]),
        ("hier", "2", ["transport  hier", "ranks      3 on 2 nodes", "not host   hier sends less between nodes"]),
        ("", "2", ["transport  hier", "not shm    2 nodes by PYMOE_NODE_SIZE"]),
        ("", "1", ["transport  host", "not hier   one rank a node"]),
    ],
)
def test_a_transport_is_forced_by_a_variable(asked, node_size, lines):
    ended = doctor(3, PYMOE_TRANSPORT=asked, PYMOE_NODE_SIZE=node_size)
    assert ended.returncode == 0, ended.stderr
    assert [line for line in lines if line not in ended.stdout.splitlines()] == [], ended.stdout


@pytest.mark.parametrize(
    "asked, text",
    [
        ("shm", "CommError: MoELayer: transport must be usable to be 'shm'; got 2 nodes by PYMOE_NODE_SIZE."),
        ("local", "CommError: MoELayer: transport must be usable to be 'local'; got 3 ranks."),
        ("pigeons", "PYMOE_TRANSPORT must be one of auto, local, shm, host, hier; got 'pigeons'"),
    ],
)
def test_a_transport_that_cannot_be_used_is_refused_by_every_rank(asked, text):
    ended = run(3, "refused", limit=100, PYMOE_TRANSPORT=asked, PYMOE_NODE_SIZE="2")
    assert ended.status == 0, ended
    everywhere = json.loads([line[line.index("[[") :] for line in ended.out.splitlines() if "[[" in line][-1])
    assert len(everywhere) == 3 and all(text in error and right for error, right in everywhere), ended


def doctor(ranks, **environment):
    """Run the command on several ranks."""
    command = [mpiexec(), "-n", str(ranks), sys.executable, "-m", "pymoe", "doctor", "--mpi"]
    folders = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | OPEN_MPI | {"PYTHONPATH": folders} | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
