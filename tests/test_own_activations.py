"""`register_activation`: names, what may be registered again, threads, caches, and layers that use it on the CPU."""

from __future__ import annotations

import dataclasses
import math
import runpy
import threading
from pathlib import Path

import numpy as np
import pytest

import pymoe
from pymoe import ActivationConfig, FusedMoEKernel, MoEActivation, SingleProcessPrepareAndFinalize, register_activation
from pymoe.activations import RegisteredActivation, registered_activations
from pymoe.device.jit import KernelId, cache_key
from pymoe.device.own_activation import with_activation
from pymoe.formula import ClosedFunction
from pymoe.ops import activation
from tests.experts.test_pairs import SCHEMES, Problem, close, problem, standard
from tests.formula import untranslated
from tests.formula.evaluate import defined
from tests.selection import BF16


def own_silu(gate, up):
    return gate / (1.0 + math.exp(-gate)) * up


def own_silu_again(g, u):
    """The same work under other names."""
    return g / (1 + math.exp(-g)) * u


def squared_relu(x):
    return max(x, 0.0) ** 2


def scaled(factor):
    return lambda gate, up: gate * up * factor


SILU = register_activation("test_own_silu", own_silu)
PLAIN = register_activation("test_own_relu2", squared_relu, gated=False)


def test_a_name_stands_for_it_wherever_an_activation_is_taken():
    assert isinstance(SILU, RegisteredActivation) and SILU.value == SILU.name == "test_own_silu" and SILU.is_gated
    assert ActivationConfig("test_own_silu").activation is SILU is ActivationConfig(SILU).activation
    assert ActivationConfig(PLAIN).width(6) == 6 and ActivationConfig(SILU).width(6) == 3
    assert SILU in registered_activations()
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    by_name, by_object = activation(x, "test_own_silu"), activation(x, ActivationConfig(SILU))
    assert np.array_equal(by_name, by_object) and np.allclose(by_name, activation(x, "silu"), rtol=1e-6)


def test_parameters_of_built_in_activations_are_refused():
    with pytest.raises(pymoe.ArgumentError, match="alpha must be None, since test_own_silu does not read it"):
        ActivationConfig("test_own_silu", alpha=2.0)


def test_the_same_work_may_be_registered_again_and_other_work_not():
    assert register_activation("test_own_silu", own_silu) is SILU
    assert register_activation("test_own_silu", own_silu_again) is SILU
    with pytest.raises(pymoe.ArgumentError, match=r"must be new, or .*; got 'test_own_silu' of own_silu at .*\.py:\d+"):
        register_activation("test_own_silu", lambda g, u: g * u)
    with pytest.raises(pymoe.ArgumentError, match="name must be new, or be registered again"):
        register_activation("test_own_relu2", lambda g, u: g * u)
    three = register_activation("test_factor", scaled(3.0))
    assert register_activation("test_factor", scaled(3)) is three
    with pytest.raises(pymoe.ArgumentError, match="name must be new, or"):
        register_activation("test_factor", scaled(3.5))
    assert ActivationConfig("test_factor").activation is three


