"""DeepSeek-V3: grouped routing with a bias, shared experts, floats and fp8 blocks, scales in another shard."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import CheckpointError, MoELayer, UnsupportedError
from pymoe.checkpoint import load_layer
from tests.checkpoint.files import write

BF16 = ml_dtypes.bfloat16
FP8 = ml_dtypes.float8_e4m3fn
E, K, WIDTH, SHARED, TOPK, GROUPS, KEPT, FACTOR = 8, 256, 128, 256, 3, 4, 2, 2.5
PREFIX = "model.layers.5.mlp"


def checkpoint(folder, dtype=np.float32, quantized=False, change=None, **config):
    """Write a small checkpoint; return the float32 values of its tensors.  Scales lie in a shard of their own."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(E).astype(np.float32) / 4
    tensors = {f"{PREFIX}.gate.weight": (rng.standard_normal((E, K)) / 16).astype(np.float32),
               f"{PREFIX}.gate.e_score_correction_bias": bias}  # fmt: skip
    scales, values = {}, dict(tensors)
    names = [f"{PREFIX}.experts.{e}" for e in range(E)] + [f"{PREFIX}.shared_experts"]
    for name in names:
        width = SHARED if name.endswith("shared_experts") else WIDTH
        for part, shape in (("gate_proj", (width, K)), ("up_proj", (width, K)), ("down_proj", (K, width))):
            full = f"{name}.{part}.weight"
            w = (rng.standard_normal(shape) / 12).astype(np.float32)
            if quantized:
                codes, scale = pymoe.quantize(w, "kFp8Static128BlockSym")
                tensors[full], scales[f"{full}_scale_inv"] = codes.view(FP8), scale
                values[full] = pymoe.dequantize(codes, scale, "kFp8Static128BlockSym")
            else:
                tensors[full] = w.astype(dtype)
                values[full] = tensors[full].astype(np.float32)
    if change is not None:
        change(tensors, scales)
    described = {"model_type": "deepseek_v3", "n_routed_experts": E, "num_experts_per_tok": TOPK, "n_group": GROUPS,
                 "topk_group": KEPT, "routed_scaling_factor": FACTOR, "norm_topk_prob": True,
                 "hidden_act": "silu", "scoring_func": "sigmoid"}  # fmt: skip
    if quantized:
        described["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(described | config))
    files = {"a.safetensors": tensors} | ({"b.safetensors": scales} if scales else {})
    for file, content in files.items():
        write(folder / file, content)
    index = {name: file for file, content in files.items() for name in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return values


def route(values, x):
    """Brute force: every set of groups and experts by sorting."""
    logits = x.astype(np.float64) @ values[f"{PREFIX}.gate.weight"].astype(np.float64).T
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + values[f"{PREFIX}.gate.e_score_correction_bias"]
    ids = np.empty((len(x), TOPK), int)
    for m, row in enumerate(choice):
        groups = row.reshape(GROUPS, -1)
        best = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
        kept = np.argsort(-best, kind="stable")[:KEPT]
        masked = np.where(np.isin(np.arange(E) // (E // GROUPS), kept), row, -np.inf)
        ids[m] = np.argsort(-masked, kind="stable")[:TOPK]
    weights = np.take_along_axis(scores, ids, axis=1)
    return ids, weights / (weights.sum(axis=1, keepdims=True) + 1e-20) * FACTOR


def mlp(values, name, x):
    gate, up, down = (values[f"{name}.{p}_proj.weight"].astype(np.float64) for p in ("gate", "up", "down"))
    z = x @ gate.T
    return (z / (1 + np.exp(-z)) * (x @ up.T)) @ down.T


def expected(values, x):
    ids, weights = route(values, x)
    x = x.astype(np.float64)
    y = mlp(values, f"{PREFIX}.shared_experts", x)
    for m in range(len(x)):
        for e, weight in zip(ids[m], weights[m], strict=True):
            y[m] += weight * mlp(values, f"{PREFIX}.experts.{e}", x[m : m + 1])[0]
    return y


def tokens():
    return np.random.default_rng(1).standard_normal((20, K)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_floating_layers_compute_what_their_tensors_say(tmp_path, dtype):
    values = checkpoint(tmp_path / "ck", dtype)
    y = MoELayer.from_checkpoint(tmp_path / "ck", 5)(tokens())
    want = expected(values, tokens())
    np.testing.assert_allclose(y, want, rtol=0, atol=5e-6 * np.abs(want).max())


def test_fp8_blocks_are_the_codes_and_scales_of_the_files(tmp_path):
    values = checkpoint(tmp_path / "ck", quantized=True)
    weights = load_layer(tmp_path / "ck", 5)
    assert weights.dtype == "bfloat16" and weights.quant_config.weight_key.name == "kFp8Static128BlockSym"
    w1 = pymoe.dequantize(weights.w1, weights.quant_config.w1.scale, "kFp8Static128BlockSym")
    w2 = pymoe.dequantize(weights.w2, weights.quant_config.w2.scale, "kFp8Static128BlockSym")
    for e in range(E):
        np.testing.assert_array_equal(w1[e, :WIDTH], values[f"{PREFIX}.experts.{e}.gate_proj.weight"])
        np.testing.assert_array_equal(w1[e, WIDTH:], values[f"{PREFIX}.experts.{e}.up_proj.weight"])
        np.testing.assert_array_equal(w2[e], values[f"{PREFIX}.experts.{e}.down_proj.weight"])


def test_fp8_layers_are_near_their_dequantized_weights(tmp_path):
    values = checkpoint(tmp_path / "ck", quantized=True)
    layer = MoELayer.from_checkpoint(tmp_path / "ck", 5)
    want = expected(values, tokens())
    # Tokens and intermediate go through e4m3, 2.6e-2 each; the shared experts' weights through bfloat16.
    assert np.linalg.norm(layer(tokens()) - want) <= 5e-2 * np.linalg.norm(want)
    np.testing.assert_array_equal(np.bincount(route(values, tokens())[0].ravel(), minlength=E), layer.last_load)


@pytest.mark.parametrize("quantized", [False, True])
def test_some_experts_only(tmp_path, quantized):
    checkpoint(tmp_path / "ck", quantized=quantized)
    full, part = (MoELayer.from_checkpoint(tmp_path / "ck", 5, experts=e) for e in (None, [6, 2]))
    scale, ids = pymoe.select_experts(
        full.gate(tokens()), TOPK, routing_method="DeepSeekV3", num_expert_group=GROUPS, topk_group=KEPT,
        e_score_correction_bias=full.routing.e_score_correction_bias, routed_scaling_factor=FACTOR,
    )  # fmt: skip
    kept = np.where(np.isin(ids, [6, 2]), ids, -1)
    np.testing.assert_array_equal(part(tokens()), full(tokens(), topk_weights=scale, topk_ids=kept))
    assert load_layer(tmp_path / "ck", 5, experts=[]).w1.shape == (0, 2 * WIDTH, K)


def drop(name):
    return lambda tensors, scales: (tensors if name in tensors else scales).pop(name)


def put(name, array):
    return lambda tensors, scales: (tensors if name in tensors else scales).update({name: array})


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"change": drop(f"{PREFIX}.experts.1.up_proj.weight_scale_inv")}, CheckpointError, "up_proj.weight_scale_inv"),
        (
            {"change": put(f"{PREFIX}.experts.1.up_proj.weight_scale_inv", np.ones((1, 3), np.float32))},
            CheckpointError,
            "experts.1.up_proj.weight_scale_inv in shape (1, 2); got (1, 3)",
        ),
        (
            {"change": put(f"{PREFIX}.shared_experts.up_proj.weight_scale_inv", np.ones((2, 2), np.uint8))},
            CheckpointError,
            "shared_experts.up_proj.weight_scale_inv in float32 or bfloat16 or float8_e8m0fnu; got uint8",
        ),
        ({"change": drop(f"{PREFIX}.gate.e_score_correction_bias")}, CheckpointError, "e_score_correction_bias"),
        ({"n_group": 0}, CheckpointError, "n_group as an integer in 1..8"),
        ({"topk_group": None}, CheckpointError, "topk_group as an integer in 1..8"),
        ({"n_group": 3}, CheckpointError, "n_group groups, of which topk_group hold 3; got n_group 3, topk_group 2"),
        ({"topk_group": 5}, CheckpointError, "of which topk_group hold 3"),
        ({"topk_group": 1}, CheckpointError, "of which topk_group hold 3"),
        ({"routed_scaling_factor": 10**400}, CheckpointError, "routed_scaling_factor as a number"),
        ({"routed_scaling_factor": "2"}, CheckpointError, "routed_scaling_factor as a number"),
        ({"norm_topk_prob": 1}, CheckpointError, "norm_topk_prob as true or false"),
        ({"scoring_func": "softmax"}, UnsupportedError, "have the scoring_func sigmoid; got 'softmax'"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "have fp8 as quant_method"),
        ({"quantization_config": "fp8"}, UnsupportedError, "have no quantization_config but"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, options, kind, text):
    checkpoint(tmp_path / "ck", quantized=True, **options)
    with pytest.raises(kind) as caught:
        load_layer(tmp_path / "ck", 5)
    assert text in str(caught.value)
