"""CUDA kernels by name: compiled by NVRTC, kept as cubins on disk, loaded once per device.

Compiling needs NVRTC and the CUDA headers, but neither a driver nor a GPU; loading needs CuPy and a device.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pymoe import environment
from pymoe.device import arch as archs
from pymoe.device import cubins, linking, toolkit
from pymoe.device.cubins import CompiledKernel
from pymoe.errors import BackendUnavailableError, KernelCompileError, complaint
from pymoe.formula import ClosedFunction

__all__ = [
    "PROBE",
    "CompiledKernel",
    "KernelId",
    "compile_all",
    "compile_kernel",
    "compile_now",
    "is_kept",
    "load_kernel",
    "source_folder",
]


class KernelId(NamedTuple):
    """The name of one kernel instance.

    ``unit`` is the path of a ``.cu`` in ``cuda_src``, such as ``permute/permute.cu``; ``expression`` is the instance as
    C++ names it, such as ``pymoe::permute_kernel<8>``; ``prelude`` is source that stands before the unit's own: the
    activation of a user, or nothing; ``linked`` is a function that the prelude declares and nvJitLink adds.
    """

    unit: str
    expression: str
    prelude: str = ""
    linked: ClosedFunction | None = None

    def __str__(self) -> str:
        return f"{self.expression} of {self.unit}" + self._own()

    def __repr__(self) -> str:
        return f"KernelId({self.unit!r}, {self.expression!r}{self._own()})"

    def _own(self) -> str:
        """Return which prelude there is, if any: by its digest, since the text is long."""
        return f" after prelude {hashlib.sha256(self.prelude.encode()).hexdigest()[:12]}" if self.prelude else ""


PROBE = KernelId("common/probe.cu", "pymoe::probe_kernel<float>")
"""The smallest kernel: whether it compiles says whether others can."""

_OPTIONS = {
    "std": "c++17",
    # The definitions in NumPy are IEEE single precision: no flush to zero, true division and roots.
    "ftz": False,
    "prec_div": True,
    "prec_sqrt": True,
    "fma": True,
    "ptxas_options": ["-v", "-warn-spills"],
}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">\n]+)[">]', re.MULTILINE)

_lock = threading.Lock()
_compiled: dict[tuple[KernelId, str], Future[CompiledKernel]] = {}
_loaded: dict[tuple[KernelId, int], Any] = {}
_of_the_parent: dict[tuple[KernelId, int], Any] = {}
"""In a forked child: kept, since unloading a module needs the driver, which a child cannot use."""


def compile_kernel(kernel: KernelId, arch: str) -> CompiledKernel:
    """Return a kernel instance as machine code: from this process, from the disk cache, or compiled now.

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
        NVRTC, cuda-core, the CUDA headers or what a linked function needs are missing, or NVRTC is older than `arch`.
    KernelCompileError
        The source does not compile; carries the unit, the options and the compiler's log.  Or the linked function.
    """
    with _lock:
        future = _compiled.get((kernel, arch))
        mine = future is None
        if future is None:
            future = _compiled[kernel, arch] = Future()
    if mine:
        try:
            future.set_result(_read_or_compile(kernel, arch))
        except BaseException as error:
            with _lock:  # the next caller tries again: what was missing may have come
                _compiled.pop((kernel, arch), None)
            future.set_exception(error)
            raise
    return future.result()


def is_kept(kernel: KernelId, arch: str) -> bool:
    """Return whether the disk cache holds a kernel."""
    return cubins.read(cache_key(kernel, arch)) is not None


def compile_all(
    kernels: Iterable[KernelId], arch: str, jobs: int | None = None, done: Callable[[KernelId], None] = lambda _: None
) -> list[CompiledKernel]:
    """Compile many kernels for one architecture, several at a time, since NVRTC releases the interpreter lock.

    Parameters
    ----------
    kernels : iterable of KernelId
    arch : str
    jobs : int, optional
        Compilations at a time; default `environment.num_threads`.
    done : callable, optional
        Called with each kernel once it is compiled, from the threads that compile.

    Raises
    ------
    KernelCompileError, BackendUnavailableError
        As `compile_kernel`; the first of them, once nothing runs any more.
    """

    def one(kernel: KernelId) -> CompiledKernel:
        compiled = compile_kernel(kernel, arch)
        done(kernel)
        return compiled

    with ThreadPoolExecutor(jobs or environment.num_threads(), thread_name_prefix="pymoe-nvrtc") as pool:
        try:
            return list(pool.map(one, kernels))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def load_kernel(kernel: KernelId, device: int | None = None) -> Any:
    """Return a kernel as a CuPy function of one device, loaded there once.

    Parameters
    ----------
    kernel : KernelId
    device : int, optional
        Default CuPy's current device, which is the same afterwards.

    Raises
    ------
    BackendUnavailableError, KernelCompileError
        As `compile_kernel`, or the driver does not load what NVRTC made.
    """
    from cupy.cuda import Device, runtime

    number = runtime.getDevice() if device is None else device
    function = _loaded.get((kernel, number))
    if function is None:
        with Device(number):
            compiled = compile_kernel(kernel, archs.current_arch())
            with _lock:
                if (kernel, number) not in _loaded:
                    _loaded[kernel, number] = _load(kernel, compiled)
                function = _loaded[kernel, number]
    return function


def _load(kernel: KernelId, compiled: CompiledKernel) -> Any:
    from cupy.cuda import driver
    from cupy.cuda.function import Module

    module = Module()
    try:
        module.load(compiled.cubin)
        return module.get_function(compiled.symbol)
    except driver.CUDADriverError as error:
        if "OUT_OF_MEMORY" in str(error):
            raise
        if "NOT_INITIALIZED" in str(error):
            raise toolkit.used_before_fork(str(error)) from None
        version = ".".join(map(str, toolkit.nvrtc_version()))
        rule = f"be new enough for kernels made by NVRTC {version}"
        remedy = "Update the driver, or install the extra of its CUDA version: pip install 'pymoe[cu12]'"
        text = complaint("pymoe", "the CUDA driver", rule, f"{error} for {kernel}", remedy)
        raise BackendUnavailableError(text) from None


def _read_or_compile(kernel: KernelId, arch: str) -> CompiledKernel:
    archs.limits(arch)
    likely = toolkit.likely_nvrtc_version()
    compiled = cubins.read(cache_key(kernel, arch, likely))
    if compiled is None and toolkit.nvrtc_version() != likely:
        compiled = cubins.read(cache_key(kernel, arch))
    if compiled is None:
        compiled = compile_now(kernel, arch)
        cubins.write(cache_key(kernel, arch), compiled)  # under the version that it was made by, guessed or not
    return compiled


def compile_now(kernel: KernelId, arch: str) -> CompiledKernel:
    """Compile a kernel, whatever is kept already; raises as `compile_kernel`."""
    toolkit.check_arch(arch)
    if kernel.linked is None:
        code, log = _compile(kernel, arch, "cubin", _OPTIONS)
        return CompiledKernel(bytes(code.code), code.symbol_mapping[kernel.expression].decode(), log)
    options = {name: value for name, value in _OPTIONS.items() if name != "ptxas_options"}  # there is no assembler yet
    code, _ = _compile(kernel, arch, "ltoir", options | {"link_time_optimization": True})
    cubin, log = linking.link(bytes(code.code), kernel.linked, arch)
    return CompiledKernel(cubin, code.symbol_mapping[kernel.expression].decode(), log)


def _compile(kernel: KernelId, arch: str, kind: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return what NVRTC makes of a kernel, and its log."""
    core = toolkit.cuda_core()
    source = kernel.prelude + (source_folder() / kernel.unit).read_text(encoding="utf-8")
    folders = [str(source_folder()), *map(str, toolkit.include_path())]
    log = io.StringIO()
    try:
        given = core.ProgramOptions(name=kernel.unit, arch=arch, include_path=folders, **options)
        code = core.Program(source, "c++", given).compile(kind, name_expressions=(kernel.expression,), logs=log)
    except Exception as error:  # of cuda.core, whose kinds are private
        remedy = f"Options {options}, include path {folders}; the compiler says:\n{error}"
        path = source_folder() / kernel.unit
        text = complaint("compile_kernel", str(path), f"compile for {arch}", f"errors for {kernel.expression}", remedy)
        raise KernelCompileError(text) from None
    # The object itself must never be printed: without a driver its repr hangs later compilations.
    return code, log.getvalue()


