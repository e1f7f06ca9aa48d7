"""Start a program on several ranks, in a process group of its own and with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
# Open MPI refuses root, and more ranks than cores, unless told otherwise; MPICH reads none of these.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_osc": "^ucx",
}


@dataclass
class Ended:
    """How a job ended."""

    status: int | None
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"status {self.status} after {self.seconds:.1f} s\n--- out\n{self.out}\n--- err\n{self.err[-6000:]}"


def mpiexec() -> str | None:
    """Return the launcher: ``PYMOE_TEST_MPIEXEC``, the interpreter's own, or the first in PATH."""
    own = Path(sys.executable).with_name("mpiexec")
    return os.environ.get("PYMOE_TEST_MPIEXEC") or (str(own) if own.exists() else shutil.which("mpiexec"))


def start(
    ranks: int,
    program: str,
    *arguments: object,
    runner: tuple[str, ...] = ("-m", "mpi4py"),
    launcher: tuple[str, ...] = (),
    **environment: str,
):
    """Start ``programs/<program>.py`` on `ranks` ranks and return the process."""
    command = [mpiexec(), *launcher, "-n", str(ranks), sys.executable, *runner, str(PROGRAMS / f"{program}.py")]
    folders = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
        env=os.environ | OPEN_MPI | {"PYTHONPATH": folders, "PYMOE_NUM_THREADS": "1"} | environment,
    )


def end(process, limit: float) -> Ended:
    """Wait for a job; after `limit` seconds kill its whole session and return without a status."""
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=limit)
        return Ended(process.returncode, out, err, time.monotonic() - began)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return Ended(None, out, err, time.monotonic() - began)


def run(ranks: int, program: str, *arguments: object, limit: float = 60.0, **options) -> Ended:
    """Run a program to its end."""
    return end(start(ranks, program, *arguments, **options), limit)
