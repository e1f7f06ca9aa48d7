"""What every kernel must be as machine code, as a function of its name, its architecture and its facts."""

from __future__ import annotations

import re

from pymoe.device.jit import KernelId
from tests.compile.facts import Facts

GEMM = "grouped_gemm/grouped_gemm.cu"
"""The unit of the tensor-core GEMM."""

SM90 = "grouped_gemm/sm90.cu"
SM90_UNITS = (SM90, "grouped_gemm/sm90_swapped.cu")
"""The units of the GEMMs for sm_90a; no other unit's instructions are prescribed."""

MAY_SPILL: dict[str, str] = {}
"""Expression prefix -> why this kernel may keep registers in memory."""

FP8_MMA = ("sm_89", "sm_120")
"""Architectures whose tensor cores multiply fp8 by mma.sync; the others decode to 16 bits."""


def wants_sass(kernel: KernelId) -> bool:
    """Return whether instructions are prescribed for this instance.

    Which instructions multiply and load follows from the formats, not from the tile: one tile class stands for all.
    """
    return kernel.unit in SM90_UNITS or (kernel.unit == GEMM and tile_rows(kernel) in (None, 64))


def tile_rows(kernel: KernelId) -> int | None:
    """Return the rows of a GEMM instance's tile: the second number of its template arguments."""
    numbers = re.findall(r", (\d+)", kernel.expression)
    return int(numbers[1]) if len(numbers) > 1 else None


def faults(kernel: KernelId, arch: str, facts: Facts) -> list[str]:
    """Return what is wrong with a kernel, each fault in one line."""
    found = [f"warning: {line}" for line in facts.warnings]
    excused = any(kernel.expression.startswith(prefix) for prefix in MAY_SPILL)
    if facts.spill_bytes and not excused:
        found.append(f"spills {facts.spill_bytes} bytes")
    if facts.stack_bytes and not excused:
        found.append(f"has a stack frame of {facts.stack_bytes} bytes")
    if kernel.unit == GEMM and facts.opcodes is not None:
        found += gemm_faults(kernel, arch, facts)
    if kernel.unit in SM90_UNITS and facts.opcodes is not None:
        found += sm90_faults(facts)
    return [f"{kernel.expression} on {arch}: {fault}" for fault in found]


def gemm_faults(kernel: KernelId, arch: str, facts: Facts) -> list[str]:
    """Return what is wrong with the instructions of a GEMM."""
    found = []
    wanted = multiplier(kernel, arch)
    if not facts.count(wanted):
        found.append(f"multiplies without {wanted}")
    others = {"HMMA", "IMMA", "QMMA"} - {wanted}
    if facts.count(*others):
        found.append(f"multiplies with another instruction than {wanted}")
    if not facts.wide_loads:
        found.append("loads nothing from global memory 16 bytes at a time")
    if facts.count("STL", "LDL"):
        found.append("keeps registers in local memory")
    return found


def sm90_faults(facts: Facts) -> list[str]:
    """Return what is wrong with the instructions of a GEMM for sm_90a."""
    wanted = {"HGMMA": "multiplies", "UTMALDG": "copies tiles", "USETMAXREG": "shares out registers"}
    found = [f"{what} without {name}" for name, what in wanted.items() if not facts.count(name)]
    if facts.count("HMMA"):
        found.append("multiplies with another instruction than HGMMA")
    if facts.count("STL", "LDL"):
        found.append("keeps registers in local memory")
    return found


def multiplier(kernel: KernelId, arch: str) -> str:
    """Return the tensor-core instruction of an instance: its formats' own where the architecture has it, else HMMA."""
    a, b = re.findall(r"Format::k(\w+)", kernel.expression)[:2]
    if a == b == "S8":
        return "IMMA"
    return "QMMA" if a == b == "E4M3" and arch in FP8_MMA else "HMMA"
