"""scheme= on the way into memory: the bits of `quantize_experts`, from floats and from codes, an expert at a time."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import ArgumentError, MoELayer, ShapeError
from pymoe.checkpoint import load_layer
from pymoe.ops.quantize.schemes import ALIASES, CASTS, SCHEMES
from tests.checkpoint.families import CASES, LAYER, E, K, make

NAMES = (*SCHEMES, *ALIASES, *CASTS)
ARRAYS = ("scale", "scale_2", "zp")


@pytest.mark.parametrize("scheme", NAMES)
@pytest.mark.parametrize("family, form", CASES)
def test_every_scheme_from_every_form(tmp_path, family, form, scheme):
    made = make(family, form)
    folder = made.write(tmp_path / "ck", 2)
    for experts in (None, [3, 1]):
        weights = load_layer(folder, LAYER, experts=experts, scheme=scheme)
        chosen = list(range(E)) if experts is None else experts
        w1, w2, config = pymoe.quantize_experts(made.w1[chosen], made.w2[chosen], scheme)
        for found, want in ((weights.w1, w1), (weights.w2, w2)):
            assert found.dtype == want.dtype
            np.testing.assert_array_equal(found, want)
        for name in ("w1", "w2"):
            found, want = getattr(weights.quant_config, name), getattr(config, name)
            assert (found.dtype, found.shape) == (want.dtype, want.shape)
            for array in ARRAYS:
                assert (getattr(found, array) is None) == (getattr(want, array) is None)
                if getattr(want, array) is not None:
                    np.testing.assert_array_equal(getattr(found, array), getattr(want, array))
        assert (weights.quant_config.a1, weights.quant_config.block_shape) == (config.a1, config.block_shape)


@pytest.mark.parametrize("scheme", ["fp8", "int4", "mxfp4", "nvfp4_w4a16", "bf16"])
@pytest.mark.parametrize("family, form", CASES)
def test_the_layer_runs(tmp_path, family, form, scheme):
    """Biases, shared experts and router stay; the codes are those of the numbers."""
    made = make(family, form)
    layer = MoELayer.from_checkpoint(made.write(tmp_path / "ck"), LAYER, scheme=scheme)
    x = np.random.default_rng(1).standard_normal((9, K)).astype(np.float32)
    want = MoELayer.from_checkpoint(tmp_path / "ck", LAYER, scheme="fp32")(x)
    y = layer(x)
    # e4m3 moves each of six factors (tokens and weights of gate, up and down) by 2.6e-2; 4-bit codes by 6e-2 to 9e-2.
    assert np.linalg.norm(y - want) <= {"bf16": 4e-3, "fp8": 9e-2}.get(scheme, 0.3) * np.linalg.norm(want)
    assert (layer.quant_config.w2.bias is not None) == (family == "gpt_oss")


@pytest.mark.parametrize(
    "asked, dtype",
    [
        ({}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"scheme": "int8"}, "bfloat16"),
        ({"scheme": "fp32"}, "float32"),
        ({"scheme": "fp16"}, "float16"),
        ({"scheme": "fp32", "dtype": "float16"}, "float16"),
        ({"scheme": "fp8", "dtype": "float32"}, "float32"),
    ],
)
@pytest.mark.parametrize("form", ["bfloat16", "fp8 blocks"])
def test_the_dtype_to_compute_in(tmp_path, form, asked, dtype):
    folder = make("deepseek_v3", form).write(tmp_path / "ck")
    assert load_layer(folder, LAYER, **asked).dtype == dtype
    layer = MoELayer.from_checkpoint(folder, LAYER, **asked)
    assert layer.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert layer.shared_experts.w1.dtype == layer.dtype


def test_schemes_take_the_numbers_of_the_files_whatever_is_computed_in(tmp_path):
    made = make("mixtral", "float32")
    folder = made.write(tmp_path / "ck")
    one, other = (load_layer(folder, LAYER, scheme="int8", dtype=dtype) for dtype in ("float32", "float16"))
    np.testing.assert_array_equal(one.w1, other.w1)


def test_no_experts(tmp_path):
    folder = make("gpt_oss", "mxfp4").write(tmp_path / "ck")
    weights = load_layer(folder, LAYER, experts=[], scheme="int4")
    assert weights.w1.shape[0] == 0 and weights.quant_config.w1.scale.shape[0] == 0
    assert not MoELayer.from_checkpoint(folder, LAYER, experts=[], scheme="int4")(np.ones((3, K), np.float32)).any()


def test_an_unknown_scheme_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    folder = make("mixtral", "float32").write(tmp_path / "ck")
    for scheme in ("int3", 4, ["fp8"]):
        with pytest.raises(ArgumentError, match="scheme must be one of"):
            MoELayer.from_checkpoint(folder, LAYER, scheme=scheme)
    made = make("mixtral", "float32", size=(2, 40, 24), num_local_experts=2)
    made.write(tmp_path / "odd")
    with pytest.raises(ShapeError, match="multiple of 32"):
        load_layer(tmp_path / "odd", LAYER, scheme="mxfp4")


@pytest.mark.parametrize("family, form", [("mixtral", "float32"), ("deepseek_v3", "fp8 blocks"), ("gpt_oss", "mxfp4")])
@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_one_expert_in_floats_at_a_time(tmp_path, family, form, scheme):
    """Peak memory is that of the codes and of a few experts in floats, not of all 32."""
    count, k, width = 32, 256, 256
    key = {"deepseek_v3": "n_routed_experts"}.get(family, "num_local_experts")
    made = make(family, form, size=(count, k, width), **{key: count})
    folder = made.write(tmp_path / "ck")
    load_layer(folder, LAYER, experts=[0], scheme=scheme)  # compiles
    tracemalloc.start()
    try:
        weights = load_layer(folder, LAYER, scheme=scheme)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    codes = weights.w1.nbytes + weights.w2.nbytes
    expert = 3 * k * width * 4
    assert peak <= codes * 1.1 + 8 * expert < 0.75 * (codes + count * expert)
