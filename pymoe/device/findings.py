"""What ``python -m pymoe doctor`` says about CUDA: one line an item, with the remedy for what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from pymoe.device import arch as archs
from pymoe.device import cubins, jit, linking, toolkit
from pymoe.device.private import private_folder
from pymoe.errors import PymoeError

__all__ = ["findings", "show"]


def show() -> None:
    """Print the findings, one line each."""
    found = list(findings())
    width = max(len(name) for name, _ in found)
    for name, state in found:
        print(f"{name:{width}}  {' '.join(state.split())}")


def findings() -> Iterator[tuple[str, str]]:
    """Yield (item, state or what is wrong); no item that fails hides another."""
    looks = (("NVRTC", _nvrtc), ("CUDA headers", _headers), ("a kernel", _probe), ("kernel cache", _cache),
             ("numba-cuda", _numba_cuda))  # fmt: skip
    for name, look in looks:
        yield name, _attempt(look)
    why_not = toolkit.why_no_device()
    yield "CUDA driver", f"missing: {why_not}" if why_not else _attempt(_driver)
    for number in range(0 if why_not else toolkit.device_count()):
        yield f"GPU {number}", _attempt(partial(_device, number))


def _attempt(look: Callable[[], str]) -> str:
    try:
        return look()
    except PymoeError as error:
        return f"missing: {error}"
    except Exception as error:  # whatever a broken installation does, the rest is still told
        return f"broken: {type(error).__name__}: {error}"


def _nvrtc() -> str:
    known = toolkit.nvrtc_archs()
    return f"{'.'.join(map(str, toolkit.nvrtc_version()))}, compiles for sm_{min(known)} to sm_{max(known)}"


def _headers() -> str:
    return ", ".join(map(str, toolkit.include_path()))


def _numba_cuda() -> str:
    found = dict(linking.versions())
    version, others = found.pop("numba-cuda"), ", ".join(f"{name} {version}" for name, version in found.items())
    return f"{version} with {others}; for NumbaCudaExperts and own activations that are not translated"


def _driver() -> str:
    from cupy.cuda import runtime

    number = runtime.driverGetVersion()
    try:
        loaded = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        loaded = ""
    return f"for CUDA {number // 1000}.{number % 1000 // 10}  {loaded}"


def _device(number: int) -> str:
    from cupy.cuda import runtime

    properties = runtime.getDeviceProperties(number)  # makes no context, and so takes no memory there
    try:
        arch = archs.arch_of(properties["major"], properties["minor"])
    except PymoeError as error:
        arch = str(error)
    name, gib = properties["name"].decode(errors="replace"), properties["totalGlobalMem"] / 2**30
    return f"{name}, {arch}, {gib:.0f} GiB, {properties['multiProcessorCount']} SMs"


def _cache() -> str:
    try:
        folder = private_folder(cubins.FOLDER)
    except OSError as error:
        return f"off, every process compiles for itself: {error} (PYMOE_CACHE_DIR)"
    files = [path for path in (folder / "entries").rglob("*") if path.is_file()]
    mib = sum(path.stat().st_size for path in files) / 2**20
    return f"{folder}, {len(files)} kernels, {mib:.1f} MiB"


def _probe() -> str:
    """Compile the smallest kernel, anew, for the newest architecture that NVRTC knows."""
    known = [arch for arch in archs.ARCHS if archs.number_of(arch) in toolkit.nvrtc_archs()]
    if not known:
        return f"none of {', '.join(archs.ARCHS)} is known to this NVRTC"
    started = time.perf_counter()
    jit.compile_now(jit.PROBE, known[-1])
    return f"compiles for {known[-1]} in {time.perf_counter() - started:.2f} s"