@pytest.mark.parametrize("name", [m.value for m in MoEActivation] + ["gelu_pytorch_tanh"])
def test_built_in_names_are_reserved(name):
    with pytest.raises(pymoe.ArgumentError, match="name must be new; got .* which is built in"):
        register_activation(name, own_silu)


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ((3, own_silu), pymoe.DTypeError, "name must be a string; got int"),
        (("", own_silu), pymoe.ArgumentError, "name must be a word; got ''"),
        ((" silu", own_silu), pymoe.ArgumentError, "name must be a word"),
        (("test_bad", 3), pymoe.DTypeError, "fn must be callable; got int"),
        (("test_bad", own_silu, 1), pymoe.DTypeError, "gated must be True or False; got 1"),
        (("test_bad", own_silu, False), pymoe.ArgumentError, "fn must take 1 positional argument;"),
        (("test_bad", squared_relu), pymoe.ArgumentError, "fn must take 2 positional arguments; got squared_relu(x)"),
        (("test_bad", math.exp, False), pymoe.ArgumentError, "fn must be a Python function"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_registered(arguments, kind, text):
    with pytest.raises(kind) as caught:
        register_activation(*arguments)
    assert text in str(caught.value)
    with pytest.raises(pymoe.ArgumentError, match="activation must be one of silu, .*test_own_silu"):
        ActivationConfig("test_bad")


def test_numbers_are_taken_at_registration():
    factor = 2.0
    fn = defined("def f(x):\n    return x * factor", factor=factor)
    register_activation("test_then", fn, gated=False)
    fn.__globals__["factor"] = 5.0
    one = np.ones((1, 1), np.float32)
    assert [activation(one, "test_then", backend=b)[0, 0] for b in ("numpy", "numba")] == [2, 2]
    with pytest.raises(pymoe.ArgumentError, match="name must be new, or"):
        register_activation("test_then", fn, gated=False)


def test_the_configuration_shows_them(capsys):
    pymoe.show_config()
    assert "test_own_relu2" in capsys.readouterr().out


def test_many_threads_register_one_winner_a_name():
    barrier, results = threading.Barrier(8), {}

    def work(i):
        barrier.wait()
        for name in ("test_race_same", "test_race_other"):
            fn = own_silu if name == "test_race_same" else scaled(float(i))
            try:
                results[name, i] = register_activation(name, fn)
            except pymoe.ArgumentError:
                results[name, i] = None

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = {id(results["test_race_same", i]) for i in range(8)}
    assert same == {id(ActivationConfig("test_race_same").activation)}
    winners = [results["test_race_other", i] for i in range(8) if results["test_race_other", i] is not None]
    assert winners == [ActivationConfig("test_race_other").activation]


# What could be taken for each other: numbers that are equal but for their bits, a constant and the number of a step.
ALIKE = {
    "zero": lambda g, u: 0.0, "minus_zero": lambda g, u: -0.0, "constant": lambda g, u: (g + u) * 1.0 + u * g,
    "step": lambda g, u: (g + u) * 0.0 + u * g, "up": lambda g, u: u * 1.0, "gate": lambda g, u: g * 1.0,
    "two": lambda g, u: g * 2.0 + u, "three": lambda g, u: g * 3.0 + u,
}  # fmt: skip


def test_none_is_taken_for_another():
    """Not by the compiled kernels of either backend, nor by the cubin cache, whose key holds the text itself."""
    made = {name: register_activation(f"test_alike_{name}", fn) for name, fn in ALIKE.items()}
    x = np.random.default_rng(1).standard_normal((2, 6)).astype(np.float32)
    gate, up = x[:, :3], x[:, 3:]
    for name, own in made.items():
        with np.errstate(all="ignore"):
            expected = np.broadcast_to(np.float32(1) * ALIKE[name](gate, up), gate.shape).astype(np.float32)
        for backend in ("numpy", "numba"):
            y = activation(x, own, backend=backend)
            assert np.array_equal(y.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32)), (name, backend)
    kernel = KernelId("activation/activation.cu", "pymoe::activation_kernel")
    ids = [with_activation(kernel, ActivationConfig(own)) for own in made.values()] + [kernel]
    assert len(set(ids)) == len(ids) == len({repr(k) for k in ids}) == len({str(k) for k in ids})
    pytest.importorskip("cuda.core", reason="cuda-core is not installed (pip install 'pymoe[cu13]')")
    keys = {cache_key(k, "sm_90a", (13, 0)) for k in ids}
    assert len(keys) == len(ids)
    again = with_activation(kernel, ActivationConfig(register_activation("test_alike_zero", ALIKE["zero"])))
    assert cache_key(again, "sm_90a", (13, 0)) == cache_key(ids[0], "sm_90a", (13, 0))


def test_other_constants_are_other_kernels():
    pytest.importorskip("cuda.core", reason="cuda-core is not installed (pip install 'pymoe[cu13]')")
    kernel = KernelId("grouped_gemm/simt.cu", "pymoe::grouped_gemm_simt_kernel<false, 64>")
    made = [register_activation(f"test_key_{i}", scaled(c)) for i, c in enumerate((1.5, 1.5, 2.5))]
    keys = [cache_key(with_activation(kernel, ActivationConfig(own)), "sm_90a", (13, 0)) for own in made]
    assert keys[0] == keys[1] != keys[2] and with_activation(kernel, ActivationConfig("silu")) is kernel


