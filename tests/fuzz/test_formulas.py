"""Random functions have the bits of their meaning: compiled by Numba, evaluated by NumPy, and as C++ on the host."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest

import pymoe
from pymoe.device import own_activation
from tests.emulator import emulator
from tests.formula.evaluate import same
from tests.fuzz import formulas
from tests.fuzz.formulas import faults, operands


@pytest.mark.parametrize("first", range(0, 16, 4))
@pytest.mark.parametrize("whole", [False, True], ids=["translated", "compiled_whole"])
def test_on_the_cpu(first, whole):
    found = [fault for pair in formulas.formulas(range(first, first + 4), whole) for fault in faults(*pair)]
    assert not found, "\n".join(found)


def test_a_difference_is_seen():
    formula, made = next(formulas.formulas([3], whole=False))
    last = formula.meaning.rindex("return")
    other = formula.meaning[:last] + f"return f32(1.0000001) * ({formula.meaning[last + 7 :]})"
    assert len(faults(dataclasses.replace(formula, meaning=other), made)) == 2


@pytest.mark.compile
@pytest.mark.skipif(not emulator.AVAILABLE, reason="g++ is not installed")
def test_as_cuda_on_the_host(tmp_path):
    """The text that NVRTC gets, with estimates of reciprocals that are as far off as the device's may be."""
    pairs = list(formulas.formulas(range(200, 260), whole=False))
    texts, cases = [], []
    for i, (_, made) in enumerate(pairs):
        texts.append(own_activation._prelude(made).replace("own_formula", f"formula_{i}"))
        cases.append(f"case {i}: y[k] = pymoe::formula_{i}(g[k], u[k], pymoe::divide); break;")
    source, library = tmp_path / "formulas.cpp", tmp_path / "formulas.so"
    source.write_text(
        f"""#define CLUSTER_BLOCKS 1
#include "cuda_shim.hpp"
{"".join(texts)}
extern "C" void run(int formula, int n, const float* g, const float* u, float* y) {{
    for (int k = 0; k < n; ++k) switch (formula) {{ {" ".join(cases)} }}
}}
"""
    )
    emulator.build(source, library)
    run = ctypes.CDLL(str(library)).run
    g, u = operands()
    found = []
    for i, (formula, _) in enumerate(pairs):
        y = np.empty_like(g)
        run(i, len(g), *(ctypes.c_void_p(x.ctypes.data) for x in (g, u, y)))
        expected = formula.expected(g, u)
        found += [] if same(y, expected) else [formulas.difference("C++", formula, g, u, y, expected)]
    assert not found, "\n".join(found)


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [False, True], ids=["translated", "linked"])
def test_on_a_gpu(cuda, monkeypatch, whole):
    if whole:
        pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (pip install 'pymoe[numba-cu13]')")
    monkeypatch.setattr(formulas, "UNTRANSLATED", ("abs",))  # float64 of two libraries rounds alike almost always only
    g, u = operands()
    for seed in range(300, 308):
        formula = formulas.Writer(seed, whole).formula()
        own = pymoe.register_activation(f"test_fuzz_{whole}_{seed}", formula.function())
        y = pymoe.ops.activation(cuda.asarray(np.concatenate([g, u])[None]), own).get()[0]
        expected = formula.expected(g, u)
        assert same(y, expected), formulas.difference("CUDA", formula, g, u, y, expected)
