"""CUDA kernels on the host: `emulated` stands in for launching a `LaunchPlan`, on NumPy arrays.

g++ compiles the very sources that NVRTC compiles, against ``include/cuda_shim.hpp``.  So what a kernel computes is
tested bit for bit where there is no GPU; how fast, and whether threads race, only a GPU can tell.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from pymoe.device.jit import KernelId, source_folder

AVAILABLE = shutil.which("g++") is not None
_INCLUDE = Path(__file__).parent / "include"
_SCALARS = {"f": np.float32, "d": np.float64, "i": np.int32, "q": np.int64}


def emulated(plan, *args):
    """Run the kernel of `plan` with the arguments that `plan(*args)` would launch it with."""
    launch, signature = _compiled(plan.kernel)
    assert len(args) == len(signature), f"{plan.kernel}: {len(args)} arguments for {len(signature)} parameters"
    cells = []
    for place, (word, value) in enumerate(zip(signature, args, strict=True)):
        where = f"{plan.kernel.expression}, argument {place}"
        if word == "p":
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous, f"{where}: not contiguous"
                value = value.ctypes.data
            cells.append(np.array([value], np.uint64))
        else:
            fits = value.nbytes == int(word) if word.isdigit() else type(value) is _SCALARS[word]
            assert fits, f"{where}: {type(value).__name__} for '{word}'"
            cells.append(np.array([value]))
    assert all(0 < extent <= limit for extent, limit in zip(plan.grid, (2**31 - 1, 65535, 65535), strict=True))
    assert np.prod(plan.block) <= 1024
    three = ctypes.c_int * 3
    launch(
        (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells)),
        three(*plan.grid),
        three(*plan.block),
        plan.shared_bytes,
    )


@cache
def _folder():
    """Return a copy of the device sources whose dynamic shared memory is the emulator's."""
    folder = Path(tempfile.mkdtemp(prefix="pymoe-emulator-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in source_folder().rglob("*.cu*"):
        target = folder / path.relative_to(source_folder())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(re.sub(r"extern __shared__[^;]* shared_memory\[\];", "", path.read_text()))
    return folder


def _cluster_blocks(kernel: KernelId) -> int:
    """Return the blocks of a cluster along x, by the attribute that all kernels of a unit share."""
    found = set(re.findall(r"__cluster_dims__\((\d+), 1, 1\)", (_folder() / kernel.unit).read_text()))
    return int(found.pop()) if len(found) == 1 else 1


@cache
def _compiled(kernel: KernelId):
    text = f"""
#define CLUSTER_BLOCKS {_cluster_blocks(kernel)}
#include "cuda_shim.hpp"
#define shared_memory emulator::shared_bytes()
{kernel.prelude}
#include "{kernel.unit}"
extern "C" const char* signature() {{ return emulator::signature({kernel.expression}); }}
extern "C" void launch(void** arguments, const int* grid, const int* block, int shared) {{
    emulator::launch(emulator::call<{kernel.expression}>, arguments, grid, block, shared);
}}
"""
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    source, library = _folder() / f"{name}.cpp", _folder() / f"{name}.so"
    source.write_text(text)
    build(source, library)
    loaded = ctypes.CDLL(str(library))
    loaded.signature.restype = ctypes.c_char_p
    return loaded.launch, loaded.signature().decode().split()


def build(source: Path, library: Path) -> None:
    """Compile a source that includes ``cuda_shim.hpp`` and device sources."""
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", "-fno-gnu-unique",
               f"-I{_INCLUDE}", f"-I{_folder()}", str(source), "-o", str(library)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:8000]
