"""activation against plain float64 formulas, element by element, within the roundings of its float32 steps."""

from __future__ import annotations

import doctest
import importlib
import math
import warnings

import ml_dtypes
import numpy as np
import pytest

from pymoe.activations import ActivationConfig, register_activation
from pymoe.errors import ArgumentError, DTypeError, ShapeError
from pymoe.ops import activation as public_activation
from tests.formula import evaluate
from tests.ops import devices

activation = devices.staged(public_activation)

BF16 = ml_dtypes.bfloat16
U = 2.0**-24  # unit roundoff of float32
TINY = 2.0**-126  # smallest normal float32


@pytest.fixture(params=devices.BACKENDS)
def backend(request):
    return request.param


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def clamp(v, limit):
    return min(max(v, -limit), limit)


def swiglu(g, u, limit=math.inf, alpha=1.0, beta=0.0):
    g, u = min(g, limit), clamp(u, limit)
    return g * sigmoid(alpha * g) * (u + beta)


def gelu(g):
    return 0.5 * g * math.erfc(-g / math.sqrt(2))


def gelu_tanh(g):
    return g * sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))


def situ(g, u, b, linear=0.0):
    return b * math.tanh(g / b) * sigmoid(g) * (linear * math.tanh(u / linear) if linear > 0 else u)


# Name, the formula in float64, the config's parameters, and the condition of the result: by how many of its own
# relative errors an error of the argument of exp or erfc grows.
GATED = {
    "silu": (swiglu, {}, abs),
    "silu_clamped": (lambda g, u: swiglu(g, u, 1.5), {"clamp_limit": 1.5}, abs),
    "silu_shifted": (
        lambda g, u: swiglu(g, u, 2.5, 0.75, 0.5),
        {"clamp_limit": 2.5, "alpha": 0.75, "beta": 0.5},
        abs,
    ),
    "gelu": (lambda g, u: gelu(g) * u, {}, lambda g: g * g + 1),
    "gelu_tanh": (lambda g, u: gelu_tanh(g) * u, {}, lambda g: abs(1.6 * (g + 0.045 * g**3))),
    "swigluoai": (lambda g, u: swiglu(g, u, 7.0, 1.702, 1.0), {}, lambda g: 1.702 * abs(g)),
    "swigluoai_uninterleave": (
        lambda g, u: swiglu(g, u, 3.0, 1.702, 1.0),
        {"clamp_limit": 3.0, "alpha": 1.702, "beta": 1.0},
        lambda g: 1.702 * abs(g),
    ),
    "swiglustep": (lambda g, u: min(g * sigmoid(g), 7.0) * clamp(u, 7.0), {}, abs),
    "situ": (lambda g, u: situ(g, u, 4.0, 25.0), {"situ_beta": 4.0, "situ_linear_beta": 25.0}, abs),
    "situ_plain_up": (lambda g, u: situ(g, u, 1.5), {"situ_beta": 1.5}, abs),
}
UNGATED = {
    "silu_no_mul": (lambda g: g * sigmoid(g), {}, abs),
    "gelu_no_mul": (gelu, {}, lambda g: g * g + 1),
    "gelu_tanh_no_mul": (gelu_tanh, {}, GATED["gelu_tanh"][2]),
    "relu2_no_mul": (lambda g: max(g, 0.0) ** 2, {}, lambda g: 0.0),
}
NAMES = {"silu_clamped": "silu", "silu_shifted": "silu", "situ_plain_up": "situ"}
ALL = [*GATED, *UNGATED]


def config_of(case):
    return ActivationConfig(NAMES.get(case, case), **(GATED | UNGATED)[case][1])


def split(case, x):
    """Return the columns the formula reads, as Python floats a row: (gate, up) or (x,)."""
    if case in UNGATED:
        return (x,)
    half = x.shape[1] // 2
    return (x[:, 0::2], x[:, 1::2]) if case == "swigluoai" else (x[:, :half], x[:, half:])


def reference(case, x):
    """Return the float64 value and the bound on the error of the float32 steps."""
    formula, _, condition = (GATED | UNGATED)[case]
    columns = split(case, x)
    y, bound = np.empty(columns[0].shape), np.empty(columns[0].shape)
    for where in np.ndindex(y.shape):
        values = [float(c[where]) for c in columns]
        y[where] = formula(*values)
        # At most 8 roundings follow the argument's own 4, which the condition multiplies; u + beta may cancel, so it
        # counts by magnitude; an exponential beyond float32 costs what is below the smallest normal number.
        scale = max(abs(y[where]), abs(y[where] / (values[1] + 1) if len(values) > 1 and values[1] != -1 else 0))
        bound[where] = (8 + 4 * condition(values[0])) * U * scale + TINY * (1 + sum(map(abs, values))) ** 2
    return y, bound


