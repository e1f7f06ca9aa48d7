"""Llama 4: transposed experts, the router's sigmoid on the input, the shared expert, dense layers between."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from pymoe import CheckpointError, MoELayer, UnsupportedError
from pymoe.checkpoint import list_layers, load_layer
from tests.checkpoint.files import write

BF16 = ml_dtypes.bfloat16
E, K, WIDTH, SHARED = 4, 24, 10, 16


def checkpoint(folder, text_only=False, dtype=np.float32, change=None, **config):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    layers = "model.layers" if text_only else "language_model.model.layers"
    prefix = f"{layers}.1.feed_forward"
    shapes = {"router.weight": (E, K), "experts.gate_up_proj": (E, K, 2 * WIDTH), "experts.down_proj": (E, WIDTH, K),
              "shared_expert.gate_proj.weight": (SHARED, K), "shared_expert.up_proj.weight": (SHARED, K),
              "shared_expert.down_proj.weight": (K, SHARED)}  # fmt: skip
    tensors = {f"{prefix}.{name}": (rng.standard_normal(shape) / 4).astype(dtype) for name, shape in shapes.items()}
    tensors[f"{layers}.0.feed_forward.gate_proj.weight"] = np.ones((3, K), dtype)  # a dense layer
    if change is not None:
        change(tensors, prefix)
    text = {"num_local_experts": E, "num_experts_per_tok": 1, "hidden_act": "silu"} | config
    described = {"model_type": "llama4_text"} | text if text_only else {"model_type": "llama4", "text_config": text}
    (folder / "config.json").write_text(json.dumps(described))
    write(folder / "model.safetensors", tensors)
    return {name.removeprefix(f"{prefix}."): array.astype(np.float64) for name, array in tensors.items()}


def mlp(x, gate, up, down):
    z = gate @ x
    return down @ (z / (1 + np.exp(-z)) * (up @ x))


def expected(values, x):
    y = np.zeros(x.shape)
    shared = [values[f"shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")]
    for m, row in enumerate(x.astype(np.float64)):
        logits = values["router.weight"] @ row
        e = int(logits.argmax())
        routed = row / (1 + np.exp(-logits[e]))
        gate, up = values["experts.gate_up_proj"][e].T[:WIDTH], values["experts.gate_up_proj"][e].T[WIDTH:]
        y[m] = mlp(routed, gate, up, values["experts.down_proj"][e].T) + mlp(row, *shared)
    return y


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("text_only", [False, True])
def test_a_layer_computes_what_its_tensors_say(tmp_path, text_only, dtype):
    values = checkpoint(tmp_path / "ck", text_only, dtype)
    x = np.random.default_rng(1).standard_normal((20, K)).astype(np.float32)
    y = MoELayer.from_checkpoint(tmp_path / "ck", 1)(x)
    want = expected(values, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=3e-6 * np.abs(want).max())


def test_layers_and_parts(tmp_path):
    checkpoint(tmp_path / "ck")
    (summary,) = list_layers(tmp_path / "ck")
    assert (summary.layer, summary.K, summary.I, summary.nbytes) == (1, K, WIDTH, E * 3 * K * WIDTH * 4)
    whole, part = load_layer(tmp_path / "ck", 1), load_layer(tmp_path / "ck", 1, experts=[3, 0], dtype=BF16)
    np.testing.assert_array_equal(part.w1, whole.w1[[3, 0]].astype(BF16))
    with pytest.raises(CheckpointError, match=r"hold an MoE layer 0; got layers \[1\]"):
        load_layer(tmp_path / "ck", 0)


def put(name, array):
    return lambda tensors, prefix: tensors.update({f"{prefix}.{name}": array})


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"num_experts_per_tok": 2}, UnsupportedError, "choose one expert a token; got 2"),
        ({"change": put("experts.down_proj", np.zeros((E, K, WIDTH), np.float32))}, CheckpointError, "(4, 10, 24)"),
        ({"change": put("experts.gate_up_proj", np.zeros((E, K, 9), np.float32))}, CheckpointError, "one width"),
        (
            {"change": put("shared_expert.up_proj.weight", np.zeros((SHARED, K), np.int8))},
            CheckpointError,
            "up_proj.weight in float32 or float16 or bfloat16; got int8",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, options, kind, text):
    checkpoint(tmp_path / "ck", **options)
    with pytest.raises(kind) as caught:
        load_layer(tmp_path / "ck", 1)
    assert text in str(caught.value)


@pytest.mark.parametrize("section", [None, [], "x"])
def test_a_text_config_that_is_none(tmp_path, section):
    checkpoint(tmp_path / "ck")
    (tmp_path / "ck" / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": section}))
    with pytest.raises(CheckpointError, match="hold an object text_config"):
        load_layer(tmp_path / "ck", 1)
