"""Functions that are not translated, linked into kernels on the GPU: the CPU's numbers, pairs, tapes, graphs, price."""

from __future__ import annotations

import math

import numpy as np
import pytest

import pymoe
from pymoe.formula import ClosedFunction
from tests import gpu
from tests.cuda.test_own_activations import (
    agree_with_the_cpu,
    captured_layers,
    give_the_bits_of_the_first_call,
    replay_us,
    take_turns,
)
from tests.cuda.transfer import to_device, to_host
from tests.experts.test_pairs import SCHEMES
from tests.formula import untranslated

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed (pip install 'pymoe[numba-cu13]')")

pytestmark = pytest.mark.gpu

GATED = {fn.__name__: pymoe.register_activation(f"test_gpu_{fn.__name__}", fn) for fn in untranslated.GATED}
PLAIN = pymoe.register_activation("test_gpu_plain_wave", untranslated.plain_wave, gated=False)


def looped_silu(gate, up):
    y = gate
    while y > 1e30:  # never in a model; no program has such a loop
        y = y / 2.0
    return y / (1.0 + math.exp(-y)) * up


pymoe.register_activation("test_gpu_looped_silu", looped_silu)


@pytest.mark.parametrize("backend", ["cuda", "numba_cuda"])
@pytest.mark.parametrize("own", [*GATED.values(), PLAIN], ids=lambda own: own.name)
def test_the_gpu_computes_what_the_cpu_does(cuda, own, backend):
    """The same bits, unless a function of float64 is in it: its two libraries may round to neighbours."""
    assert isinstance(own.program, ClosedFunction)
    x = np.concatenate(untranslated.operands(20_000))[None].repeat(3, axis=0)
    x[1:] *= np.float32([[0.1], [30.0]])
    expected = pymoe.ops.activation(x, own, backend="numpy")
    y = to_host(pymoe.ops.activation(to_device(x), own, backend=backend))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    finite = np.isfinite(expected)
    different = np.count_nonzero(y[finite] != expected[finite])
    print(f"{own.name} {backend}: {different} of {finite.sum()} differ")
    np.testing.assert_array_max_ulp(y[finite], expected[finite], 4)
    if own.fn in untranslated.EXACT:
        assert different == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_pair_agrees_with_the_cpu(cuda, scheme):
    gpu.compile_gemms(GATED["helped"])
    agree_with_the_cpu(scheme, GATED["helped"])


@pytest.mark.parametrize("scheme", [None, "fp8_w8a8_block", "mxfp4_w4a16"])
def test_tapes_and_graphs_give_the_bits_of_the_first_call(cuda, scheme):
    give_the_bits_of_the_first_call(scheme, "test_gpu_wave")


def test_layers_of_different_functions_take_turns(cuda):
    """Translated, linked and built in: none runs another's kernel, whose shapes and formats are the same."""
    take_turns(["test_gpu_helped", "test_gpu_newton", "test_gpu_silu", "silu"])


def made(factor):
    def f(gate, up):
        y = gate
        while y > 5.0:
            y = y - 1.0
        return y * up * factor

    return f


def translated(factor):
    return lambda gate, up: (gate if gate < 5.0 else gate - 3.0) * up * factor


@pytest.mark.parametrize("kind", [made, translated], ids=["linked", "translated"])
def test_numbers_of_closures_are_those_of_the_registration(cuda, kind):
    x = np.float32([[1.5, 7.25, 2.0, 3.0]])
    for factor in (2.0, 3.0):
        own = pymoe.register_activation(f"test_gpu_closure_{kind.__name__}_{factor}", kind(factor))
        assert isinstance(own.program, ClosedFunction) == (kind is made)
        np.testing.assert_array_equal(to_host(pymoe.ops.activation(to_device(x), own)), [[3 * factor, 12.75 * factor]])


@pytest.mark.parametrize("M", [16, 1024, 4096])
def test_what_linking_costs(cuda, M):
    """The same SiLU, built in, translated, and linked with a loop around it that never turns.

    The loop runs element by element where the others are computed eight at a time: 10.6 and 12.3 % on an H200.
    """
    graphs = captured_layers(cuda, M, ("silu", "test_gpu_silu", "test_gpu_looped_silu"))
    built_in, translated, linked = replay_us(cuda, graphs)
    print(f"M {M}: built-in {built_in:.1f} us, translated {100 * translated / built_in - 100:+.2f} %, "
          f"linked {100 * linked / built_in - 100:+.2f} %")  # fmt: skip
    a, b = (to_host(graph.output).astype(np.float32) for graph in graphs[::2])
    assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)
    assert linked <= 1.15 * built_in