def sample(seed, shape=(7, 46), scale=3.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def bits(x):
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 4.0, 30.0])
def test_against_float64_formula(case, scale, backend):
    x = sample([len(case), int(scale)], scale=scale)
    y = activation(x, config_of(case), backend=backend)
    expected, bound = reference(case, x)
    assert y.dtype == np.float32
    assert y.shape == expected.shape
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("case", ALL)
def test_E13_backends_agree_to_4_ulp(case):
    x = np.vstack([sample(i, (40, 96), scale) for i, scale in enumerate([0.01, 1.0, 5.0, 40.0])])
    by_numpy, by_numba = (activation(x, config_of(case), backend=backend) for backend in ("numpy", "numba"))
    ulp = np.spacing(np.maximum(np.abs(by_numpy), np.float32(TINY)))
    assert (np.abs(by_numpy - by_numba) <= 4 * ulp).all()


@pytest.mark.parametrize("case", ALL)
def test_backends_differ_in_few_elements(case):
    """Float64 within 2**-40 rounds to another float32 than the true value in about one case of 2**16."""
    x = np.vstack([sample(i, (100, 1000), scale) for i, scale in enumerate([1e-5, 0.01, 1.0, 8.0])])
    by_numpy, by_numba = (activation(x, config_of(case), backend=backend) for backend in ("numpy", "numba"))
    # Up to three functions an element, and a margin of two over the expected count.
    assert np.count_nonzero(by_numpy != by_numba) <= 2 * 3 * by_numpy.size / 2**16


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_O1_selection_values_are_exact(name, backend):
    """32 * sigmoid(32) rounds to 32, and so does its gelu: the exact oracle of the whole product rests on it."""
    up = np.array([1.0, -3.0, 0.5, 0.0, 1e30], np.float32)
    x = np.r_[np.full(5, 32.0), up].astype(np.float32)[None]
    assert np.array_equal(activation(x, name, backend=backend)[0], 32 * up)
    assert np.array_equal(activation(x[:, :5], f"{name}_no_mul", backend=backend)[0], x[0, :5])


def test_relu2_is_exact(backend):
    x = np.array([[-3.0, -0.0, 0.0, 1.5, -1e30, 2.0**60]], np.float32)
    assert activation(x, "relu2_no_mul", backend=backend).tolist() == [[0.0, 0.0, 0.0, 2.25, 0.0, 2.0**120]]


@pytest.mark.parametrize("case", ALL)
def test_C17_nan_stays_in_its_element(case, backend):
    x = sample(17, (5, 34))
    clean = activation(x, config_of(case), backend=backend)
    for column in range(34):
        poisoned = x.copy()
        poisoned[2, column] = np.nan
        y = activation(poisoned, config_of(case), backend=backend)
        half = 34 if case in UNGATED else 17
        where = column // 2 if case == "swigluoai" else column % half
        assert np.isnan(y[2, where])
        changed = bits(y) != bits(clean)
        changed[2, where] = False
        assert not changed.any()


@pytest.mark.parametrize("case", ALL)
def test_extremes_do_not_warn(case, backend):
    values = np.array([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf, 88.8, -88.8, 104.0, -104.0], np.float32)
    x = np.stack([a.reshape(-1) for a in np.meshgrid(values, values)], axis=1)
    before = np.geterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = activation(x, config_of(case), out_dtype="float16", backend=backend)
        other = activation(x, config_of(case), backend="numpy")
    assert np.geterr() == before
    assert np.array_equal(np.isnan(y), np.isnan(other))
    finite_inputs = np.isfinite(x).all(axis=1)
    assert not np.isnan(y[finite_inputs & (np.abs(x) < 1e30).all(axis=1)]).any()


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_far_negative_gate_vanishes_without_overflow(name, backend):
    x = np.array([[-1e4, -200.0, -1e30, 2.0, 3.0, 1.0]], np.float32)
    assert not activation(x, name, backend=backend).any()


@pytest.mark.parametrize("case", ["silu_clamped", "swigluoai", "swigluoai_uninterleave", "swiglustep"])
def test_clamp_limits_only_what_it_should(case, backend):
    """The gate has no lower limit; up has both."""
    limit = {"silu_clamped": 1.5, "swigluoai_uninterleave": 3.0}.get(case, 7.0)
    gates, ups = [limit + 50, -0.5, -0.5, 1.0], [1.0, limit + 50, -limit - 50, 1.0]
    order = np.ravel(list(zip(gates, ups, strict=True))) if case == "swigluoai" else np.r_[gates, ups]
    y = activation(order.astype(np.float32)[None], config_of(case), backend=backend)
    expected, bound = reference(case, order.astype(np.float32)[None])
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", BF16])
@pytest.mark.parametrize("case", ALL)
def test_one_rounding_to_the_output(case, dtype, backend):
    x = sample(3, (9, 22)).astype(dtype)
    exact = activation(x.astype(np.float32), config_of(case), backend=backend)
    y = activation(x, config_of(case), backend=backend)
    assert y.dtype == np.dtype(dtype)
    assert np.array_equal(bits(y), bits(exact.astype(dtype)))
    out = np.full(y.shape, np.nan, dtype)
    assert activation(x, config_of(case), out=out, backend=backend) is out
    assert np.array_equal(bits(out), bits(y))
    assert np.array_equal(bits(activation(x, config_of(case), out_dtype=np.float32, backend=backend)), bits(exact))


