"""The definition of what experts compute, in NumPy; slow, and the measure of every other implementation."""

from __future__ import annotations

from pymoe.experts.standard import StandardExperts


class NumpyReferenceExperts(StandardExperts):
    """Experts by the NumPy definition of each stage."""

    _backend = "numpy"
