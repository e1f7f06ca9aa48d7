"""From a communicator to a group: a duplicate for pymoe alone, and the transport that all ranks can use."""

from __future__ import annotations

from typing import Any

from pymoe import environment
from pymoe.comm.control import MpiControl
from pymoe.comm.group import Group
from pymoe.comm.mpi import bounded, check_communicator, finish, load_mpi, mpi_call, mpi_lock
from pymoe.comm.probe import TRANSPORTS, choose, forget_startup_segment
from pymoe.comm.runner import warn_unless_guarded
from pymoe.comm.transports.host import HostTransport
from pymoe.comm.transports.local import LocalTransport
from pymoe.errors import ArgumentError, DTypeError, complaint

_keyval: int | None = None


def open_group(call: str, comm: Any, transport: str) -> Group:
    """Return the group of a communicator, built by the first layer on it; collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm or Group
    transport : str
        One of `TRANSPORTS`; "auto" leaves the choice to ``PYMOE_TRANSPORT``, then to pymoe.
    """
    wanted = transport_name(call, transport)
    if isinstance(comm, Group):
        comm.users += 1
        return comm
    check_communicator(call, comm)
    with mpi_lock():
        found: dict[str, Group] = comm.Get_attr(_key()) or {}
    group = found.get(wanted)
    if group is None or group.broken is not None:
        warn_unless_guarded(comm)
        group = _build(call, comm, wanted)
        found = {**found, wanted: group}
        with mpi_lock():
            comm.Set_attr(_key(), found)

    def forget(broken: bool) -> None:
        found.pop(wanted, None)

    group.on_close.append(forget)
    group.users += 1
    return group


def transport_name(call: str, transport: Any) -> str:
    """Return the transport asked for by argument or variable, or refuse one that does not exist."""
    if not isinstance(transport, str):
        raise DTypeError(complaint(call, "transport", "be a string", type(transport).__name__))
    label, wanted = "transport", transport
    if transport == "auto":
        label, wanted = "PYMOE_TRANSPORT", environment.transport()
    if wanted not in TRANSPORTS:
        raise ArgumentError(complaint(call, label, f"be one of {', '.join(TRANSPORTS)}", repr(wanted)))
    return wanted


def _key() -> int:
    """Return the key under which a communicator carries its groups."""
    global _keyval
    if _keyval is None:
        _keyval = load_mpi().Comm.Create_keyval()
    return _keyval


def _build(call: str, comm: Any, wanted: str) -> Group:
    """Duplicate the communicator and agree on a transport."""
    if comm.Get_size() == 1:
        local = LocalTransport()
        return Group(MpiControl(comm), local, local, [(name, "one rank") for name in TRANSPORTS[2:]])
    forget_startup_segment()
    seconds = environment.timeout_s()
    with mpi_call("the communicator's duplicate"), mpi_lock():
        own, request = comm.Idup()
    finish(call, request, seconds, "the communicator's duplicate")
    control = MpiControl(own)
    host = HostTransport(own)
    group = Group(control, host, host)

    def free(broken: bool) -> None:
        # Freeing is collective: with a rank that does not answer, the communicator is left to the end of the process.
        if group.control is not control:
            control.close(broken)
        if not broken:
            bounded(call, "the communicator's end", seconds, own.Free)

    group.on_close.append(free)
    try:
        choose(call, group, own, wanted)
    except BaseException:
        group.close(call)
        raise
    return group
