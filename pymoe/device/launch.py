"""One launch of a kernel as a value: which instance, how many blocks, how much shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pymoe.device.jit import KernelId, load_kernel

__all__ = ["LaunchPlan"]


@dataclass(frozen=True)
class LaunchPlan:
    """A kernel with its launch configuration; call it with the kernel's arguments to launch.

    Parameters
    ----------
    kernel : KernelId
    grid, block : tuple of int
        Blocks of the grid, threads of a block: three numbers each.
    shared_bytes : int
        Dynamic shared memory of a block.
    cluster : tuple of int, optional
        Blocks of a cluster; needs sm_90 or later.
    programmatic : bool
        Whether the launch may overlap the end of the kernel before it (programmatic dependent launch).
    """

    kernel: KernelId
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    cluster: tuple[int, int, int] | None = None
    programmatic: bool = False
    _functions: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, *args: Any) -> None:
        """Launch on CuPy's current stream of its current device.

        Parameters
        ----------
        *args
            CuPy arrays (C-contiguous: kernels see a pointer only), NumPy scalars of the parameters' own types, and 0
            for a null pointer.
        """
        device = _current_device()
        function = self._functions.get(device)
        if function is None:
            function = self._load(device)
        function(self.grid, self.block, args, self.shared_bytes)

    def _load(self, device: int) -> Any:
        if self.cluster is not None or self.programmatic:
            raise NotImplementedError("clusters")
        function = load_kernel(self.kernel, device)
        if self.shared_bytes > 48 * 1024:
            from cupy_backends.cuda.api import driver

            name = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(function.ptr, name, self.shared_bytes)
        return self._functions.setdefault(device, function)


def _first_device() -> int:
    """Look up CuPy on the first launch, and call it directly from then on."""
    global _current_device
    from cupy.cuda import runtime

    _current_device = runtime.getDevice
    return runtime.getDevice()


_current_device: Callable[[], int] = _first_device
