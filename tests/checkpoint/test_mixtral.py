"""Mixtral's layout: the right rows in the right place, parts of a layer, shards, what config.json may hold."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import ArgumentError, CheckpointError, DTypeError, MoELayer, UnsupportedError
from pymoe.checkpoint import list_layers, load_layer
from tests.checkpoint.files import mixtral, write

BF16 = ml_dtypes.bfloat16


def expected(tensors, layer, x, topk=2):
    """The layer in float64, from the tensors' own names."""
    prefix = f"model.layers.{layer}.block_sparse_moe"
    x = x.astype(np.float64)
    logits = x @ tensors[f"{prefix}.gate.weight"].astype(np.float64).T
    y = np.zeros_like(x)
    for m, row in enumerate(logits):
        ids = np.argsort(-row, kind="stable")[:topk]
        scale = np.exp(row[ids] - row[ids].max())
        for e, weight in zip(ids, scale / scale.sum(), strict=True):
            w1, w3, w2 = (tensors[f"{prefix}.experts.{e}.{p}.weight"].astype(np.float64) for p in ("w1", "w3", "w2"))
            z = w1 @ x[m]
            y[m] += weight * (w2 @ (z / (1 + np.exp(-z)) * (w3 @ x[m])))
    return y


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_a_layer_computes_what_its_tensors_say(tmp_path, dtype, shards):
    tensors = mixtral(tmp_path / "ck", layers=(0, 7), dtype=dtype, shards=shards)
    x = np.random.default_rng(1).standard_normal((9, 16)).astype(np.float32)
    for number in (0, 7):
        layer = MoELayer.from_checkpoint(tmp_path / "ck", number)
        assert layer.dtype == dtype
        y = layer(x)
        want = expected(tensors, number, x)
        np.testing.assert_allclose(y, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_dtype_casts_the_weights(tmp_path):
    tensors = mixtral(tmp_path / "ck")
    weights = load_layer(tmp_path / "ck", 0, dtype=BF16)
    assert weights.w1.dtype == BF16 and weights.dtype == "bfloat16"
    w1 = tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"]
    np.testing.assert_array_equal(weights.w1[2, :8], w1.astype(BF16))
    assert MoELayer.from_checkpoint(tmp_path / "ck", 0, dtype="float16").dtype == np.float16


def test_some_experts_only(tmp_path):
    mixtral(tmp_path / "ck")
    full = MoELayer.from_checkpoint(tmp_path / "ck", 0)
    part = MoELayer.from_checkpoint(tmp_path / "ck", 0, experts=[3, 1])
    x = np.random.default_rng(1).standard_normal((9, 16)).astype(np.float32)
    scale, ids = pymoe.select_experts(full.gate(x), 2)
    kept = np.where(np.isin(ids, [3, 1]), ids, -1)
    np.testing.assert_array_equal(part(x), full(x, topk_weights=scale, topk_ids=kept))


@pytest.mark.parametrize("scheme", ["fp8", "int8", "int4", "mxfp4", "fp8_w8a8_tensor"])
def test_schemes_are_quantize_experts(tmp_path, scheme):
    mixtral(tmp_path / "ck", K=64, width=32)
    weights = load_layer(tmp_path / "ck", 0)
    w1, w2, config = pymoe.quantize_experts(weights.w1, weights.w2, scheme)
    direct = MoELayer(w1, w2, topk=2, gate=weights.gate, quant_config=config)
    x = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    np.testing.assert_array_equal(MoELayer.from_checkpoint(tmp_path / "ck", 0, scheme=scheme)(x), direct(x))


def test_list_layers(tmp_path):
    mixtral(tmp_path / "ck", layers=(11, 2))
    summaries = list_layers(tmp_path / "ck")
    assert [s.layer for s in summaries] == [2, 11]
    assert (summaries[0].num_experts, summaries[0].topk, summaries[0].K, summaries[0].I) == (4, 2, 16, 8)
    assert summaries[0].nbytes == 4 * 3 * 16 * 8 * 4 and summaries[0].dtype == "float32"


@pytest.mark.parametrize(
    "config, kind, text",
    [
        ({"model_type": "gpt2"}, UnsupportedError, "model_type among mixtral; got 'gpt2'"),
        ({"model_type": ["mixtral"]}, UnsupportedError, "model_type among mixtral"),
        ({"num_local_experts": "4"}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": True}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": 0}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": 10**9}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": 5}, CheckpointError, "gate.weight in shape (5, any); got (4, 16)"),
        ({"num_experts_per_tok": 5}, CheckpointError, "num_experts_per_tok at most the 4 experts"),
        ({"num_experts_per_tok": None}, CheckpointError, "num_experts_per_tok"),
        ({"hidden_act": "swish9"}, CheckpointError, "hidden_act"),
        ({"hidden_act": 3}, CheckpointError, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedError, "quantization_config"),
    ],
)
def test_config_json_is_not_trusted(tmp_path, config, kind, text):
    mixtral(tmp_path / "ck")
    described = json.loads((tmp_path / "ck" / "config.json").read_text())
    (tmp_path / "ck" / "config.json").write_text(json.dumps(described | config))
    with pytest.raises(kind) as caught:
        load_layer(tmp_path / "ck", 0)
    assert text in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_config_json_that_is_none(tmp_path, text):
    mixtral(tmp_path / "ck")
    (tmp_path / "ck" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json must"):
        load_layer(tmp_path / "ck", 0)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"experts.1.w3.weight": np.zeros((8, 15), np.float32)}, "experts.1.w3.weight in shape (8, 16); got (8, 15)"),
        ({"experts.1.w2.weight": np.zeros((8, 16), np.float32)}, "experts.1.w2.weight in shape (16, 8)"),
        ({"experts.2.w1.weight": np.zeros((8, 16), np.float16)}, "experts.2.w1.weight in float32 like the other"),
        ({"experts.3.w2.weight": None}, "hold the tensor model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        ({"gate.weight": np.zeros(4, np.float32)}, "gate.weight in shape (4, any)"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, text):
    tensors = mixtral(tmp_path / "ck")
    for name, array in change.items():
        full = f"model.layers.0.block_sparse_moe.{name}"
        tensors.pop(full) if array is None else tensors.update({full: array})
    write(tmp_path / "ck" / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        load_layer(tmp_path / "ck", 0)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ({"layer": 3}, CheckpointError, "must hold an MoE layer 3; got layers [0]"),
        ({"layer": -1}, ArgumentError, "layer must be at least 0"),
        ({"layer": "0"}, DTypeError, "layer must be an integer"),
        ({"layer": 0, "experts": [4]}, CheckpointError, "different experts in 0..3; got [4]"),
        ({"layer": 0, "experts": [1, 1]}, CheckpointError, "different experts"),
        ({"layer": 0, "dtype": "float64"}, ArgumentError, "dtype must be float32, float16 or bfloat16"),
    ],
)
def test_bad_requests(tmp_path, arguments, kind, text):
    mixtral(tmp_path / "ck")
    with pytest.raises(kind) as caught:
        load_layer(tmp_path / "ck", **arguments)
    assert text in str(caught.value)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="be a folder"):
        MoELayer.from_checkpoint(tmp_path / "nowhere", 0)


def test_no_experts_at_all(tmp_path):
    mixtral(tmp_path / "ck")
    layer = MoELayer.from_checkpoint(tmp_path / "ck", 0, experts=[])
    assert not layer(np.ones((3, 16), np.float32)).any()
