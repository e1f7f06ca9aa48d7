"""Programs over several ranks that end when one of them fails.

Under plain ``mpiexec python`` an uncaught exception on one rank leaves the others waiting for ever: MPI knows nothing
of Python's exceptions, and its own finalization waits for all.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pymoe import environment
from pymoe.comm.mpi import load_mpi
from pymoe.errors import ArgumentError, BackendUnavailableError, complaint

_guarded = False
_warned = False


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """End all ranks when an exception leaves the block on one of them, after its traceback has been printed.

    ``SystemExit`` with status 0 or None passes; with another status it ends all ranks with that status.

    Examples
    --------
    >>> import pymoe
    >>> with pymoe.abort_on_error():  # doctest: +SKIP
    ...     main(comm)
    """
    global _guarded
    before, _guarded = _guarded, True
    try:
        yield
    except SystemExit as error:
        if error.code in (None, 0):
            raise
        if not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        _abort(error.code if isinstance(error.code, int) else 1)
        raise
    except BaseException:
        # At once: a launcher that ends the job drops what comes later, of other ranks that fail too.
        sys.stderr.write(traceback.format_exc())
        _abort(1)
        raise
    finally:
        _guarded = before


def run_program(program: str, arguments: Sequence[str]) -> None:
    """Run a Python program as ``__main__`` on this rank, ending all ranks when it fails."""
    sys.argv[:] = [program, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
    with abort_on_error():
        runpy.run_path(program, run_name="__main__")


def launch(ranks: int, program: str, arguments: Sequence[str], mpiexec: str | None = None) -> int:
    """Start a Python program on `ranks` ranks of this machine and return its exit status.

    Parameters
    ----------
    mpiexec : str, optional
        Launcher; default the one beside this Python, then the first in PATH.
    """
    if ranks < 1:
        raise ArgumentError(complaint("pymoe mpirun", "-n", "be at least 1", ranks))
    own = Path(sys.executable).with_name("mpiexec")
    found = mpiexec or (str(own) if own.exists() else shutil.which("mpiexec"))
    if found is None:
        remedy = "Install an MPI: pip install mpich"
        raise BackendUnavailableError(complaint("pymoe mpirun", "mpiexec", "be installed", "none", remedy))
    command = [found, "-n", str(ranks), sys.executable, "-m", "pymoe", "mpirun", program, *arguments]
    return subprocess.run(command, env=environment.for_ranks(ranks)).returncode


def _abort(status: int) -> None:
    MPI = load_mpi()
    sys.stdout.flush()
    sys.stderr.flush()
    if MPI.COMM_WORLD.Get_size() > 1 and not MPI.Is_finalized():
        MPI.COMM_WORLD.Abort(status if 0 < status < 256 else 1)


def warn_unless_guarded(comm: Any) -> None:
    """Warn once where an exception on one rank would leave the others waiting."""
    global _warned
    if _warned or _guarded or comm.Get_size() < 2 or "mpi4py.run" in sys.modules:
        return
    _warned = True
    remedy = "start it by python -m pymoe mpirun or python -m mpi4py, or put pymoe.abort_on_error() around it"
    text = f"an uncaught exception on one rank of this program would leave the others waiting: {remedy}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
