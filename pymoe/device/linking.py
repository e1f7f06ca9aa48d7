"""Linking a kernel with a user's function that is no C++: both as LTO-IR, optimized together by nvJitLink.

NVRTC makes one half, of the kernel's unit, and Numba-CUDA the other; nvJitLink inlines the function where it is called.
Neither needs a driver or a GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

from pymoe.errors import BackendUnavailableError, KernelCompileError, complaint
from pymoe.formula import ClosedFunction

__all__ = ["SYMBOL", "WORD_SYMBOL", "function_ltoir", "link", "made_by", "versions"]

SYMBOL = "pymoe_closed_function"
"""The C name of the user's function."""
WORD_SYMBOL = "pymoe_word_{}"
"""The C name of a word that the kernel's unit defines for it."""

_OPTIONS = (
    "-lto",
    # The function's operations are rounded one by one, as on every backend; kernels ask for fused ones by name.
    "-fma=0",
    "-ftz=0",
    "-prec-div=1",
    "-prec-sqrt=1",
    "-Xptxas=-v",
    "-Xptxas=-warn-spills",
)
_INSTALL = "pip install 'pymoe[numba-cu13]' (CUDA 12: 'pymoe[numba-cu12]')"
_SOURCES = (
    "formula/closed.py", "formula/rewriting.py", "formula/calls.py", "formula/outside.py", "formula/words.py",
    "formula/functions.py", "formula/elementary.py", "formula/_numba.py", "device/_numba_ltoir.py",
)  # fmt: skip
"""What decides the LTO-IR beside the function and the libraries."""


def link(unit: bytes, function: ClosedFunction, arch: str) -> tuple[bytes, str]:
    """Return the cubin of a kernel's unit and a function, and what the assembler says of it.

    Raises
    ------
    BackendUnavailableError
        Numba-CUDA, nvJitLink or what they need is missing.
    KernelCompileError
        Numba-CUDA does not compile the function, or it cannot be linked or inlined.
    """
    nvjitlink = _nvjitlink()
    parts = (unit, function_ltoir(function, arch))
    linker = nvjitlink.create(1 + len(_OPTIONS), [f"-arch={arch}", *_OPTIONS])
    try:
        for name, part in zip(("unit", "function"), parts, strict=True):
            nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, part, len(part), name)
        nvjitlink.complete(linker)
        cubin = _read(linker, nvjitlink.get_linked_cubin_size, nvjitlink.get_linked_cubin)
        log = (
            _read(linker, nvjitlink.get_info_log_size, nvjitlink.get_info_log).rstrip(b"\0").decode("utf-8", "replace")
        )
    except nvjitlink.nvJitLinkError as error:
        said = _read(linker, nvjitlink.get_error_log_size, nvjitlink.get_error_log).rstrip(b"\0\n")
        raise _refused(function, f"link for {arch}", f"{said.decode('utf-8', 'replace') or error}") from None
    finally:
        nvjitlink.destroy(linker)
    if SYMBOL.encode() in cubin:
        raise _refused(function, f"be inlined into kernels for {arch}", "a function that nvJitLink leaves a call")
    return cubin, log


@lru_cache(maxsize=64)
def function_ltoir(function: ClosedFunction, arch: str) -> bytes:
    """Return a function as LTO-IR; raises as `link`."""
    _require_numba_cuda()
    from pymoe.device._numba_ltoir import compile_function

    try:
        return compile_function(function, arch)
    except ImportError as error:
        if type(error).__name__ == "CudaSupportError":  # it asks for a driver, to compile a function of its own apart
            said = "one that calls what Numba-CUDA would compile apart, for the device of the moment"
            raise _refused(function, f"be compiled whole for {arch}", said) from None
        raise _missing("what Numba-CUDA needs", error) from None
    except Exception as error:  # of Numba-CUDA and of NVVM, whose kinds have no common base
        raise _refused(function, f"compile for {arch} by Numba-CUDA", f"{type(error).__name__}: {error}") from None


def made_by(function: ClosedFunction) -> tuple[Any, ...]:
    """Return all that decides a function's machine code but the architecture and the kernel.

    In place of the LTO-IR all that it is made of: its bytes hold Numba's count of a process's functions, so that they
    differ from one process to the next.
    """
    package = Path(__file__).parents[1]
    sources = hashlib.sha256(b"\0".join((package / name).read_bytes() for name in _SOURCES)).hexdigest()
    return function.digest, sources, _OPTIONS, *versions().items(), platform.python_version()


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions of what compiles and links a function.

    Raises
    ------
    BackendUnavailableError
        One of them is missing.
    """
    _require_numba_cuda()
    from cuda.bindings import nvvm

    try:
        nvvm.version()  # loads the library; it has said 2.0 for years, so that its package must tell which it is
    except Exception as error:  # the finder of libraries has several kinds, none of them documented
        raise _missing("libNVVM", error) from None
    found = {name: importlib.metadata.version(name) for name in ("numba-cuda", "numba", "llvmlite")}
    return found | {"libNVVM": _libnvvm(), "nvJitLink": ".".join(map(str, _nvjitlink().version()))}


def _libnvvm() -> str:
    """Return the version of the package that holds libNVVM."""
    for package in ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "of a toolkit"


@lru_cache(maxsize=1)
def _nvjitlink() -> Any:
    try:
        from cuda.bindings import nvjitlink

        nvjitlink.version()
    except Exception as error:  # as above
        raise _missing("nvJitLink", error) from None
    return nvjitlink


def _require_numba_cuda() -> None:
    if importlib.util.find_spec("numba_cuda") is None:
        raise _missing("numba-cuda", "nothing of this name")


def _missing(what: str, found: object) -> BackendUnavailableError:
    rule = "be installed for activations that are not translated"
    first = next(iter(str(found).strip().splitlines()), type(found).__name__).rstrip(".")
    return BackendUnavailableError(complaint("pymoe", what, rule, first, f"Install the extra: {_INSTALL}"))


def _refused(function: ClosedFunction, rule: str, said: object) -> KernelCompileError:
    return KernelCompileError(complaint("compile_kernel", f"the activation at {function.place}", rule, said))


def _read(linker: Any, size: Any, get: Any) -> bytes:
    buffer = bytearray(size(linker))
    if buffer:
        get(linker, buffer)
    return bytes(buffer)