def cache_key(kernel: KernelId, arch: str, version: tuple[int, int] | None = None) -> str:
    """Return a digest of all that decides a kernel's machine code: every source it reaches, options, NVRTC's version.

    `version` is that of the library, which is loaded to ask for it, unless given.
    """
    version = toolkit.nvrtc_version() if version is None else version
    linked = None if kernel.linked is None else linking.made_by(kernel.linked)
    named = (kernel.unit, kernel.expression, kernel.prelude, linked)
    made_by = (named, arch, _OPTIONS, version, sources_digest(source_folder(), kernel.unit))
    return hashlib.sha256(repr(made_by).encode()).hexdigest()


@lru_cache(maxsize=256)
def sources_digest(folder: Path, unit: str) -> str:
    """Return a digest of a unit, of every file of ours that it includes, and of the CUDA headers that those name."""
    digest = hashlib.sha256()
    pending, seen = [unit], {unit}
    while pending:
        name = pending.pop()
        text = _read_source(folder, name)
        digest.update(f"{name} {len(text)}\n".encode() + text)
        for quote, included in _INCLUDE.findall(text.decode("utf-8", "replace")):
            if quote == "<":
                digest.update(f"<{included}> {_header_digest(included)}\n".encode())
            elif included not in seen:
                seen.add(included)
                pending.append(included)
    return digest.hexdigest()


def _read_source(folder: Path, name: str) -> bytes:
    """Return a file of the device code; its includes are named from the root of `folder`."""
    path = folder / name
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "Install pymoe anew"
        raise KernelCompileError(complaint("compile_kernel", str(path), "be readable", error, remedy)) from None


@lru_cache(maxsize=64)
def _header_digest(name: str) -> str:
    for folder in toolkit.include_path():
        if (folder / name).is_file():
            return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return "built in"  # NVRTC's own; or missing, which the compiler will tell


@lru_cache(maxsize=1)
def source_folder() -> Path:
    """Return the folder of the device code, installed or in a checkout."""
    try:
        return Path(str(importlib.resources.files("pymoe.cuda_src")))
    except ModuleNotFoundError:  # a bare checkout has the folder beside the package
        return Path(__file__).parents[2] / "cuda_src"


def _after_fork() -> None:
    """Forget what the child cannot use: locks and compilations of threads that it lacks, and the parent's modules."""
    global _lock, _loaded, _of_the_parent
    _lock = threading.Lock()
    _compiled.clear()
    _of_the_parent, _loaded = _loaded, {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
