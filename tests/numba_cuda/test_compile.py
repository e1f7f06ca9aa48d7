"""Every Numba kernel compiled for sm_80 and sm_90 with the types that layers launch it with; no device is needed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pymoe
from pymoe import NumbaCudaExperts
from pymoe.formula import ClosedFunction
from tests.experts.test_pairs import problem, standard
from tests.formula import untranslated
from tests.numba_cuda.test_simulated import bent, bent_gate
from tests.selection import BF16

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed"),
]
SCHEMES = ["fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_block", "fp8_w8a8_block_ue8m0", "int8_w8a8", "fp8_w8a16"]
ROOT = Path(__file__).parents[2]
STAGES = ("activation", "grouped_gemm", "permute", "quantize", "unpermute")


def typed(x):
    """Return the Numba type that a device array, or a number, has as an argument."""
    from numba.cuda import types
    from numba.cuda.np import numpy_support
    from numba.cuda.typing.typeof import Purpose, typeof

    if not isinstance(x, np.ndarray):
        return typeof(x, Purpose.argument)
    layout = "C" if x.flags.c_contiguous and 0 not in x.strides else "A"
    return types.Array(numpy_support.from_dtype(x.dtype), x.ndim, layout)


@pytest.fixture(scope="module")
def launched():
    """Return {(kernel, types): nothing} of what layers of every kind launch; nothing is computed."""
    found = {}
    modules = [importlib.import_module(f"pymoe.ops.{stage}._numba_cuda") for stage in STAGES]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "require", lambda *_: None, raising=False)
            patch.setattr(
                module,
                "launch",
                lambda kernel, grid, threads, *args: found.setdefault((kernel, tuple(map(typed, args)))),
            )
        problems = [problem(scheme) for scheme in SCHEMES]
        problems += [problem(dtype=np.float32, biases=True), problem(dtype=BF16), problem(activation="swigluoai")]
        for each in problems:
            standard(each, NumbaCudaExperts)
        mapped = dataclasses.replace(problem(), ids=np.zeros((11, 3), np.int64))
        standard(mapped, NumbaCudaExperts, expert_map=np.arange(5, dtype=np.int32))
        gated = pymoe.register_activation("numba_gated", lambda gate, up: gate * up + 1.0)
        plain = pymoe.register_activation("numba_plain", lambda x: x * x + 1.0, gated=False)
        for each in (gated, plain):
            standard(problem(activation=each), NumbaCudaExperts)
    return found


def ptx_of(kernel, types, arch, monkeypatch):
    from numba import cuda
    from numba.cuda import dispatcher

    # A function that a kernel calls is compiled for the current device: there is none.
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=arch))
    return cuda.compile(kernel.py_func, types, device=False, abi="numba", cc=arch, output="ptx")[0]


def test_layers_launch_every_kernel(launched):
    defined = set()
    for stage in STAGES:
        module = importlib.import_module(f"pymoe.ops.{stage}._numba_cuda")
        defined |= {name for name in vars(module) if name.endswith("_kernel")}
    assert defined | {"registered_kernel"} == {kernel.py_func.__name__ for kernel, _ in launched}


@pytest.mark.parametrize("arch", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
def test_every_kernel_compiles(launched, arch, monkeypatch):
    for kernel, types in launched:
        ptx = ptx_of(kernel, types, arch, monkeypatch)
        name = kernel.py_func.__name__
        assert f".target sm_{arch[0]}{arch[1]}" in ptx and ".visible .entry" in ptx, name
        if name == "grouped_gemm_kernel":
            assert "fma.rn.f32" in ptx and "bar.sync" in ptx and ".shared" in ptx
        if name in ("unpermute_kernel", "quantize_groups_kernel", "activation_kernel", "registered_kernel"):
            # Products that are added or cut afterwards are rounded first: nothing here may be contracted.
            assert "mul.rn.f32" in ptx and "fma.rn.f32" not in ptx, name
        # IEEE division, and subnormals as they are.
        assert not re.search(r"\b(add|mul|fma|div)[.\w]*\.(approx|ftz|full)[.\w]*\.f32", ptx), name


@pytest.mark.parametrize("fn, gated", [(bent, False), (bent_gate, True)])
def test_own_activations_are_neither_contracted_nor_widened(launched, fn, gated, monkeypatch):
    from pymoe.ops.activation._numba_cuda_formula import kernel_of

    program = pymoe.register_activation(f"numba_{fn.__name__}", fn, gated).program
    types = next(types for kernel, types in launched if kernel.py_func.__name__ == "registered_kernel")
    ptx = ptx_of(kernel_of(program, gated), types, (9, 0), monkeypatch)
    assert 0 < ptx.count("fma.rn.f32") <= sum(step.operation == "fma" for step in program.steps)
    assert ".f64" not in ptx


@pytest.mark.parametrize("fn", untranslated.GATED, ids=lambda fn: fn.__name__)
def test_functions_that_are_not_translated_compile_and_are_not_contracted(launched, fn, monkeypatch):
    """Nothing is called, and fused products stand in exp and in functions of float64 only."""
    from pymoe.ops.activation._numba_cuda_formula import kernel_of

    program = pymoe.register_activation(f"numba_{fn.__name__}", fn).program
    assert isinstance(program, ClosedFunction)
    types = next(types for kernel, types in launched if kernel.py_func.__name__ == "registered_kernel")
    ptx = ptx_of(kernel_of(program, True), types, (9, 0), monkeypatch)
    assert ".visible .entry" in ptx and "add.rn.f32" in ptx
    assert fn is not untranslated.helped or ("fma.rn.f32" not in ptx and ".f64" not in ptx)
    assert fn in (untranslated.wave, untranslated.picked) or "call" not in ptx.replace("callseq", "")


def test_numpy_is_left_as_it_was():
    import pymoe.device.numba_gpu as gpu

    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(np, "row_stack", raising=False)
        with gpu.numpy_with_row_stack():
            assert np.row_stack is np.vstack  # noqa: NPY201
        assert not hasattr(np, "row_stack")


WITHOUT_ROW_STACK = """
import numpy as np
if hasattr(np, "row_stack"):
    del np.row_stack
from numba import float32
from pymoe.device import numba_gpu
text, _ = numba_gpu.cuda.compile(lambda x: x + x, float32(float32), cc=(9, 0), output="ptx")
assert "add.f32" in text and not hasattr(np, "row_stack")
"""


def test_numba_cuda_loads_under_a_numpy_without_row_stack():
    """As NumPy 2.5 is; in a process of its own, since what is loaded stays so."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_ROW_STACK], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_shim_is_in_one_place():
    holders = [path for path in (ROOT / "pymoe").rglob("*.py") if "row_stack" in path.read_text("utf-8")]
    assert [path.name for path in holders] == ["numba_gpu.py"]


def test_the_shim_of_row_stack_is_still_needed():
    """Once numba-cuda does without ``numpy.row_stack``, `numpy_with_row_stack` can go, and this test with it."""
    spec = importlib.util.find_spec("numba_cuda")
    source = Path(spec.submodule_search_locations[0], "numba", "cuda", "np", "arrayobj.py").read_text("utf-8")
    assert "np.row_stack" in source
