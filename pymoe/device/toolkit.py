"""What of CUDA is on this machine: NVRTC, the headers, the driver, the devices; and the remedy for what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from pymoe.errors import BackendUnavailableError, complaint

__all__ = [
    "check_arch",
    "cuda_core",
    "device_count",
    "include_path",
    "likely_nvrtc_version",
    "nvrtc_version",
    "used_before_fork",
    "why_no_device",
]

INSTALL = "pip install 'pymoe[cu13]' (CUDA 12: 'pymoe[cu12]')"
_NO_DRIVER, _INITIALIZATION_ERROR, _NO_DEVICE = 35, 3, 100
"""cudaErrorInsufficientDriver, also where there is none; cudaErrorInitializationError; cudaErrorNoDevice."""


@lru_cache(maxsize=1)
def cuda_core() -> Any:
    """Return the module ``cuda.core``."""
    try:
        from cuda import core  # not `import cuda.core`: while another thread imports it, `cuda` has no such attribute
    except ImportError as error:
        raise _missing("cuda-core", "be importable", error) from None
    return core


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """Return the version of the CUDA compiler library that `cuda_core` uses."""
    cuda_core()
    from cuda.bindings import nvrtc

    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the finder of libraries has several kinds, none of them documented
        raise _missing("NVRTC", "be installed", _first_line(error)) from None
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise _missing("NVRTC", "say its version", status)
    return major, minor


@lru_cache(maxsize=1)
def likely_nvrtc_version() -> tuple[int, int]:
    """Return the version of NVRTC as its package gives it, without loading the library, which takes 10 ms and more.

    A guess: a library that the process had loaded before, or one that was put in its place, is another.
    """
    try:
        major = importlib.metadata.version("cuda-bindings").split(".")[0]
        package = "nvidia-cuda-nvrtc" + ("-cu12" if major == "12" else "")
        version = importlib.metadata.version(package).split(".")
        return int(version[0]), int(version[1])
    except (importlib.metadata.PackageNotFoundError, ValueError, IndexError):
        return nvrtc_version()


@lru_cache(maxsize=1)
def nvrtc_archs() -> tuple[int, ...]:
    """Return the numbers of the architectures that NVRTC compiles for, such as 90."""
    nvrtc_version()
    from cuda.bindings import nvrtc

    return tuple(nvrtc.nvrtcGetSupportedArchs()[1])


def check_arch(arch: str) -> None:
    """Raise `BackendUnavailableError` if this NVRTC does not know the architecture `arch`."""
    if int(arch.removeprefix("sm_").removesuffix("a")) not in nvrtc_archs():
        version = ".".join(map(str, nvrtc_version()))
        rule = f"be one that NVRTC {version} knows (sm_{min(nvrtc_archs())} to sm_{max(nvrtc_archs())})"
        remedy = "Install a newer NVRTC: pip install -U nvidia-cuda-nvrtc"
        raise BackendUnavailableError(complaint("pymoe", "arch", rule, arch, remedy))


@lru_cache(maxsize=1)
def include_path() -> tuple[Path, ...]:
    """Return the folders of the CUDA headers, since NVRTC has no default path."""
    cuda_core()
    from cuda.pathfinder import find_nvidia_header_directory

    runtime = find_nvidia_header_directory("cudart")
    if runtime is None or not Path(runtime, "cuda_bf16.h").is_file():
        raise _missing("the CUDA runtime's headers", "be installed", runtime or "none")
    cccl = find_nvidia_header_directory("cccl")
    return (Path(runtime), Path(cccl)) if cccl else (Path(runtime),)


def device_count() -> int:
    """Return the number of CUDA devices.

    Raises
    ------
    BackendUnavailableError
        CuPy or the driver is missing, there is no device, or this process is a fork of one that used CUDA.
    """
    if importlib.util.find_spec("cupy") is None:
        raise _missing("CuPy", "be installed", "no such package")
    try:
        from cupy.cuda import runtime
    except Exception as error:  # CuPy raises more than ImportError where the CUDA libraries do not fit it
        raise _missing("CuPy", "be importable", _first_line(error)) from None
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        found = "none" if runtime.driverGetVersion() == 0 else _first_line(error)
        raise _no_device(error.status, found) from None
    if count == 0:
        raise _no_device(_NO_DEVICE, "none")
    return count


def why_no_device() -> str:
    """Return why no CUDA device can be used, with the remedy; empty if one can."""
    try:
        device_count()
    except BackendUnavailableError as error:
        return str(error)
    return ""


def used_before_fork(found: str = "a fork of one that had begun") -> BackendUnavailableError:
    """Return the error of a process whose parent had used CUDA before it forked: the driver serves the parent only."""
    remedy = 'Start workers by multiprocessing.get_context("spawn"), or use CUDA in the workers alone'
    return BackendUnavailableError(complaint("pymoe", "the process", "begin to use CUDA itself", found, remedy))


def _no_device(status: int, text: str) -> BackendUnavailableError:
    if status == _NO_DRIVER:
        remedy = "Install NVIDIA's driver, or a newer one; the NumPy path needs none"
        return BackendUnavailableError(
            complaint("pymoe", "the CUDA driver", "be installed and new enough", text, remedy)
        )
    if status == _INITIALIZATION_ERROR:
        return used_before_fork(text)
    remedy = "See nvidia-smi and CUDA_VISIBLE_DEVICES; the NumPy path needs no device"
    return BackendUnavailableError(complaint("pymoe", "a CUDA device", "be visible", text, remedy))


def _missing(what: str, rule: str, found: object) -> BackendUnavailableError:
    return BackendUnavailableError(complaint("pymoe", what, rule, found, f"Install the extra: {INSTALL}"))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
