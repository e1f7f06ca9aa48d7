"""Which transport all ranks can use: every one is tried, not asked, and all ranks reach the same answer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from pymoe import environment
from pymoe.comm.group import Group
from pymoe.comm.header import TOKENS, Header, Kind
from pymoe.comm.mpi import bounded, load_mpi
from pymoe.comm.transports.hier import HierTransport
from pymoe.comm.transports.shm import ShmControl, ShmTransport
from pymoe.errors import CommError, complaint

Array = Any

TRANSPORTS = ("auto", "local", "shm", "host", "hier")
"""What may be asked for; "auto" takes the first that works, in the order of speed."""


@dataclass(frozen=True)
class Nodes:
    """Which ranks share memory.

    Attributes
    ----------
    of_rank : (R,) int64
        Number of each rank's node, by its lowest rank.
    faked : bool
        Whether ``PYMOE_NODE_SIZE`` cut them.
    """

    of_rank: Array
    faked: bool

    @property
    def number(self) -> int:
        """How many nodes there are."""
        return len(np.unique(self.of_rank))


def choose(call: str, group: Group, comm: Any, wanted: str) -> None:
    """Give the group the transport that is `wanted`, or the best one for "auto"; collective.

    Raises CommError on all ranks where what is wanted cannot be used.
    """
    node_size = environment.node_size()
    with group.guard(call, 2):
        leader = _leader(call, comm, node_size, group)
        counts = np.tile(np.array([leader, 0], np.int64), (group.size, 1))
        names = {"PYMOE_TRANSPORT": wanted, "PYMOE_NODE_SIZE": str(node_size)}
        group.post(Header(Kind.AGREE, names=names), counts)
        _, there, _ = group.collect("while ranks agree on a transport")
        nodes = Nodes(there.receive.copy(), node_size is not None)
        refused = [("local", f"{group.size} ranks")]
        shared = None
        if wanted in ("auto", "shm"):
            shared, reason = _try_shm(call, group, comm, nodes)
            if reason:
                refused.append(("shm", reason))
        else:
            refused.append(("shm", f"{wanted} is asked for"))
        works = np.zeros((group.size, 2), np.int64)
        group.post(Header(Kind.AGREE, tokens=int(shared is not None)), works)
        table, _, _ = group.collect("while ranks try a transport")
        if shared is not None and not (table[:, TOKENS] == 1).all():
            refused.append(("shm", f"rank {int(np.argmin(table[:, TOKENS]))} cannot use it"))
            shared = None
        group.nodes = nodes
        several = 1 < nodes.number < group.size
        if not several:
            refused.append(("hier", "one node" if nodes.number == 1 else "one rank a node"))
        if shared is None and wanted not in ("auto", "host", "hier"):
            reason = dict(refused)[wanted]
            raise CommError(complaint(call, "transport", f"be usable to be {wanted!r}", reason))
    if shared is not None:
        group.control, group.transport = shared
        refused.append(("host", "shm is faster"))
    elif wanted == "hier" or (wanted == "auto" and several):
        group.transport = HierTransport(group.host, group.rank, nodes.of_rank)
        refused.append(("host", "hier sends less between nodes"))
    group.refused = tuple(refused)
    environment.logger.debug("transport %s; refused %s", group.transport.name, refused)


def _leader(call: str, comm: Any, node_size: int | None, group: Group) -> int:
    """Return the lowest rank that shares this rank's memory, or that ``PYMOE_NODE_SIZE`` puts beside it."""
    if node_size is not None:
        return group.rank // node_size * node_size
    MPI = load_mpi()

    def find() -> int:
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        try:
            members, everyone = node.Get_group(), comm.Get_group()
            lowest = min(members.Translate_ranks(None, everyone))
            members.Free()
            everyone.Free()
            return int(lowest)
        finally:
            node.Free()

    return bounded(call, "the search for nodes", environment.timeout_s(), find)


def _try_shm(call: str, group: Group, comm: Any, nodes: Nodes) -> tuple[tuple[ShmControl, ShmTransport] | None, str]:
    """Return a control and a transport in shared memory after each rank has seen the others' words, or the reason."""
    if nodes.number > 1:
        return None, f"{nodes.number} nodes" + (" by PYMOE_NODE_SIZE" if nodes.faked else "")
    seconds = environment.timeout_s()
    try:
        control = ShmControl(call, comm, seconds)
        return (control, ShmTransport(comm, control, seconds)), ""
    except Exception as error:  # whatever MPI or the compiler has against it is a reason to use another transport
        return None, " ".join(str(error).split())


def forget_startup_segment() -> None:
    """Take away the name of the memory that MPICH's ranks shared when they started.

    All ranks of the node have mapped it since MPI_Init, and nobody opens it again; MPICH itself removes the name at the
    end only, so that a job that is killed would leave it in /dev/shm for ever.
    """
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(None, 5)[5].strip() for line in maps if "/dev/shm/mpich_shm_" in line}
    except OSError:
        return
    for path in paths:
        if not path.endswith("(deleted)"):
            try:
                os.unlink(path)
            except OSError:
                pass


def describe(comm: Any) -> list[str]:
    """Return what MPI and the transports of a communicator are, one line each; collective."""
    from pymoe.comm.connect import open_group
    from pymoe.comm.ranks import release

    MPI = load_mpi()
    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized"}
    group = open_group("doctor", comm, "auto")
    try:
        major, minor = MPI.Get_version()
        library = MPI.Get_library_version().splitlines()[0].strip(" \0,")
        nodes = 1 if group.nodes is None else group.nodes.number
        lines = [
            f"MPI        {library} (MPI {major}.{minor}), threads {levels.get(MPI.Query_thread(), 'multiple')}",
            f"ranks      {group.size} on {nodes} node{'s' * (nodes > 1)}",
            f"transport  {group.transport.name}",
        ]
        return lines + [f"not {name:7}{reason}" for name, reason in group.refused]
    finally:
        release("doctor", group)
