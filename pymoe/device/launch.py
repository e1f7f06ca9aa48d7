"""One launch of a kernel as a value: which instance, how many blocks, how much shared memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from pymoe.device import arch as archs
from pymoe.device import toolkit
from pymoe.device.jit import KernelId, compile_kernel, load_kernel
from pymoe.device.tape import Recorder, current_recorder
from pymoe.errors import ArgumentError, DTypeError, UnsupportedError, complaint

__all__ = ["LaunchPlan"]

_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)
_CLUSTER_BLOCKS = 8
"""Blocks of a cluster that every device with clusters can place."""
_SHARED_WITHOUT_OPT_IN = 48 * 1024


@dataclass(frozen=True, slots=True)
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
        Blocks of a cluster, each a divisor of the grid's; needs sm_90 or later.
    programmatic : bool
        Whether the launch may overlap the end of the kernel before it (programmatic dependent launch); needs sm_90 or
        later, and a kernel that waits (`ptx::wait_for_previous`) before it reads or writes.
    leading_pointers : int
        How many addresses a structure that the kernel takes by value begins with.

    Raises
    ------
    ArgumentError
        A size is outside what every architecture allows.
    """

    kernel: KernelId
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0
    cluster: tuple[int, int, int] | None = None
    programmatic: bool = False
    leading_pointers: int = field(default=0, repr=False)
    _functions: dict[int, Callable[..., None]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_sizes("grid", self.grid, _GRID_LIMITS)
        self._check_sizes("block", self.block, _BLOCK_LIMITS)
        if self.block[0] * self.block[1] * self.block[2] > archs.MAX_THREADS:
            self._refuse("block", f"have at most {archs.MAX_THREADS} threads", self.block)
        if self.shared_bytes < 0:
            self._refuse("shared_bytes", "be 0 or more", self.shared_bytes)
        if self.cluster is not None:
            self._check_sizes("cluster", self.cluster, self.grid)
            if self.cluster[0] * self.cluster[1] * self.cluster[2] > _CLUSTER_BLOCKS:
                self._refuse("cluster", f"have at most {_CLUSTER_BLOCKS} blocks", self.cluster)
            if any(blocks % size for blocks, size in zip(self.grid, self.cluster, strict=True)):
                self._refuse("cluster", f"divide the grid {self.grid}", self.cluster)

    def __call__(self, *args: Any) -> None:
        """Launch on CuPy's current stream of its current device.

        Parameters
        ----------
        *args
            CuPy arrays (C-contiguous: kernels see a pointer only), NumPy scalars of the parameters' own types, and 0
            for a null pointer.

        Raises
        ------
        ArgumentError, UnsupportedError
            The kernel cannot run so on this device.
        DTypeError
            The first call on a device: the arguments are not those that the kernel takes.
        """
        device = _current_device()
        function = self._functions.get(device)
        if function is None:
            function = self._prepare(device, args)
        function(self.grid, self.block, args, self.shared_bytes)
        recorder = current_recorder()
        if recorder is not None:
            self._note(recorder, function, args)

    def _note(self, recorder: Recorder, function: Any, args: tuple[Any, ...]) -> None:
        if self.cluster is not None or self.programmatic:
            recorder.refuse()
        else:
            recorder.note(function, self.grid, self.block, self.shared_bytes, args, self.leading_pointers)

    def _prepare(self, device: int, args: tuple[Any, ...]) -> Callable[..., None]:
        """Load the kernel on the current device and check this launch against both, once."""
        loaded = _loaded(self.kernel, device)
        self._check_device(loaded)
        check_arguments(self.kernel, loaded.parameters, args)
        extended = self.cluster is not None or self.programmatic
        function = self._extended(loaded.arch) if extended else loaded.function
        return self._functions.setdefault(device, function)

    def _check_device(self, loaded: Loaded) -> None:
        """Refuse what the architecture or the kernel's resources do not allow; raise the limit of shared memory."""
        limits = archs.limits(loaded.arch)
        if (self.cluster is not None or self.programmatic) and not limits.clusters:
            what = "cluster" if self.cluster is not None else "programmatic"
            rule = "not be asked of an architecture before sm_90"
            raise UnsupportedError(complaint(f"launch of {self.kernel}", what, rule, loaded.arch))
        if self.block[0] * self.block[1] * self.block[2] > loaded.threads:
            rule = f"have at most {loaded.threads} threads, by the kernel's registers or bounds"
            self._refuse("block", rule, self.block)
        room = limits.shared_bytes - loaded.static_bytes
        if self.shared_bytes > room:
            self._refuse("shared_bytes", f"be at most {room} on {loaded.arch}", self.shared_bytes)
        if self.shared_bytes + loaded.static_bytes > _SHARED_WITHOUT_OPT_IN:
            # To the device's limit, whatever this plan asks for: the setting belongs to the kernel, which has others.
            loaded.allow_shared(room)

    def _extended(self, arch: str) -> Callable[..., None]:
        """Return a launcher with the attributes that CuPy's launch has not; it takes what a CuPy function takes."""
        import cupy

        core = toolkit.cuda_core()
        compiled = compile_kernel(self.kernel, arch)
        kernel = core.ObjectCode.from_cubin(compiled.cubin).get_kernel(compiled.symbol)
        cluster = self.cluster
        config = core.LaunchConfig(
            # cuda.core counts clusters where there are any.
            grid=self.grid if cluster is None else tuple(n // c for n, c in zip(self.grid, cluster, strict=True)),
            block=self.block,
            cluster=cluster,
            shmem_size=self.shared_bytes,
            programmatic_stream_serialization=self.programmatic,
        )

        # A handle says all that a launch needs, so one that is given to a new stream may keep its entry.
        stream_of = lru_cache(maxsize=64)(core.Stream.from_handle)

        def launch(grid: object, block: object, args: tuple[Any, ...], shared_bytes: object) -> None:
            pointers = [a.data.ptr if isinstance(a, cupy.ndarray) else a for a in args]
            core.launch(stream_of(cupy.cuda.get_current_stream().ptr), config, kernel, *pointers)

        return launch

    def _check_sizes(self, name: str, sizes: tuple[int, ...], limits: tuple[int, ...]) -> None:
        if len(sizes) != 3 or not all(1 <= size <= limit for size, limit in zip(sizes, limits, strict=True)):
            self._refuse(name, f"be three numbers from 1 to {limits}", sizes)

    def _refuse(self, name: str, rule: str, value: object) -> None:
        raise ArgumentError(complaint(f"launch of {self.kernel}", name, rule, value))


class Loaded(NamedTuple):
    """A kernel on a device, and what it and the device allow."""

    function: Any
    arch: str
    threads: int
    """Threads of a block at most, by the kernel's registers and launch bounds."""
    static_bytes: int
    """Static shared memory of a block."""
    parameters: tuple[int, ...]
    """Bytes of each parameter."""

    def allow_shared(self, nbytes: int) -> None:
        """Let launches ask for up to `nbytes` of dynamic shared memory."""
        from cupy.cuda import driver

        driver.funcSetAttribute(self.function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, nbytes)


@lru_cache(maxsize=4096)
def _loaded(kernel: KernelId, device: int) -> Loaded:
    from cupy.cuda import driver

    function = load_kernel(kernel, device)
    threads = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function.ptr)
    static_bytes = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function.ptr)
    return Loaded(function, archs.current_arch(), threads, static_bytes, parameter_sizes(function))


