"""Qwen3-MoE and Qwen2-MoE: names, renormalization, the shared expert under its gate, dense layers between."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pymoe import CheckpointError, MoELayer
from pymoe.checkpoint import list_layers, load_layer
from tests.checkpoint.files import qwen, write

BF16 = ml_dtypes.bfloat16


def silu_mlp(x, tensors, name):
    gate, up, down = (tensors[f"{name}.{p}_proj.weight"].astype(np.float64) for p in ("gate", "up", "down"))
    z = gate @ x
    return down @ (z / (1 + np.exp(-z)) * (up @ x))


def expected(tensors, x, topk, renormalize, layer=0):
    """The block in float64, from the tensors' own names (transformers' order of operations)."""
    prefix = f"model.layers.{layer}.mlp"
    y = np.zeros(x.shape)
    for m, row in enumerate(x.astype(np.float64)):
        logits = tensors[f"{prefix}.gate.weight"].astype(np.float64) @ row
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        ids = np.argsort(-scores, kind="stable")[:topk]
        weights = scores[ids] / (scores[ids].sum() if renormalize else 1)
        for e, weight in zip(ids, weights, strict=True):
            y[m] += weight * silu_mlp(row, tensors, f"{prefix}.experts.{e}")
        if f"{prefix}.shared_expert_gate.weight" in tensors:
            gate = tensors[f"{prefix}.shared_expert_gate.weight"].astype(np.float64)[0] @ row
            y[m] += silu_mlp(row, tensors, f"{prefix}.shared_expert") / (1 + np.exp(-gate))
    return y


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("shared", [0, 24])
@pytest.mark.parametrize("renormalize", [None, False, True])
def test_a_layer_computes_what_its_tensors_say(tmp_path, renormalize, shared, dtype):
    flag = {} if renormalize is None else {"norm_topk_prob": renormalize}
    tensors = qwen(tmp_path / "ck", shared=shared, dtype=dtype, layer=3, **flag)
    x = np.random.default_rng(1).standard_normal((9, 16)).astype(np.float32)
    y = MoELayer.from_checkpoint(tmp_path / "ck", 3)(x)
    want = expected(tensors, x, 2, bool(renormalize), layer=3)
    np.testing.assert_allclose(y, want, rtol=0, atol=3e-6 * np.abs(want).max())


def test_dense_layers_are_not_listed_and_not_loaded(tmp_path):
    qwen(tmp_path / "ck")
    assert [s.layer for s in list_layers(tmp_path / "ck")] == [0]
    with pytest.raises(CheckpointError, match=r"hold an MoE layer 9; got layers \[0\]"):
        load_layer(tmp_path / "ck", 9)


def test_some_experts_keep_the_shared_one(tmp_path):
    tensors = qwen(tmp_path / "ck", shared=24)
    x = np.random.default_rng(1).standard_normal((9, 16)).astype(np.float32)
    nobody = MoELayer.from_checkpoint(tmp_path / "ck", 0, experts=[])
    for name in [n for n in tensors if ".experts." in n]:
        tensors[name] = np.zeros_like(tensors[name])
    np.testing.assert_allclose(nobody(x), expected(tensors, x, 2, False), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"shared_expert_gate.weight": np.zeros((2, 16), np.float32)}, "shared_expert_gate.weight in shape (1, 16)"),
        ({"shared_expert.up_proj.weight": np.zeros((23, 16), np.float32)}, "up_proj.weight in shape (24, 16)"),
        ({"shared_expert.down_proj.weight": None}, "hold the tensor model.layers.0.mlp.shared_expert.down_proj.weight"),
        ({"experts.1.up_proj.weight": np.zeros((8, 16), np.int32)}, "experts.1.up_proj.weight in float32; got int32"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, text):
    tensors = qwen(tmp_path / "ck", shared=24)
    for name, array in change.items():
        full = f"model.layers.0.mlp.{name}"
        tensors.pop(full) if array is None else tensors.update({full: array})
    write(tmp_path / "ck" / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        load_layer(tmp_path / "ck", 0)
    assert text in str(caught.value)


@pytest.mark.parametrize("value", ["yes", 1, None, []])
def test_norm_topk_prob_is_not_trusted(tmp_path, value):
    qwen(tmp_path / "ck", norm_topk_prob=value)
    with pytest.raises(CheckpointError, match="norm_topk_prob as true or false"):
        load_layer(tmp_path / "ck", 0)


def test_quantizing_on_the_way_leaves_the_shared_expert_as_it_is(tmp_path):
    tensors = qwen(tmp_path / "ck", K=64, width=32, shared=32)
    x = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    y = MoELayer.from_checkpoint(tmp_path / "ck", 0, scheme="int8")(x)
    want = expected(tensors, x, 2, False)
    assert np.linalg.norm(y - want) <= 0.03 * np.linalg.norm(want)
