"""CUDA kernels by name: compiled by NVRTC, kept as cubins on disk, loaded once per device.

Compiling needs NVRTC and the CUDA headers, but neither a driver nor a GPU; loading needs CuPy and a device.
"""

from __future__ import annotations

import importlib.resources
import io
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pymoe.device import arch as archs
from pymoe.errors import BackendUnavailableError, KernelCompileError, complaint

__all__ = ["CompiledKernel", "KernelId", "compile_kernel", "load_kernel", "source_folder"]


class KernelId(NamedTuple):
    """The name of one kernel instance.

    ``unit`` is the path of a ``.cu`` in ``cuda_src``, such as ``permute/permute.cu``; ``expression`` is the instance as
    C++ names it, such as ``pymoe::permute_kernel<8>``.
    """

    unit: str
    expression: str


class CompiledKernel(NamedTuple):
    """A kernel as machine code: the cubin, its entry point's mangled name, and what the assembler said of it."""

    cubin: bytes
    symbol: str
    log: str


_OPTIONS = {
    "std": "c++17",
    # The definitions in NumPy are IEEE single precision: no flush to zero, true division and roots.
    "ftz": False,
    "prec_div": True,
    "prec_sqrt": True,
    "fma": True,
    "ptxas_options": ["-v", "-warn-spills"],
}


def compile_kernel(kernel: KernelId, arch: str) -> CompiledKernel:
    """Compile one kernel instance.

    Parameters
    ----------
    kernel : KernelId
    arch : str
        One of `pymoe.device.arch.ARCHS`, such as "sm_90a".

    Raises
    ------
    ArgumentError
        `arch` is unknown.
    BackendUnavailableError
        NVRTC, cuda-core or the CUDA headers are missing.
    KernelCompileError
        The source does not compile; carries the unit, the options and the compiler's log.
    """
    archs.limits(arch)
    core = _cuda_core()
    path = source_folder() / kernel.unit
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise KernelCompileError(complaint("compile_kernel", kernel.unit, "be a readable file", error)) from None
    log = io.StringIO()
    options = core.ProgramOptions(name=kernel.unit, arch=arch, include_path=_include_path(), **_OPTIONS)
    try:
        program = core.Program(source, "c++", options)
        code = program.compile("cubin", name_expressions=(kernel.expression,), logs=log)
    except Exception as error:
        raise KernelCompileError(
            f"compile_kernel: {kernel.unit} must compile for {arch}; {kernel.expression} does not.\n"
            f"options: {_OPTIONS}\n{error}"
        ) from None
    return CompiledKernel(bytes(code.code), code.symbol_mapping[kernel.expression].decode(), log.getvalue())


_lock = threading.Lock()
_loaded: dict[tuple[KernelId, int], Any] = {}


def load_kernel(kernel: KernelId, device: int | None = None) -> Any:
    """Return a kernel as a CuPy function of one device, loaded there once.

    Parameters
    ----------
    kernel : KernelId
    device : int, optional
        Default CuPy's current device, which is the same afterwards.
    """
    import cupy

    number = cupy.cuda.runtime.getDevice() if device is None else device
    function = _loaded.get((kernel, number))
    if function is None:
        with _lock, cupy.cuda.Device(number):
            if (kernel, number) not in _loaded:
                compiled = compile_kernel(kernel, archs.current_arch())
                module = cupy.cuda.function.Module()
                module.load(compiled.cubin)
                _loaded[kernel, number] = module.get_function(compiled.symbol)
            function = _loaded[kernel, number]
    return function


@lru_cache(maxsize=1)
def source_folder() -> Path:
    """Return the folder of the device code, installed or in a checkout."""
    try:
        return Path(str(importlib.resources.files("pymoe.cuda_src")))
    except ModuleNotFoundError:  # a bare checkout has the folder beside the package
        return Path(__file__).parents[2] / "cuda_src"


def _cuda_core() -> Any:
    try:
        import cuda.core
    except ImportError as error:
        remedy = "Install the extra: pip install 'pymoe[cu13]'"
        raise BackendUnavailableError(complaint("pymoe", "cuda-core", "be importable", error, remedy)) from None
    return cuda.core


@lru_cache(maxsize=1)
def _include_path() -> list[str]:
    """Return the folders of headers: ours, and those of the CUDA runtime, since NVRTC has no default path."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None:
        remedy = "Install the extra: pip install 'pymoe[cu13]'"
        raise BackendUnavailableError(complaint("pymoe", "the CUDA headers", "be installed", "none", remedy))
    cccl = find_nvidia_header_directory("cccl")
    return [str(source_folder()), str(found), *([str(cccl)] if cccl else [])]
