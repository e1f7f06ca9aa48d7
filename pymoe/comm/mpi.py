"""The little that pymoe asks of MPI, in one place: loading it, thread levels, errors, bounded waits."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

from pymoe.comm.waiting import Wait
from pymoe.errors import BackendUnavailableError, CommError, DTypeError, UnsupportedError, complaint

_serial = threading.RLock()


def load_mpi() -> Any:
    """Return ``mpi4py.MPI``, which initialises MPI on first use."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        remedy = "Install the extra and an MPI: pip install 'pymoe[mpi]' mpich"
        raise BackendUnavailableError(complaint("pymoe", "mpi4py", "be importable", reason, remedy)) from error
    return MPI


def check_communicator(call: str, comm: Any) -> None:
    """Refuse what is not an intracommunicator of mpi4py, and threads that this MPI does not allow."""
    kind = f"{type(comm).__module__}.{type(comm).__qualname__}"
    known = type(comm).__module__.partition(".")[0] == "mpi4py" or "mpi4py" in sys.modules
    if not known or not isinstance(comm, load_mpi().Intracomm):
        raise DTypeError(complaint(call, "comm", "be an mpi4py intracommunicator", kind))
    MPI = load_mpi()
    if comm == MPI.COMM_NULL:
        raise DTypeError(complaint(call, "comm", "be a communicator of this rank", "MPI.COMM_NULL"))
    check_thread(call)


def check_thread(call: str) -> None:
    """Refuse a call from a thread that may not use MPI under the level that MPI was started with."""
    MPI = load_mpi()
    if MPI.Is_finalized():
        raise CommError(complaint(call, "MPI", "be running", "MPI after its finalization"))
    level = MPI.Query_thread()
    if level < MPI.THREAD_SERIALIZED and not MPI.Is_thread_main():
        name = "single" if level == MPI.THREAD_SINGLE else "funneled"
        rule = "come from the thread that started MPI"
        raise UnsupportedError(complaint(call, "a call", rule, f"another thread, at thread level {name}"))


@functools.cache
def mpi_lock() -> contextlib.AbstractContextManager[Any]:
    """Return what surrounds every use of MPI: a process-wide lock where MPI allows one thread at a time."""
    MPI = load_mpi()
    return contextlib.nullcontext() if MPI.Query_thread() == MPI.THREAD_MULTIPLE else _serial


class TransportError(CommError):
    """An error of MPI itself."""


class mpi_call:
    """Turn an error of MPI into a `TransportError` that says what was going on."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None and isinstance(error, load_mpi().Exception):
            text = error.Get_error_string()  # type: ignore[attr-defined]
            raise TransportError(complaint("MPI", self._what, "reach every rank", text)) from error


def finish(call: str, request: Any, seconds: float, what: str) -> None:
    """Wait for a request with a deadline."""
    wait = Wait(seconds)
    while True:
        with mpi_call(what), mpi_lock():
            if request.Test():
                return
        if wait.over:
            raise CommError(complaint(call, what, f"end within {seconds:g} s", "a rank that does not take part"))
        wait.pause()


def bounded(call: str, what: str, seconds: float, work: Callable[[], Any]) -> Any:
    """Return ``work()``, a collective of MPI that has no non-blocking form, or raise after `seconds`.

    Under ``MPI_THREAD_MULTIPLE`` the work runs on a thread that is given up at the deadline; below it MPI itself offers
    no way to bound the wait.
    """
    MPI = load_mpi()
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        with mpi_call(what), mpi_lock():
            return work()
    result: list[Any] = []

    def run() -> None:
        try:
            result.extend((work(), None))
        except BaseException as error:  # handed to the caller
            result.extend((None, error))

    thread = threading.Thread(target=run, name="pymoe-mpi", daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise CommError(complaint(call, what, f"end within {seconds:g} s", "a rank that does not take part"))
    value, error = result
    if error is not None:
        with mpi_call(what):
            raise error
    return value