def like(p: Problem, own):
    return dataclasses.replace(p, activation=ActivationConfig(own))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_pair_and_every_experts_on_the_cpu(scheme):
    p = like(problem(scheme, biases=True), SILU)
    y = standard(p)
    assert np.isfinite(y).all()
    close(scheme, y, standard(p, pymoe.NumpyReferenceExperts))
    close(scheme, y, standard(problem(scheme, biases=True)))
    batched = p.run(
        pymoe.NaiveBatchedExperts(p.config(), p.quant_config, max_num_tokens=16, num_dispatchers=1),
        pymoe.BatchedPrepareAndFinalize(max_num_tokens=16, num_local_experts=5, num_dispatchers=1, rank=0),
    )
    np.testing.assert_array_equal(batched, y)


WHOLE = {
    fn.__name__: register_activation(f"test_own_{fn.__name__}", fn, fn is not untranslated.plain_wave)
    for fn in (*untranslated.GATED, untranslated.plain_wave)
}
"""Functions that Numba compiles whole."""


@pytest.mark.parametrize("own", WHOLE.values(), ids=WHOLE)
def test_a_function_that_is_not_translated_has_the_same_bits_on_every_backend_of_the_cpu(own):
    assert isinstance(own.program, ClosedFunction)
    x = np.concatenate(untranslated.operands(300)).reshape(4, -1)
    for dtype in (np.float32, BF16):
        by_numpy, by_numba = (activation(x.astype(dtype), own, backend=name) for name in ("numpy", "numba"))
        assert np.isfinite(by_numpy.astype(np.float32)).mean() > 0.9
        assert np.array_equal(by_numpy.view(np.uint8), by_numba.view(np.uint8))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_function_that_is_not_translated_in_every_pair(scheme):
    p = like(problem(scheme, biases=True), WHOLE["helped"])
    y = standard(p)
    assert np.isfinite(y).all()
    close(scheme, y, standard(p, pymoe.NumpyReferenceExperts))


def test_whole_functions_are_registered_again_by_text_and_numbers():
    def made(c, turns=3):
        def f(gate, up):
            y = gate
            while y > c:
                y = y / turns
            return y * up

        return f

    first = register_activation("test_own_made", made(2.0))
    assert register_activation("test_own_made", made(2.0)) is first
    for other in (made(2.5), made(2.0, 4), own_silu):
        with pytest.raises(pymoe.ArgumentError, match=r"must be new, or .*; got 'test_own_made' of f at .*\.py:\d+"):
            register_activation("test_own_made", other)
    kernel = KernelId("activation/activation.cu", "pymoe::activation_kernel")
    others = [with_activation(kernel, ActivationConfig(own)) for own in (first, *WHOLE.values(), SILU)]
    assert len(set(others)) == len(others) == len({repr(k) for k in others})
    assert with_activation(kernel, ActivationConfig(first)) == others[0]


def test_a_plain_one_in_a_layer_and_its_monolithic_twin():
    rng = np.random.default_rng(2)
    w1 = rng.standard_normal((4, 24, 16)).astype(np.float32)
    w2 = rng.standard_normal((4, 16, 24)).astype(np.float32)
    x, logits = rng.standard_normal((9, 16)).astype(np.float32), rng.standard_normal((9, 4)).astype(np.float32)
    own = pymoe.MoELayer(w1, w2, topk=2, activation="test_own_relu2")(x, logits)
    np.testing.assert_array_equal(own, pymoe.MoELayer(w1, w2, topk=2, activation="relu2_no_mul")(x, logits))
    np.testing.assert_array_equal(own, pymoe.fused_moe(x, w1, w2, logits, 2, activation=PLAIN))
    config = pymoe.fused_experts(x, w1, w2, *pymoe.select_experts(logits, 2), activation=ActivationConfig(PLAIN))
    np.testing.assert_array_equal(own, config)


def test_the_example_holds_what_it_claims(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_activation.py"))
    assert "relative difference from plain Python" in capsys.readouterr().out


def test_a_kernel_of_the_modular_interface_takes_it_by_object():
    p = like(problem(), SILU)
    kernel = FusedMoEKernel(SingleProcessPrepareAndFinalize(), pymoe.CpuExperts(p.config(), p.quant_config))
    y = kernel.apply(p.x, p.w1, p.w2, topk_weights=p.scale, topk_ids=p.ids, activation=SILU)
    np.testing.assert_array_equal(y, standard(p))
