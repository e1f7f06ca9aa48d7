"""Mixtral's layout: the right rows in the right place, parts of a layer, shards, what config.json may hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

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
    assert summaries[0].nbytes == 4 * 3 * 16 * 8 * 4 and summaries[0].scheme == "float32"


@pytest.mark.parametrize(
    "config, kind, text",
    [
        (
            {"model_type": "gpt2"},
            UnsupportedError,
            "model_type among deepseek_v3, gpt_oss, llama4, llama4_text, mixtral, qwen2_moe, qwen3_moe",
        ),
        (
            {"model_type": ["mixtral"]},
            UnsupportedError,
            "model_type among deepseek_v3, gpt_oss, llama4, llama4_text, mixtral",
        ),
        ({"num_local_experts": "4"}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": True}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": 0}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": 10**9}, CheckpointError, "num_local_experts"),
        ({"num_local_experts": 5}, CheckpointError, "gate.weight in shape (5, any); got (4, 16)"),
        ({"num_experts_per_tok": 5}, CheckpointError, "num_experts_per_tok at most the 4 experts"),
        ({"num_experts_per_tok": None}, CheckpointError, "num_experts_per_tok"),
        ({"hidden_act": "swish9"}, CheckpointError, "hidden_act"),
        ({"hidden_act": 3}, CheckpointError, "hidden_act"),
        ({"hidden_act": "relu2_no_mul"}, CheckpointError, "hidden_act"),
        ({"hidden_act": "swigluoai"}, CheckpointError, "hidden_act"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "fp8 as quant_method"),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedError, "[128, 128] as weight_block_size"),
        ({"quantization_config": [1]}, UnsupportedError, "no quantization_config but an object with quant_method"),
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
        ({"experts.2.w1.weight": np.zeros((8, 16), np.float16)}, "experts.2.w1.weight in float32; got float16"),
        ({"experts.3.w2.weight": None}, "hold the tensor model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        ({"gate.weight": np.zeros(4, np.float32)}, "gate.weight in shape (4, any)"),
        ({"gate.weight": np.zeros((4, 0), np.float32)}, "gate.weight in shape (4, any)"),
        ({"gate.weight": np.zeros((4, 16), np.int64)}, "gate.weight in float32 or float16 or bfloat16; got int64"),
        ({"experts.0.w1.weight": np.zeros((), np.float32)}, "experts.0.w1.weight in shape (any, 16); got ()"),
        ({"experts.0.w1.weight": np.zeros((0, 16), np.float32)}, "experts.0.w1.weight in shape (any, 16); got (0, 16)"),
        ({"experts.0.w1.weight": np.zeros((8, 16), np.int8)}, "experts.0.w1.weight in float32 or float16 or bfloat16"),
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
    with pytest.raises(CheckpointError):
        list_layers(tmp_path / "ck")


def test_a_lying_config_costs_no_memory(tmp_path):
    """65536 experts by gate and config, one in the file: refused from headers, before 16 GiB are asked for."""
    E, K = 65536, 256
    tensors = {"model.layers.0.block_sparse_moe.gate.weight": np.zeros((E, K), np.float16)}
    for part, shape in (("w1", (1024, K)), ("w3", (1024, K)), ("w2", (K, 1024))):
        tensors[f"model.layers.0.block_sparse_moe.experts.0.{part}.weight"] = np.zeros(shape, np.float16)
    mixtral(tmp_path / "ck", num_local_experts=E)
    write(tmp_path / "ck" / "model.safetensors", tensors)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"hold the tensor .*experts\.1\.w1"):
            load_layer(tmp_path / "ck", 0)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "arguments, kind, text",
    [
        ({"layer": 3}, CheckpointError, "must hold an MoE layer 3; got layers [0]"),
        ({"layer": -1}, ArgumentError, "layer must be at least 0"),
        ({"layer": "0"}, DTypeError, "layer must be an integer"),
        ({"layer": 0, "experts": [4]}, ArgumentError, "experts must be ids in 0..3; got [4]"),
        ({"layer": 0, "experts": [1, 1]}, ArgumentError, "experts must name each expert once"),
        ({"layer": 0, "experts": [-1]}, ArgumentError, "experts must be at least 0; got -1"),
        ({"layer": 0, "experts": 2}, DTypeError, "experts must be a sequence of integers"),
        ({"layer": 0, "experts": "01"}, DTypeError, "experts must be a sequence of integers"),
        ({"layer": 0, "experts": [1.0]}, DTypeError, "experts must be an integer"),
        ({"layer": 0, "dtype": "float64"}, DTypeError, "dtype must be float32, float16 or bfloat16; got float64"),
        ({"layer": 0, "dtype": "float99"}, DTypeError, "dtype must be a dtype; got 'float99'"),
    ],
)
def test_bad_requests(tmp_path, arguments, kind, text):
    mixtral(tmp_path / "ck")
    with pytest.raises(kind) as caught:
        load_layer(tmp_path / "ck", **arguments)
    assert text in str(caught.value)


@pytest.mark.parametrize("folder", [3, None, b"ck"])
def test_folders_that_are_no_paths(folder):
    for call in (lambda: load_layer(folder, 0), lambda: list_layers(folder)):
        with pytest.raises(DTypeError, match="folder must be a path"):
            call()


def test_only_the_asked_experts_are_read(tmp_path):
    """One shard an expert; all but two, and the headers of their neighbours, are gone."""
    tensors = mixtral(tmp_path / "ck", shards=13)
    whole = load_layer(tmp_path / "ck", 0)
    where = json.loads((tmp_path / "ck" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {where[name] for name in tensors if "gate" in name or ".experts.2." in name or ".experts.0." in name}
    unneeded = set(where.values()) - needed
    assert unneeded
    for file in unneeded:
        (tmp_path / "ck" / file).unlink()
    part = load_layer(tmp_path / "ck", 0, experts=[2])
    assert part.experts == (2,) and part.num_experts == 4
    np.testing.assert_array_equal(part.w1[0], whole.w1[2])
    np.testing.assert_array_equal(part.w2[0], whole.w2[2])


def test_a_layer_outlives_its_files(tmp_path):
    tensors = mixtral(tmp_path / "ck")
    weights = load_layer(tmp_path / "ck", 0)
    os.truncate(tmp_path / "ck" / "model.safetensors", 8)
    np.testing.assert_array_equal(weights.gate, tensors["model.layers.0.block_sparse_moe.gate.weight"])
    assert weights.w1.sum() != 0


@pytest.mark.parametrize(
    "name, activation",
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
    ],
)
def test_activations_under_the_layouts_names(tmp_path, name, activation):
    mixtral(tmp_path / "ck", hidden_act=name)
    assert load_layer(tmp_path / "ck", 0).activation == pymoe.ActivationConfig(activation)


def test_K5_config_json_is_not_read_through_a_link_out(tmp_path):
    mixtral(tmp_path / "ck")
    os.rename(tmp_path / "ck" / "config.json", tmp_path / "config.json")
    (tmp_path / "ck" / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="lie in its folder"):
        load_layer(tmp_path / "ck", 0)


def test_K5_config_json_that_is_a_pipe_does_not_block(tmp_path):
    mixtral(tmp_path / "ck")
    (tmp_path / "ck" / "config.json").unlink()
    os.mkfifo(tmp_path / "ck" / "config.json")
    with pytest.raises(CheckpointError, match="be a regular file"):
        load_layer(tmp_path / "ck", 0)


def test_K1_K6_code_beside_the_weights_is_not_imported(tmp_path):
    """Neither what config.json names as the model's own code, nor modules under the names of ours and of libraries."""
    mixtral(tmp_path / "ck", auto_map={"AutoModel": "modeling.Model"}, trust_remote_code=True)
    for name in ("modeling", "mixtral", "json", "numpy", "ml_dtypes", "sitecustomize"):
        (tmp_path / "ck" / f"{name}.py").write_text("raise SystemExit('imported')")
    before = list(sys.path)
    load_layer(tmp_path / "ck", 0)
    assert sys.path == before
    code = "import sys, pymoe.checkpoint as c; c.load_layer(sys.argv[1], 0); c.list_layers(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "ck"], check=True, cwd=Path(pymoe.__file__).parents[1])


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="be a folder"):
        MoELayer.from_checkpoint(tmp_path / "nowhere", 0)


def test_no_experts_at_all(tmp_path):
    mixtral(tmp_path / "ck")
    layer = MoELayer.from_checkpoint(tmp_path / "ck", 0, experts=[])
    assert not layer(np.ones((3, 16), np.float32)).any()
