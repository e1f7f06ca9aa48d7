"""Loads over ranks: what all of them routed, the same numbers on each, so that all make the same plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.comm.header import Header, Kind
from pymoe.comm.plan import as_bytes
from pymoe.comm.ranks import connecting
from pymoe.device.arrays import as_numpy
from pymoe.errors import DTypeError, complaint

Array = Any


def sum_over_ranks(comm: Any, loads: Array) -> Array:
    """Return the sum of all ranks' loads; collective.

    Parameters
    ----------
    comm : mpi4py communicator or Group
    loads : ndarray, (layers, L), integer
        Such as `LoadWindow.total`; of one shape on all ranks.

    Returns
    -------
    ndarray, (layers, L), int64

    Raises
    ------
    DTypeError, ShapeError
        `loads` is no such array, on a single rank.
    CommError
        The shapes differ, or a rank does not answer; on every rank.

    Notes
    -----
    Integers, so that the sum has no order and every rank gets the same bits.
    """
    call = "sum_over_ranks"
    with connecting(call, comm, "auto", keep=False) as group:
        given = as_numpy(call, "loads", loads)
        checks.shape(call, "loads", given, (None, None))
        if given.dtype.kind not in "iu":
            raise DTypeError(complaint(call, "loads", "have an integer dtype", given.dtype))
        rows = np.full((group.size, 2), len(given), np.int64)
        group.post(Header(Kind.AGREE, values={"layers": len(given), "experts": given.shape[1]}), rows)
        _, there, _ = group.collect("while ranks tell their loads")
        parts = group.gather(as_bytes(given.astype(np.int64)), there)
        group.post(Header(Kind.AGREE))
        group.collect("after the loads")
        return np.sum([part.view(np.int64).reshape(given.shape) for part in parts], axis=0, dtype=np.int64)