@pytest.mark.parametrize("case", ALL)
def test_rows_do_not_depend_on_their_company(case, backend):
    x = sample(4, (300, 62))
    whole = activation(x, config_of(case), backend=backend)
    single = np.vstack([activation(x[r : r + 1], config_of(case), backend=backend) for r in range(0, 300, 7)])
    assert np.array_equal(bits(whole[::7]), bits(single))
    assert np.array_equal(bits(activation(x[::-1], config_of(case), backend=backend)), bits(whole[::-1]))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", ALL)
def test_bits_do_not_depend_on_threads(case, threads, monkeypatch):
    x = sample(12, (300, 1026))
    expected = activation(x, config_of(case), backend="numba")
    monkeypatch.setenv("PYMOE_NUM_THREADS", str(threads))
    assert np.array_equal(bits(activation(x, config_of(case), backend="numba")), bits(expected))


@pytest.mark.parametrize("width", [4096, 4097, 14336])
def test_D14_every_column_is_written(width, backend):
    out = np.full((2, width), np.nan, np.float32)
    x = np.full((2, 2 * width), 32.0, np.float32)
    assert (activation(x, "silu", out=out, backend=backend) == 1024).all()


@pytest.mark.parametrize("case", ["silu", "swigluoai", "gelu", "relu2_no_mul"])
def test_columns_do_not_depend_on_their_place(case, backend):
    """A vector body and its scalar tail must give the same bits."""
    pair = np.array([[1.37, -0.61]], np.float32)
    one = activation(pair, config_of(case), backend=backend)
    for copies in range(1, 40):
        x = np.tile(pair, copies) if case in ("swigluoai", *UNGATED) else np.repeat(pair, copies, axis=1)
        assert (activation(x, config_of(case), backend=backend).reshape(copies, -1) == one).all()


@pytest.mark.parametrize("case", ["silu", "swigluoai", "silu_no_mul"])
def test_E1_E2_strides(case, backend):
    x = sample(5, (6, 20))
    expected = activation(x, config_of(case), backend=backend)
    base = np.zeros((12, 41), np.float32)
    base[::2, 1::2] = x
    out = np.zeros((expected.shape[1], 6), np.float32).T
    activation(base[::2, 1::2], config_of(case), out=out, backend=backend)
    assert np.array_equal(out, expected)
    assert np.array_equal(activation(np.asfortranarray(x), config_of(case), backend=backend), expected)
    tiled = activation(np.broadcast_to(x[2], (4, 20)), config_of(case), backend=backend)
    assert np.array_equal(tiled, np.tile(expected[2], (4, 1)))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("case", ["silu", "swigluoai", "gelu_no_mul", "situ"])
