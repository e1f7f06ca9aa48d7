"""Every kernel instance of the library, compiled for every architecture and looked at, without a GPU."""

from __future__ import annotations

import ast
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pymoe import environment
from pymoe.catalogue import all_kernels
from pymoe.device.arch import ARCHS
from pymoe.device.jit import compile_all, source_folder
from tests.compile import facts, rules

pytestmark = [pytest.mark.compile, pytest.mark.timeout(900)]

CHECKED_ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _tools():
    pytest.importorskip("cuda.core", reason="cuda-core is not installed (pip install 'pymoe[cu13]')")
    if not facts.disassembler():
        pytest.skip("nvdisasm is not installed (pip install nvidia-cuda-nvdisasm)")


def units():
    return sorted(path.relative_to(source_folder()).as_posix() for path in source_folder().rglob("*.cu"))


@pytest.mark.parametrize("unit", units())
@pytest.mark.parametrize("arch", CHECKED_ARCHS)
def test_every_instance_is_sound_machine_code(arch, unit):
    kernels = [kernel for kernel in all_kernels(arch) if kernel.unit == unit]
    if not kernels:
        pytest.skip(f"{unit} has no kernel for {arch}")
    compiled = compile_all(kernels, arch)
    with ThreadPoolExecutor(environment.num_threads()) as pool:
        looked = list(pool.map(lambda k, c: facts.facts_of(c, sass=rules.wants_sass(k)), kernels, compiled))
    judged = (rules.faults(kernel, arch, known) for kernel, known in zip(kernels, looked, strict=True))
    found = [fault for faults in judged for fault in faults]
    assert not found, "\n".join(found)
    worst = max(looked, key=lambda known: known.registers)
    print(f"{unit} {arch}: {len(kernels)} kernels, at most {worst.registers} registers")


def test_every_unit_is_reached():
    """Each kernel that a unit defines is in the catalogue: there is no device code that nobody can launch."""
    reached = {(k.unit, re.sub(r"<.*", "", k.expression).split("::")[-1]) for a in ARCHS for k in all_kernels(a)}
    defined = {
        (unit, name)
        for unit in units()
        for name in re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", (source_folder() / unit).read_text())
    }
    assert defined == reached


def test_the_catalogue_asks_every_stage():
    """Each ``_cuda.py`` of the tree is one that `all_kernels` imports."""
    there = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.glob("pymoe/**/_cuda.py")}
    tree = ast.parse((ROOT / "pymoe/catalogue.py").read_text())
    named = {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert there == {name for name in named if name.endswith("._cuda")}
