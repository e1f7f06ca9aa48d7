"""Every CUDA kernel instance that the library can ask for, by architecture."""

from __future__ import annotations

from pymoe.device.jit import PROBE, KernelId

__all__ = ["all_kernels"]


def all_kernels(arch: str) -> tuple[KernelId, ...]:
    """Return the instances for an architecture, such as "sm_90a", each once, sorted by unit and expression."""
    from pymoe.ops.activation import _cuda as activation
    from pymoe.ops.grouped_gemm import _cuda as grouped_gemm
    from pymoe.ops.permute import _cuda as permute
    from pymoe.ops.quantize import _cuda as quantize
    from pymoe.ops.route import _cuda as route
    from pymoe.ops.unpermute import _cuda as unpermute
    from pymoe.ops.weight_reduce import _cuda as weight_reduce

    stages = (route, quantize, permute, grouped_gemm, activation, unpermute, weight_reduce)
    return tuple(sorted({PROBE, *(kernel for stage in stages for kernel in stage.kernels(arch))}))
