"""The CPU's own experts."""

from __future__ import annotations

from pymoe.experts.standard import StandardExperts


class CpuExperts(StandardExperts):
    """Experts on the CPU, compiled by Numba and run on pymoe's own threads.

    Batch-invariant: a row's bits depend on no other row, chunk or thread count.
    """

    _backend = "numba"
