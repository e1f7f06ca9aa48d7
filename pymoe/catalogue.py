"""Every CUDA kernel instance that the library can ask for, by architecture."""

from __future__ import annotations

from pymoe.device.jit import PROBE, KernelId

__all__ = ["all_kernels"]


def all_kernels(arch: str) -> tuple[KernelId, ...]:
    """Return the instances for an architecture, such as "sm_90a", each once, sorted by unit and expression."""
    return tuple(sorted({PROBE}))
