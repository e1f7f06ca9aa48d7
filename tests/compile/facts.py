"""What the assembler and the disassembler say of a kernel: registers, spills, warnings, instructions.

Facts are kept in the cache folder by the digest of the cubin, since looking takes longer than compiling does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache

from pymoe.device.cubins import CompiledKernel
from pymoe.device.private import private_folder

_FORMAT = 1
"""Of the kept files; another number forgets them."""
_UNUSED = "warning #177-D"
"""An unused variable: one instance is compiled, so a constant that only the others use is one."""
_OPCODE = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """What is known of one kernel as machine code."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    """Stored and loaded, as the assembler counts them."""
    warnings: tuple[str, ...]
    opcodes: dict[str, int] | None
    """Instructions by their full name, such as "LDG.E.128"; None where nobody disassembled."""

    def count(self, *beginnings: str) -> int:
        """Return how many instructions begin with one of these."""
        assert self.opcodes is not None
        return sum(number for name, number in self.opcodes.items() if name.startswith(beginnings))

    @property
    def wide_loads(self) -> int:
        """Loads from global memory of 16 bytes a thread, into registers or shared memory."""
        assert self.opcodes is not None
        loads = (name.split(".") for name in self.opcodes)
        return sum(name[0] in ("LDG", "LDGSTS", "UTMALDG", "UBLKCP") and _is_wide(name) for name in loads)


def _is_wide(name: list[str]) -> bool:
    return name[0] in ("UTMALDG", "UBLKCP") or "128" in name


def facts_of(compiled: CompiledKernel, *, sass: bool) -> Facts:
    """Return the facts of a kernel, its instructions only if `sass` asks for them."""
    log = compiled.log
    # The assembler's warning of a spill repeats its numbers: only the line of the function's properties counts.
    properties = "\n".join(line for line in log.splitlines() if "bytes stack frame" in line or "Used " in line)
    numbers = {
        name: sum(int(found) for found in re.findall(pattern, properties))
        for name, pattern in (
            ("registers", r"Used (\d+) registers"), ("stack_bytes", r"(\d+) bytes stack frame"),
            ("spill_bytes", r"(\d+) bytes spill (?:stores|loads)"),
        )
    }  # fmt: skip
    assert numbers["registers"] > 0, f"the log says nothing of the kernel:\n{log}"
    lines = [line.strip() for line in log.splitlines() if _UNUSED not in line]
    warnings = [line for line in lines if re.search(r"warning\s*[#:]|Potential Performance Loss", line)]
    return Facts(**numbers, warnings=tuple(warnings), opcodes=opcodes(compiled.cubin) if sass else None)


def opcodes(cubin: bytes) -> dict[str, int]:
    """Return how often each instruction stands in a cubin; kept between runs."""
    name = hashlib.sha256(f"{_FORMAT} {disassembler()}".encode() + cubin).hexdigest()
    try:
        kept = private_folder("sass") / name
    except OSError:
        kept = None
    if kept is not None and kept.is_file():
        return json.loads(kept.read_text())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([disassembler(), "-c", file.name], capture_output=True, text=True, check=True)
    counts = dict(sorted(Counter(_OPCODE.findall(done.stdout)).items()))
    assert "EXIT" in counts, f"no instructions found:\n{done.stdout[:2000]}"
    if kept is not None:
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            json.dump(counts, file)
        os.replace(file.name, kept)
    return counts


@lru_cache(maxsize=1)
def disassembler() -> str:
    """Return the path of nvdisasm; empty if it is not installed."""
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError:
        return ""
    return find_nvidia_binary_utility("nvdisasm") or ""


def shown(facts: Facts) -> str:
    """Return facts in one line."""
    return json.dumps({name: value for name, value in asdict(facts).items() if name != "opcodes"})
