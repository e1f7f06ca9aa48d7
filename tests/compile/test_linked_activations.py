"""Kernels with a user's function that Numba-CUDA compiles and nvJitLink inlines: sound machine code, no call of it."""

from __future__ import annotations

import re

import numpy as np
import pytest

import pymoe
from pymoe import ActivationConfig, register_activation
from pymoe.device import jit, linking
from pymoe.device.jit import KernelId, compile_all
from pymoe.device.own_activation import with_activation
from pymoe.formula import ClosedFunction
from pymoe.ops.grouped_gemm._cuda_instances import all_instances
from tests.compile import facts, rules
from tests.compile.test_kernels import _tools  # noqa: F401
from tests.formula import test_closed, untranslated

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (pip install 'pymoe[numba-cu13]')")

pytestmark = [pytest.mark.compile, pytest.mark.timeout(900)]

ALONE = KernelId("activation/activation.cu", "pymoe::activation_kernel")
GATED = {fn.__name__: register_activation(f"test_linked_{fn.__name__}", fn) for fn in untranslated.GATED}
PLAIN = register_activation("test_linked_plain_wave", untranslated.plain_wave, gated=False)
OF_THE_COMPILER = re.compile(r"(__internal_trig_reduction_slowpathd|__cuda_sm\d\w_(div|rem|sqrt|dsqrt|rcp|drsqrt)_\w+)")
"""Subroutines of the compiler's own, for rare operands of float64 and of remainders."""


def subroutines(compiled):
    """Return the names of what stands beside the kernel to be called."""
    return {name.decode() for name in re.findall(rb"\$(__(?:internal|cuda)_[a-z]\w+)", compiled.cubin)}


def one_of_a_unit(arch):
    """Return a GEMM of every unit and way of scaling, in the middle tile."""
    chosen = {}
    for instance in all_instances(arch):
        if rules.tile_rows(instance.kernel) in (None, 64):
            scaling = re.findall(r"Scaling::k\w+", instance.kernel.expression)
            chosen[instance.kernel.unit, *scaling] = instance.kernel
    return list(chosen.values())


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80", "sm_120"])
@pytest.mark.parametrize("name", ["horner", "helped", "newton"])
def test_inlined_without_a_call(arch, name):
    """Loops with break and continue, tables, helpers: nothing is called, and no register is kept in memory.

    Newton's method has two more numbers live across its loop than the largest kernel has registers for.
    """
    kernels = [with_activation(kernel, ActivationConfig(GATED[name])) for kernel in one_of_a_unit(arch)]
    assert {rules.GEMM, "grouped_gemm/simt.cu"} <= {kernel.unit for kernel in kernels}
    for kernel, compiled in zip(kernels, compile_all(kernels, arch), strict=True):
        known = facts.facts_of(compiled, sass=True)
        found = [] if name == "newton" and kernel.unit in rules.SM90_UNITS else rules.faults(kernel, arch, known)
        found += [f"calls {each}" for each in subroutines(compiled)]
        found += ["returns from a call"] * (known.count("RET") > 0)  # sm_80 also jumps by CALL, but never comes back
        assert not found and linking.SYMBOL.encode() not in compiled.cubin, found
    print(f"{arch}: {len(kernels)} kernels")


@pytest.mark.parametrize("own", [*GATED.values(), PLAIN], ids=lambda own: own.name)
def test_only_the_compilers_own_subroutines_are_called(own):
    """Sine, sinh and remainder have such: for large angles, and for quotients that are no ordinary numbers."""
    kernel = with_activation(one_of_a_unit("sm_90a")[0], ActivationConfig(own))
    compiled = compile_all([kernel], "sm_90a")[0]
    assert all(OF_THE_COMPILER.fullmatch(name) for name in subroutines(compiled)), subroutines(compiled)
    assert (len(subroutines(compiled)) > 0) == (own.name.endswith(("wave", "picked")))


def looped_product(gate, up):
    y = gate
    while y > 2.0:
        y = y * up
    return y


def looped_sum(gate, up):
    y = gate
    while y > 2.0:
        y = y * up + gate
    return y


def test_a_product_and_a_sum_stay_two_operations():
    """As those of the CPU; kernels ask for fused ones by name, and get them."""
    simt = KernelId("grouped_gemm/simt.cu", "pymoe::grouped_gemm_simt_kernel<false, 64>")
    counts = {}
    for kernel in (ALONE, simt):
        for fn in (looped_product, looped_sum):
            own = ActivationConfig(register_activation(f"test_linked_{fn.__name__}", fn))
            known = facts.facts_of(compile_all([with_activation(kernel, own)], "sm_90a")[0], sass=True)
            counts[kernel.unit, fn] = known.count("FFMA"), known.count("FADD")
    for unit in (ALONE.unit, simt.unit):
        (fused, sums), (other, fewer) = counts[unit, looped_sum], counts[unit, looped_product]
        assert fused == other and sums > fewer, counts
    assert counts[simt.unit, looped_sum][0] > 50


def made(c):
    def looped(gate, up):
        y = gate
        while y > 2.0:
            y = y - c
        return y * up

    return looped