def test_A1_A3_nothing_to_do(shape, case, backend):
    y = activation(np.empty(shape, np.float32), config_of(case), backend=backend)
    assert y.shape == (shape[0], shape[1] if case in UNGATED else shape[1] // 2)


def test_F2_zero_rows_stay_zero(backend):
    for case in ALL:
        assert not activation(np.zeros((2, 8), np.float32), config_of(case), backend=backend).any()


def geglu_like(gate, up):
    return gate / (1.0 + math.exp(-1.5 * gate)) * (up - 0.25)


def soft_threshold(x):
    return x - 0.5 if x > 0.5 else (x + 0.5 if x < -0.5 else 0.0)


def test_registered_activations_agree(backend):
    gated = register_activation("test_geglu_like", geglu_like)
    plain = register_activation("test_soft_threshold", soft_threshold, gated=False)
    x = sample(6, (11, 26))
    y = activation(x, gated, backend=backend)
    want = np.array([[geglu_like(float(r[i]), float(r[13 + i])) for i in range(13)] for r in x])
    scale = np.abs(want) + np.abs(want / np.where(x[:, 13:] == 0.25, 1, x[:, 13:] - 0.25)) * (1 + np.abs(x[:, 13:]))
    assert y.dtype == np.float32
    assert (np.abs(y - want) <= (8 + 6 * np.abs(x[:, :13])) * U * scale).all()
    y = activation(x, "test_soft_threshold", backend=backend)
    assert y.tolist() == [[float(np.float32(soft_threshold(v))) for v in r] for r in x]
    assert np.array_equal(activation(x, plain, backend=backend), y)


def own_gelu(gate, up):
    return 0.5 * gate * (1 + math.erf(gate * math.sqrt(0.5))) * up


def own_mish(x):
    return x * math.tanh(math.log1p(math.exp(x)))


def own_powers(gate, up):
    return abs(gate) ** up + math.sqrt(gate) / up - math.log(gate * up)


def own_elu(x):
    if x > 0:
        return x
    return math.expm1(x) if x > -1 else math.exp(x) - 1.0


@pytest.mark.parametrize("fn", [geglu_like, soft_threshold, own_gelu, own_mish, own_powers, own_elu])
def test_own_activations_have_the_same_bits_everywhere(backend, fn):
    """Whatever the numbers: subnormal, infinite, NaN, or of any bits."""
    gated = fn in (geglu_like, own_gelu, own_powers)
    own = register_activation(f"test_bits_{fn.__name__}", fn, gated)
    n = len(evaluate.EDGES)
    edges = np.concatenate([np.repeat(evaluate.EDGES[:, None], n, 1), np.tile(evaluate.EDGES, (n, 1))], axis=1)
    for x in (edges, evaluate.sample(2000)[: 9000 // 58 * 58].reshape(-1, 58)):
        expected = public_activation(x, own, backend="numpy")
        assert evaluate.same(activation(x, own, backend=backend), expected)
        for dtype in (BF16, np.float16):
            got = activation(x, own, out_dtype=dtype, backend=backend)
            with np.errstate(all="ignore"):
                want = expected.astype(dtype)
            assert evaluate.same(got.astype(np.float32), want.astype(np.float32))


def own_quotient(gate, up):
    return gate / up


def test_quotients_by_every_mantissa_are_rounded_right(backend):
    """A power of two by a mantissa of ones is the hardest: just above the middle of two floats."""
    own = register_activation("test_quotient", own_quotient)
    count = 2**23 if backend == "cuda" else 2**13
    mantissas = np.arange(2**23 - count, 2**23, dtype=np.uint32)
    below = np.random.default_rng(8).integers(0, 2**23, count, dtype=np.uint32)
    for above in (np.zeros_like(mantissas), below):
        for exponent in (127, 70, 2):
            x = np.concatenate([above + (127 << 23), mantissas + (exponent << 23)]).astype(np.uint32).view(np.float32)
            x = x.reshape(2, -1, 1024).transpose(1, 0, 2).reshape(-1, 2048)
            y = activation(x, own, backend=backend)
            np.testing.assert_array_equal(y, x[:, :1024] / x[:, 1024:])


def test_inputs_are_unchanged(backend):
    x = sample(8)
    kept = x.copy()
    x.flags.writeable = False
    for case in ALL:
        activation(x, config_of(case), backend=backend)
    assert np.array_equal(x, kept)


def test_C10_canaries_around_the_output(backend):
    guarded = np.full((5, 9), -77.0, np.float32)
    activation(sample(9, (3, 18)), "silu", out=guarded[1:4], backend=backend)
    assert (guarded[[0, 4]] == -77.0).all()
    assert (guarded[1:4] != -77.0).all()


@pytest.mark.parametrize(
    "x, options, error, argument",
    [
        (np.zeros(4, np.float32), {}, ShapeError, "x"),
        (np.zeros((2, 5), np.float32), {}, ShapeError, "x"),
        (np.zeros((2, 4), np.int32), {}, DTypeError, "x"),
        ([[0.0, 0.0]], {}, DTypeError, "x"),
        (np.zeros((2, 4), np.float32), {"out": np.zeros((2, 4), np.float32)}, ShapeError, "out"),
        (np.zeros((2, 4), np.float32), {"out": np.zeros((2, 2), np.int32)}, DTypeError, "out"),
        (np.zeros((2, 4), np.float32), {"out_dtype": "int32"}, DTypeError, "out_dtype"),
        (np.zeros((2, 4)), {"out": np.zeros((2, 2)), "out_dtype": "f8"}, ArgumentError, "out_dtype"),
        (np.zeros((2, 4), np.float32), {"backend": "gpu"}, ArgumentError, "backend"),
    ],
)
def test_bad_arguments_are_named(x, options, error, argument):
    with pytest.raises(error, match=f"^activation: {argument} must .*; got "):
        activation(x, "silu", **options)


def test_out_may_not_overlap_x():
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ArgumentError, match="out must not overlap x"):
        activation(x, "silu", out=x[:, :2])


def test_examples_in_the_docstrings():
    found = doctest.testmod(importlib.import_module("pymoe.ops.activation"))
    assert found.attempted
    assert not found.failed
