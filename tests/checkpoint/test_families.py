"""Every family in every form: numbers, dtypes, shards, order of tensors, layers that count."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import CheckpointError, MoELayer
from pymoe.checkpoint import FAMILIES, list_layers, load_layer
from tests.checkpoint import families
from tests.checkpoint.families import CASES, FLOATS, FP8, FUSED, LAYER, E, I, K, make

forms = pytest.mark.parametrize("family, form", CASES)


def tokens(m=9, k=K):
    return np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)


def test_every_family_is_here():
    assert set(families.FORMS) == set(FAMILIES)


@pytest.mark.parametrize("shards", [1, 5])
@forms
def test_numbers(tmp_path, family, form, shards):
    """scheme="fp32" gives the numbers that the files stand for, bit for bit, wherever weight and scale lie."""
    made = make(family, form)
    folder = made.write(tmp_path / "ck", shards)
    weights = load_layer(folder, LAYER, scheme="fp32")
    np.testing.assert_array_equal(weights.w1, made.w1)
    np.testing.assert_array_equal(weights.w2, made.w2)
    assert weights.dtype == "float32"
    stored = load_layer(folder, LAYER)
    assert stored.dtype == (form if form in FLOATS else "bfloat16")
    assert load_layer(folder, LAYER, dtype="float16").dtype == "float16"
    full, some = MoELayer.from_checkpoint(folder, LAYER), MoELayer.from_checkpoint(folder, LAYER, experts=[2, 0])
    assert full.dtype == np.dtype(getattr(ml_dtypes, stored.dtype, stored.dtype))
    full(tokens())
    some(tokens())
    assert some.last_load.tolist() == [full.last_load[0], 0, full.last_load[2], 0]


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_experts_of_a_projection_in_one_tensor(tmp_path, family, dtype):
    """The other layout of the same model, told by its names, gives the same bits."""
    one, other = make(family, dtype), make(family, dtype, fused=True)
    layers = [MoELayer.from_checkpoint(made.write(tmp_path / str(i)), LAYER) for i, made in enumerate((one, other))]
    np.testing.assert_array_equal(layers[0](tokens()), layers[1](tokens()))
    np.testing.assert_array_equal(load_layer(tmp_path / "1", LAYER, experts=[3]).w1[0], one.w1[3])
    first, second = (list_layers(tmp_path / name)[0] for name in "01")
    assert first == second


@forms
def test_tensors_in_any_order(tmp_path, family, form):
    made = make(family, form)
    order = np.random.default_rng(2).permutation(len(made.tensors))
    weights = load_layer(made.write(tmp_path / "ck", order=order), LAYER, scheme="fp32")
    np.testing.assert_array_equal(weights.w1, made.w1)


@forms
def test_summaries(tmp_path, family, form):
    made = make(family, form)
    (summary,) = list_layers(made.write(tmp_path / "ck", 3))
    topk = 1 if "llama" in family else 2
    assert (summary.layer, summary.num_experts, summary.topk, summary.K, summary.I) == (LAYER, E, topk, K, I)
    assert summary.scheme == form
    routed = [t for name, t in made.tensors.items() if ".experts." in name and not name.endswith("_bias")]
    assert summary.nbytes == sum(t.nbytes for t in routed)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_that_predict_further_tokens_do_not_count(tmp_path, family):
    """A multi-token-prediction layer stands behind the last one under the same names: loaded by number, not listed."""
    made = make(family, "float32")
    made.tensors |= {name.replace(f"layers.{LAYER}.", f"layers.{LAYER + 1}."): t for name, t in made.tensors.items()}
    made.write(tmp_path / "ck")
    if family == "llama4":
        made.config["text_config"]["num_hidden_layers"] = LAYER + 1
        made.write(tmp_path / "ck")
    assert [summary.layer for summary in list_layers(tmp_path / "ck")] == [LAYER]
    assert load_layer(tmp_path / "ck", LAYER + 1).num_experts == E
    section = made.config["text_config"] if family == "llama4" else made.config
    section["num_hidden_layers"] = "4"
    made.write(tmp_path / "ck")
    with pytest.raises(CheckpointError, match="num_hidden_layers as an integer"):
        list_layers(tmp_path / "ck")


@pytest.mark.parametrize("size", [(4, 128, 128), (4, 160, 96), (3, 130, 20), (2, 1, 1), (2, 300, 257)])
@pytest.mark.parametrize("scale_dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu], ids=str)
def test_fp8_blocks_of_any_width(tmp_path, size, scale_dtype):
    """Where gate and up do not fill whole blocks the blocks are cut; codes and scales still mean the same numbers."""
    made = make("qwen3_moe", FP8, size=size, scale_dtype=scale_dtype, num_experts=size[0])
    folder = made.write(tmp_path / "ck", 3)
    weights = load_layer(folder, LAYER)
    config = weights.quant_config
    key = "kFp8Static128BlockE8M0Sym" if scale_dtype == ml_dtypes.float8_e8m0fnu else "kFp8Static128BlockSym"
    for w, scale, numbers in ((weights.w1, config.w1.scale, made.w1), (weights.w2, config.w2.scale, made.w2)):
        decoded = pymoe.dequantize(w, scale, key, block_shape=config.block_shape)
        np.testing.assert_array_equal(decoded, numbers)
    y = MoELayer.from_checkpoint(folder, LAYER)(tokens(k=size[1]))
    want = MoELayer.from_checkpoint(folder, LAYER, scheme="fp32")(tokens(k=size[1]))
    # Tokens and intermediate go through e4m3: 2.6e-2 each over many numbers, 2^-4 at most for a single one.
    assert np.linalg.norm(y - want) <= (6e-2 if size[1] > 1 else 0.13) * np.linalg.norm(want)


def test_scale_fmt_ue8m0(tmp_path):
    """Powers of two in float32 become e8m0, so that activations get such scales too; other numbers are refused."""
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    made = make("deepseek_v3", FP8, scale_dtype=ml_dtypes.float8_e8m0fnu, quantization_config=blocks)
    for name in made.tensors:
        if name.endswith("_scale_inv"):
            made.tensors[name] = made.tensors[name].astype(np.float32)
    weights = load_layer(made.write(tmp_path / "ck"), LAYER)
    assert weights.quant_config.weight_key.scale.dtype == "e8m0" and weights.quant_config.w1.scale.dtype == np.uint8
    assert list_layers(tmp_path / "ck")[0].scheme == "fp8 blocks, e8m0 scales"
    np.testing.assert_array_equal(load_layer(tmp_path / "ck", LAYER, scheme="fp32").w1, made.w1)
    made.tensors[f"model.layers.{LAYER}.mlp.experts.1.up_proj.weight_scale_inv"] += 0.3
    made.write(tmp_path / "ck")
    with pytest.raises(CheckpointError, match="powers of two in .*experts.1.up_proj"):
        load_layer(tmp_path / "ck", LAYER)


def test_fp8_blocks_that_nothing_describes(tmp_path):
    made = make("qwen3_moe", FP8)
    del made.config["quantization_config"]
    with pytest.raises(CheckpointError, match="describe fp8 blocks in quantization_config; got None"):
        load_layer(made.write(tmp_path / "ck"), LAYER)


@pytest.mark.parametrize(
    "field, value", [("fmt", "e5m2"), ("activation_scheme", "static"), ("weight_block_size", [64, 64]),
                     ("scale_fmt", "other"), ("quant_method", None), ("quant_method", ["fp8"])]
)  # fmt: skip
def test_other_fp8_is_refused(tmp_path, field, value):
    made = make("qwen3_moe", FP8)
    made.config["quantization_config"][field] = value
    with pytest.raises(pymoe.UnsupportedError, match=f"as {field} of quantization_config"):
        load_layer(made.write(tmp_path / "ck"), LAYER)


def test_deepseek_without_shared_experts(tmp_path):
    made = make("deepseek_v3", "float32", n_shared_experts=0)
    assert load_layer(made.write(tmp_path / "ck"), LAYER).shared_experts is None


@pytest.mark.parametrize("form", ["bfloat16", "mxfp4"])
@pytest.mark.parametrize("alpha, limit", [(1.5, 5.0), (1.702, 3.0), (1.0, 7.0)])
def test_gpt_oss_with_another_activation(tmp_path, form, alpha, limit):
    """swigluoai has its numbers fixed: with others rows, scales and biases are put in halves."""
    usual, other = make("gpt_oss", form), make("gpt_oss", form, swiglu_alpha=alpha, swiglu_limit=limit)
    one, two = (load_layer(made.write(tmp_path / str(i)), LAYER) for i, made in enumerate((usual, other)))
    rows = [*range(0, 2 * I, 2), *range(1, 2 * I, 2)]
    np.testing.assert_array_equal(two.w1, one.w1[:, rows])
    np.testing.assert_array_equal(two.quant_config.w1.bias, one.quant_config.w1.bias[:, rows])
    assert two.activation == pymoe.ActivationConfig("swigluoai_uninterleave", limit, alpha, 1.0)
    MoELayer.from_checkpoint(tmp_path / "1", LAYER)(tokens())


def test_numbers_out_of_range_warn_nobody(tmp_path):
    made = make("mixtral", "float32")
    name = f"model.layers.{LAYER}.block_sparse_moe.experts.0.w1.weight"
    made.tensors[name][0, 0] = 1e30
    assert np.isinf(load_layer(made.write(tmp_path / "ck"), LAYER, dtype="float16").w1[0, 0, 0])


def test_the_experts_left_out_need_not_be_there(tmp_path):
    """Not even the first one, nor its shard."""
    made = make("qwen3_moe", "bfloat16")
    folder = made.write(tmp_path / "ck", len(made.tensors))
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in where.items():
        if ".experts." in name and ".experts.2." not in name:
            (folder / file).unlink()
    np.testing.assert_array_equal(load_layer(folder, LAYER, experts=[2]).w2[0], made.w2[2])
