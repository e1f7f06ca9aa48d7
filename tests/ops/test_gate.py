"""The GPU's gate against float64 products, and the same bits whatever the number of tokens."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pymoe.ops.route import _cuda_gate
from tests.ops.devices import DEVICES, staged

BF16 = ml_dtypes.bfloat16
U = 2.0**-24  # unit roundoff of float32


@pytest.fixture(params=DEVICES)
def gate(request, monkeypatch):
    stage = staged(_cuda_gate.gate)
    return lambda *args, **kwargs: stage(*args, backend=request.param, **kwargs)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("weight_dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("M, K, E", [(3, 1, 1), (33, 100, 9), (70, 520, 20)])
def test_against_float64(M, K, E, dtype, weight_dtype, gate):
    rng = np.random.default_rng([M, K, E])
    x, weight = rng.standard_normal((M, K)).astype(dtype), rng.standard_normal((E, K)).astype(weight_dtype)
    bias = rng.standard_normal(E).astype(np.float32)
    logits = gate(x, weight, bias)
    assert logits.shape == (M, E) and logits.dtype == np.float32
    wide, wide_weight = x.astype(np.float64), weight.astype(np.float64)
    exact, size = wide @ wide_weight.T + bias, np.abs(wide) @ np.abs(wide_weight).T + np.abs(bias)
    # Tensor cores add 16 products at a time and cut what is below the largest by 2^-24: at most one unit and a half a
    # step, K / 256 + 10 steps one after another; and half a unit for products that are left out.
    assert (np.abs(logits - exact) <= (1.5 * (K / 256 + 10) + 0.5) * U * size).all()


@pytest.mark.parametrize("dtype, weight_dtype", [(BF16, BF16), (np.float32, np.float32), (BF16, np.float32)])
def test_a_tokens_bits_depend_on_no_other(dtype, weight_dtype, gate, monkeypatch):
    rng = np.random.default_rng(5)
    x, weight = rng.standard_normal((170, 1096)).astype(dtype), rng.standard_normal((41, 1096)).astype(weight_dtype)
    whole = gate(x, weight)
    shapes = _cuda_gate._shapes(np.dtype(dtype), np.dtype(weight_dtype))
    assert len(set(shapes)) == 3
    for shape in shapes:
        monkeypatch.setattr(_cuda_gate, "_shapes", lambda *_, shape=shape: (shape,) * 3)
        _cuda_gate._plan.cache_clear()
        for rows in (slice(1), slice(15), slice(170), slice(100, 133)):
            np.testing.assert_array_equal(gate(x[rows].copy(), weight).view(np.uint32), whole[rows].view(np.uint32))
    _cuda_gate._plan.cache_clear()


@pytest.mark.parametrize("M, E", [(0, 4), (4, 0), (0, 0)])
def test_A2_nothing_to_do(M, E, gate):
    assert gate(np.zeros((M, 8), np.float32), np.zeros((E, 8), np.float32)).shape == (M, E)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_C17_infinity_and_nan_stay_in_their_token(dtype, gate):
    x, weight = np.ones((40, 40), dtype), np.ones((9, 40), dtype)
    x[1, 3], x[2, 7], x[3, 39] = np.inf, np.nan, -np.inf
    logits = gate(x, weight)
    assert not np.isfinite(logits[1:4]).any() and np.isnan(logits[2]).all()
    assert (logits[[0, *range(4, 40)]] == 40).all()


def test_E5_rows_that_are_not_aligned(gate):
    rng = np.random.default_rng(6)
    x, weight = rng.standard_normal((5, 67)).astype(BF16), rng.standard_normal((3, 67)).astype(BF16)
    padded = [np.concatenate([a, np.zeros((len(a), 5), BF16)], axis=1) for a in (x, weight)]
    np.testing.assert_array_equal(gate(x, weight), gate(*padded))