def test_the_key_holds_the_function_and_what_compiles_it(monkeypatch):
    owns = [
        ActivationConfig(register_activation(f"test_linked_key_{i}", made(c))) for i, c in enumerate((1.0, 1.0, 2.0))
    ]
    kernels = [with_activation(ALONE, own) for own in owns]
    assert isinstance(kernels[0].linked, ClosedFunction) and kernels[0] == kernels[1] != kernels[2] != ALONE
    keys = [jit.cache_key(kernel, "sm_90a", (13, 0)) for kernel in kernels]
    assert keys[0] == keys[1] != keys[2]
    versions = linking.versions()
    assert versions.keys() == {"numba-cuda", "numba", "llvmlite", "libNVVM", "nvJitLink"}
    for library in versions:
        monkeypatch.setattr(linking, "versions", lambda library=library: versions | {library: "another"})
        assert jit.cache_key(kernels[0], "sm_90a", (13, 0)) != keys[0]
    monkeypatch.undo()
    monkeypatch.setattr(linking, "_OPTIONS", ("-lto",))
    assert jit.cache_key(kernels[0], "sm_90a", (13, 0)) != keys[0]


def translated(c):
    return lambda gate, up: (gate - c) * up


@pytest.mark.parametrize("kind", [made, translated], ids=["linked", "translated"])
def test_the_cache_gives_each_function_its_own_kernel(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("PYMOE_CACHE_DIR", str(tmp_path / "cache"))
    made_now = []
    compile_now = jit.compile_now
    monkeypatch.setattr(jit, "compile_now", lambda kernel, arch: made_now.append(kernel) or compile_now(kernel, arch))
    kernels = [
        with_activation(ALONE, ActivationConfig(register_activation(f"test_{kind.__name__}_cache_{c}", kind(c))))
        for c in (1.25, 1.75)
    ]
    cubins = []
    for _ in range(2):
        monkeypatch.setattr(jit, "_compiled", {})
        cubins.append([jit.compile_kernel(kernel, "sm_90a").cubin for kernel in kernels])
    assert made_now == kernels and cubins[0] == cubins[1] and cubins[0][0] != cubins[0][1]


def test_what_numba_cuda_refuses_is_told_with_file_and_line():
    """Numba on the CPU takes a list; a kernel has no memory for one."""

    def listed(gate, up):
        pair = [gate, up]
        return pair[0] * pair[1]

    kernel = with_activation(ALONE, ActivationConfig(register_activation("test_linked_list", listed)))
    with pytest.raises(pymoe.KernelCompileError) as caught:
        compile_all([kernel], "sm_90a")
    line = listed.__code__.co_firstlineno
    place = f"the activation at {__file__}:{line} must compile for sm_90a by Numba-CUDA"
    assert place in str(caught.value), caught.value


TAKEN = [test_closed.joined, test_closed.of_numpy, test_closed.of_either, test_closed.split, test_closed.rebound,
         test_closed.otherwise_named, test_closed.indexed, test_closed.nested]  # fmt: skip


@pytest.mark.parametrize("fn", TAKEN, ids=lambda fn: fn.__name__)
def test_what_the_cpu_takes_cuda_takes(fn):
    """Tables, sums, max of a tuple, defaults, functions of NumPy: words and operators, not functions of Numba's own."""
    own = ActivationConfig(register_activation(f"test_linked_{fn.__name__}", fn))
    compiled = compile_all([with_activation(ALONE, own)], "sm_90a")[0]
    named = {name for name in subroutines(compiled) if not OF_THE_COMPILER.fullmatch(name)}
    assert not named and linking.SYMBOL.encode() not in compiled.cubin, named


def missing_ufunc(gate, up):
    return np.exp2(gate) * up


def compiled_apart(gate, up):
    return np.round(gate) * up


@pytest.mark.parametrize(
    "fn, rule",
    [
        (missing_ufunc, "must compile for sm_90a by Numba-CUDA; got KeyError: <ufunc 'exp2'>"),
        (compiled_apart, "must be compiled whole for sm_90a; got one that calls what Numba-CUDA would compile apart"),
    ],
)
def test_functions_that_numba_cuda_lacks_are_told(fn, rule):
    """These docs/own_activations names; the day that one compiles, the page can drop it."""
    kernel = with_activation(ALONE, ActivationConfig(register_activation(f"test_linked_{fn.__name__}", fn)))
    with pytest.raises(pymoe.KernelCompileError) as caught:
        compile_all([kernel], "sm_90a")
    assert f"{__file__}:{fn.__code__.co_firstlineno} {rule}" in str(caught.value)


def test_a_function_that_is_left_a_call_is_refused(monkeypatch):
    """The name of the function in a cubin is how a call of it shows."""
    kernel = with_activation(ALONE, ActivationConfig(GATED["horner"]))
    monkeypatch.setattr(linking, "SYMBOL", ".text")
    with pytest.raises(pymoe.KernelCompileError, match="must be inlined into kernels for sm_90a"):
        jit.compile_now(kernel, "sm_90a")


def test_what_nvjitlink_says_is_told(monkeypatch):
    kernel = with_activation(ALONE, ActivationConfig(GATED["horner"]))
    monkeypatch.setattr(linking, "function_ltoir", lambda *_: b"no LTO-IR at all" * 8)
    with pytest.raises(pymoe.KernelCompileError, match=r"untranslated\.py:\d+ must link for sm_90a; got "):
        jit.compile_now(kernel, "sm_90a")
