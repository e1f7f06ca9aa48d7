"""What contenders are checked against: the float64 layer, its limits, and the data they are given."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe.bench import cases
from pymoe.bench.cases import Shape, draw_items, draw_weights
from pymoe.bench.reference import BF16_ROUNDINGS, REQUANTIZED, Definition, Quantized, frobenius, limit_for
from tests import oracle, tolerance

SHAPE = Shape(4, 2, 128, 128)


@pytest.fixture(scope="module")
def sets():
    return draw_weights(SHAPE, 0)


def test_the_definition_is_the_layer_in_float64(sets):
    (item, *_) = draw_items(SHAPE, 7, sets, 0)
    w = sets[item.number]
    y = Definition(w, Quantized.of(w, "fp32"))(item)
    weights, ids = oracle.route(item.x.astype(np.float64) @ w.gate.T.astype(np.float64), SHAPE.topk)
    np.testing.assert_array_equal(ids, item.ids)
    np.testing.assert_allclose(y, oracle.layer(item.x, w.w1, w.w2, weights, ids), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scheme", ["int8", "fp8_w8a8_block", "int4", "int4_w4a16_zp", "mxfp4", "nvfp4"])
def test_the_definition_multiplies_what_the_codes_stand_for(sets, scheme):
    (item, *_) = draw_items(SHAPE, 7, sets, 0)
    w = sets[item.number]
    q = Quantized.of(w, scheme)
    config = q.quant_config

    def values(codes, desc):
        second = desc.scale_2 if desc.scale_2 is not None else desc.zp
        scale = desc.scale if second is None else (desc.scale, second)
        return pymoe.dequantize(codes, scale, config.weight_key, dtype="float64")

    def through(rows):
        if config.activation_key is None:
            return rows
        codes, scale = pymoe.quantize(np.asarray(rows, np.float32).reshape(-1, rows.shape[-1]), config.activation_key)
        return pymoe.dequantize(codes, scale, config.activation_key).astype(np.float64).reshape(rows.shape)

    weights, ids = oracle.route(item.x.astype(np.float64) @ w.gate.T.astype(np.float64), SHAPE.topk)
    expected = oracle.layer(
        through(item.x.astype(np.float64)), values(q.w1, config.w1), values(q.w2, config.w2), weights, ids,
        round_h=through,
    )  # fmt: skip
    assert frobenius(Definition(w, q)(item), expected) < 1e-6


def test_limits_are_those_of_the_tests():
    for K, I in ((64, 32), (1024, 512), (128, 4096)):
        assert limit_for("ours", "fp32", K, I) == tolerance.fused("float32", K, I).frobenius
    assert BF16_ROUNDINGS == tolerance.fused("bfloat16", 64, 32).frobenius
    assert REQUANTIZED == tolerance.QUANTIZED_FROBENIUS
    for scheme in ("bf16", "int4", "int4_w4a16_zp", "fp8_w8a16", "nvfp4_w4a16"):
        assert limit_for("ours", scheme, 64, 64) == BF16_ROUNDINGS
    for scheme in ("fp8", "int8", "mxfp4", "mxfp4_mxfp8", "int8_w8a8_block"):
        assert limit_for("ours", scheme, 64, 64) == REQUANTIZED


def test_an_answer_of_another_shape_or_with_a_nan_is_infinitely_wrong():
    expected = np.ones((2, 3))
    assert frobenius(np.ones((2, 3), np.float32), expected) == 0
    assert frobenius(np.ones((3, 2), np.float32), expected) == np.inf
    assert frobenius(np.full((2, 3), np.nan, np.float32), expected) == np.inf


def test_numbers_are_random_exact_in_bfloat16_and_differ_from_call_to_call(sets):
    items = draw_items(SHAPE, 5, sets, 0)
    for array in (sets[0].gate, sets[0].w1, sets[0].w2, items[0].x):
        np.testing.assert_array_equal(array.astype(ml_dtypes.bfloat16).astype(np.float32), array)
        assert np.count_nonzero(array) > 0.99 * array.size and len(np.unique(array)) > 100
    assert not np.array_equal(sets[0].w1, sets[1].w1)
    assert [item.number for item in items] == [0, 1] * (len(items) // 2)
    assert len({item.x.tobytes() for item in items}) == len({item.ids.tobytes() for item in items}) == len(items)
    again = draw_items(SHAPE, 5, draw_weights(SHAPE, 0), 0)
    assert all(np.array_equal(a.x, b.x) for a, b in zip(items, again, strict=True))
    assert not np.array_equal(draw_items(SHAPE, 5, sets, 1)[0].x, items[0].x)


def test_a_rounding_to_bfloat16_changes_no_expert():
    shape = Shape(32, 4, 256, 128)
    sets = draw_weights(shape, 3)
    for item in draw_items(shape, 40, sets, 3):
        logits = (item.x @ sets[item.number].gate.T).astype(ml_dtypes.bfloat16).astype(np.float32)
        rounded = np.argsort(-logits, axis=1, kind="stable")[:, : shape.topk]
        np.testing.assert_array_equal(np.sort(rounded, axis=1), np.sort(item.ids, axis=1))


def test_all_experts_chosen_needs_no_gap():
    shape = Shape(2, 2, 128, 64)
    assert len(draw_items(shape, 3, draw_weights(shape, 0), 0)) == cases.ITEMS


@pytest.mark.parametrize("text", ["", "1,,2", "0", "-1", "a", "1.5", "1 2"])
def test_whole_numbers_refuse(text):
    with pytest.raises(pymoe.ArgumentError, match="--tokens must be positive whole numbers"):
        cases.whole_numbers("pymoe bench", "--tokens", text)


def test_shapes_from_text():
    assert Shape.parse("pymoe bench", "8,2,64,32") == Shape(8, 2, 64, 32)
    with pytest.raises(pymoe.ArgumentError, match="--shape must be E,topk,K,I; got '8,2,64'"):
        Shape.parse("pymoe bench", "8,2,64")
    with pytest.raises(pymoe.ArgumentError, match="topk in 1..E"):
        Shape.parse("pymoe bench", "2,3,64,32")