def parameter_sizes(function: Any) -> tuple[int, ...]:
    """Return the bytes of each parameter of a CuPy function, as the driver knows them from the cubin."""
    from cuda.bindings import driver

    sizes: list[int] = []
    while True:
        status, _, size = driver.cuFuncGetParamInfo(driver.CUfunction(function.ptr), len(sizes))
        if status != driver.CUresult.CUDA_SUCCESS:
            return tuple(sizes)
        sizes.append(size)


def check_arguments(kernel: KernelId, sizes: tuple[int, ...], args: tuple[Any, ...]) -> None:
    """Refuse arguments whose number or widths are not the kernel's: it would read what lies beside them.

    A Python number is 8 bytes wide (int64 or double), whatever the parameter.
    """
    call = f"launch of {kernel}"
    if len(args) != len(sizes):
        raise DTypeError(complaint(call, "args", f"be {len(sizes)} arguments", len(args)))
    for number, (arg, size) in enumerate(zip(args, sizes, strict=True)):
        if type(arg) in (float, bool):  # CuPy would pass 8 bytes, which a pointer or an int64 has as well
            remedy = "Pass a NumPy scalar"
            raise DTypeError(complaint(call, f"args[{number}]", "be typed", f"the Python number {arg}", remedy))
        width = 8 if isinstance(arg, int) or hasattr(arg, "__cuda_array_interface__") else getattr(arg, "nbytes", size)
        if width != size:
            raise DTypeError(complaint(call, f"args[{number}]", f"be {size} bytes", f"{width} ({type(arg).__name__})"))


def _first_device() -> int:
    """Find CuPy's function on the first launch; every later one calls it directly."""
    global _current_device
    toolkit.device_count()
    from cupy.cuda import runtime

    _current_device = runtime.getDevice
    return runtime.getDevice()


_current_device: Callable[[], int] = _first_device


def _refuse_in_a_fork() -> int:
    raise toolkit.used_before_fork()


def _after_fork() -> None:
    """In a child of a process that has launched, the driver refuses every call, in words that do not say why."""
    global _current_device
    if _current_device is not _first_device:
        _current_device = _refuse_in_a_fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
