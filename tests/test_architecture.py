"""The import rule, the light import, the budgets; and that these tests can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import architecture

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "pymoe").rglob("*.py"))


def source(path):
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES)
def test_import_rule(path):
    assert architecture.import_faults(path, source(path)) == []


@pytest.mark.parametrize("path", FILES)
def test_budgets(path):
    assert architecture.size_faults(path, source(path)) == []


@pytest.mark.parametrize("path", FILES)
def test_one_reader_of_the_environment(path):
    assert architecture.environment_faults(path, source(path)) == []


def test_device_code_budget():
    assert [path for path in (ROOT / "cuda_src").rglob("*.cu*") if len(path.read_text().splitlines()) > 500] == []


def test_inline_assembly_is_in_two_files():
    """Device code speaks to the hardware through `common/ptx.cuh` alone, and `common/ptx_sm90.cuh` for sm_90a."""
    files = [path for path in (ROOT / "cuda_src").rglob("*.cu*") if re.search(r"\basm\b", path.read_text())]
    found = sorted(path.relative_to(ROOT / "cuda_src").as_posix() for path in files)
    assert found == ["common/ptx.cuh", "common/ptx_sm90.cuh"]


def test_device_code_is_included_from_its_root():
    """An include names a file of ours from `cuda_src`, since the cache's keys follow the includes that way."""
    folder = ROOT / "cuda_src"
    named = {
        name for path in folder.rglob("*.cu*") for name in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text())
    }
    assert named and {name for name in named if not (folder / name).is_file()} == set()


@pytest.mark.parametrize("statement", ["import pymoe", "import pymoe.cli, pymoe.__main__"])
def test_light_import(statement):
    """`import pymoe` loads NumPy and ml_dtypes, and none of the libraries that only some calls need."""
    heavy = sorted(architecture.OPTIONAL | {"scipy", "sklearn", "safetensors", "triton"})
    code = f"{statement}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path, text, fault",
    [
        ("pymoe/config.py", "import pymoe.layer", "floor 9 is not below 1"),
        ("pymoe/config.py", "def f():\n    from pymoe.layer import MoELayer", "floor 9 is not below 1"),
        ("pymoe/experts/cpu.py", "from pymoe.prepare_finalize import x", "floor 5 is not below 5"),
        ("pymoe/ops/route/_numpy.py", "from pymoe.ops.permute import permute", "an op imports another op"),
        ("pymoe/ops/route/_numpy.py", "from pymoe.ops import permute", "an op imports another op"),
        ("pymoe/kernel/kernel.py", "from . import modular", "relative imports"),
        ("pymoe/layer/layer.py", "import numba", "optional libraries load inside functions"),
        ("pymoe/layer/layer.py", "try:\n    import cupy\nexcept ImportError:\n    cupy = None", "optional libraries"),
        ("pymoe/layer/layer.py", "def f():\n    import mpi4py", "only comm imports mpi4py"),
        ("pymoe/layer/layer.py", "import importlib\nimportlib.import_module('torch')", "optional libraries"),
        ("pymoe/config.py", "def f():\n    return __import__('pymoe.layer')", "floor 9 is not below 1"),
        ("pymoe/config.py", "from importlib import import_module\nimport_module(name)", "a computed name"),
        ("pymoe/layer/layer.py", "import pymoe.unheard", "unheard has no floor"),
        ("pymoe/novel.py", "import pymoe.errors", "novel has no floor"),
        ("pymoe/kernel/kernel.py", "import pymoe", "above all floors"),
    ],
)
def test_the_import_rule_can_fail(path, text, fault):
    assert any(fault in found for found in architecture.import_faults(path, text))


@pytest.mark.parametrize(
    "path, text",
    [
        ("pymoe/ops/route/__init__.py", "from pymoe.ops.route._numpy import route"),
        ("pymoe/ops/route/_numba.py", "import numba"),
        ("pymoe/layer/layer.py", "def f():\n    import numba"),
        ("pymoe/layer/layer.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cupy"),
    ],
)
def test_the_import_rule_can_pass(path, text):
    assert architecture.import_faults(path, text) == []


def test_the_budgets_can_fail():
    long_file = "\n".join(["x = 1"] * 401)
    long_function = "def f():\n" + "\n".join(["    x = 1"] * 61)
    method = "class C:\n    def f(self, " + ", ".join(f"a{i}" for i in range(9)) + "): ..."
    assert "401 lines" in architecture.size_faults("pymoe/x.py", long_file)[0]
    assert "f has 61 lines" in architecture.size_faults("pymoe/x.py", long_function)[0]
    assert "C.f has 9 parameters" in architecture.size_faults("pymoe/x.py", method)[0]
    assert "top_k of f is a banned name" in architecture.size_faults("pymoe/x.py", "def f(top_k): ...")[0]
    documented = 'def f():\n    """' + "\n" * 80 + '"""\n    return 1'
    assert architecture.size_faults("pymoe/x.py", documented) == []
    kernel = "@kernel\ndef f(" + ", ".join(f"a{i}" for i in range(9)) + "): ..."
    assert architecture.size_faults("pymoe/x.py", kernel) == []
    assert "f has 9 parameters" in architecture.size_faults("pymoe/x.py", kernel.replace("@kernel", "@device"))[0]
    assert "I of f is" not in str(architecture.size_faults("pymoe/x.py", "def f(I, topk): ..."))


@pytest.mark.parametrize("text", ["import os\nos.environ['A']", "import os\nos.getenv('A')", "from os import environ"])
def test_the_rule_of_the_environment_can_fail(text):
    assert architecture.environment_faults("pymoe/x.py", text) != []
    assert architecture.environment_faults("pymoe/environment.py", text) == []
