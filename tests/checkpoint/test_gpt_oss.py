"""gpt-oss: interleaved rows, biases, mxfp4 blocks and transposed floats, by float64 loops."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from pymoe import CheckpointError, MoELayer, UnsupportedError
from pymoe.checkpoint import list_layers, load_layer
from tests.checkpoint.files import write

BF16 = ml_dtypes.bfloat16
E, K, WIDTH, TOPK = 5, 64, 32, 2
PREFIX = "model.layers.2.mlp"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def checkpoint(folder, packed, dtype=BF16, change=None, **config):
    """Write a checkpoint; return the float64 values (router, bias, w1, b1, w2, b2) with rows as output features."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    router, router_bias = (rng.standard_normal(shape).astype(dtype) for shape in ((E, K), E))
    b1, b2 = (rng.standard_normal(shape).astype(dtype) for shape in ((E, 2 * WIDTH), (E, K)))
    tensors = {f"{PREFIX}.router.weight": router, f"{PREFIX}.router.bias": router_bias,
               f"{PREFIX}.experts.gate_up_proj_bias": b1, f"{PREFIX}.experts.down_proj_bias": b2}  # fmt: skip
    values = [router, router_bias]
    for part, rows, columns, bias in (("gate_up_proj", 2 * WIDTH, K, b1), ("down_proj", K, WIDTH, b2)):
        name = f"{PREFIX}.experts.{part}"
        if packed:
            blocks = rng.integers(0, 256, (E, rows, columns // 32, 16)).astype(np.uint8)
            scales = rng.integers(122, 127, (E, rows, columns // 32)).astype(np.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            # Low nibble first, as transformers unpacks them.
            w = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1).reshape(E, rows, columns // 32, 32)
            w = (w * 2.0 ** (scales.astype(float) - 127)[..., None]).reshape(E, rows, columns)
        else:
            stored = (rng.standard_normal((E, columns, rows)) / 6).astype(dtype)
            tensors[name] = stored
            w = stored.astype(np.float64).swapaxes(1, 2)
        values += [w, bias]
    if change is not None:
        change(tensors)
    described = {"model_type": "gpt_oss", "num_local_experts": E, "num_experts_per_tok": TOPK, "swiglu_limit": 7.0}
    if packed:
        described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (folder / "config.json").write_text(json.dumps(described | config))
    write(folder / "model.safetensors", tensors)
    return [np.asarray(v).astype(np.float64) for v in values]


def expected(values, x):
    router, router_bias, w1, b1, w2, b2 = values
    y = np.zeros(x.shape)
    for m, row in enumerate(x.astype(np.float64)):
        logits = router @ row + router_bias
        ids = np.argsort(-logits, kind="stable")[:TOPK]
        scale = np.exp(logits[ids] - logits[ids].max())
        for e, weight in zip(ids, scale / scale.sum(), strict=True):
            z = w1[e] @ row + b1[e]
            gate, up = np.minimum(z[::2], 7), np.clip(z[1::2], -7, 7)
            h = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            y[m] += weight * (w2[e] @ h + b2[e])
    return y


def tokens():
    return np.random.default_rng(1).standard_normal((20, K)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_computes_what_its_tensors_say(tmp_path, packed, dtype):
    values = checkpoint(tmp_path / "ck", packed, dtype)
    layer = MoELayer.from_checkpoint(tmp_path / "ck", 2)
    assert layer.dtype == dtype
    want = expected(values, tokens())
    np.testing.assert_allclose(layer(tokens()), want, rtol=0, atol=5e-6 * np.abs(want).max())


@pytest.mark.parametrize("packed", [False, True])
def test_some_experts_only(tmp_path, packed):
    checkpoint(tmp_path / "ck", packed)
    full, part = (MoELayer.from_checkpoint(tmp_path / "ck", 2, experts=e) for e in (None, [4, 1]))
    load = load_layer(tmp_path / "ck", 2, experts=[4, 1])
    whole = load_layer(tmp_path / "ck", 2)
    np.testing.assert_array_equal(load.w1, whole.w1[[4, 1]])
    np.testing.assert_array_equal(load.quant_config.w2.bias, whole.quant_config.w2.bias[[4, 1]])
    full(tokens())
    part(tokens())
    assert part.last_load.tolist() == [0, full.last_load[1], 0, 0, full.last_load[4]]


def test_list_layers_names_the_format(tmp_path):
    checkpoint(tmp_path / "ck", True)
    (summary,) = list_layers(tmp_path / "ck")
    assert (summary.layer, summary.scheme, summary.K, summary.I) == (2, "mxfp4", K, WIDTH)
    assert summary.nbytes == E * 3 * WIDTH * K * 17 // 32


def put(name, array):
    return lambda tensors: tensors.update({f"{PREFIX}.{name}": array})


@pytest.mark.parametrize(
    "options, kind, text",
    [
        ({"change": put("router.bias", np.zeros(4, np.float32))}, CheckpointError, "router.bias in shape (5)"),
        (
            {"change": put("experts.down_proj_scales", np.zeros((E, K, 2), np.uint8))},
            CheckpointError,
            "down_proj_scales in shape (5, 64, 1); got (5, 64, 2)",
        ),
        (
            {"change": put("experts.gate_up_proj_blocks", np.zeros((E, 64, 2, 16), np.int8))},
            CheckpointError,
            "gate_up_proj_blocks in uint8; got int8",
        ),
        ({"swiglu_limit": 0}, CheckpointError, "swiglu_limit above 0"),
        ({"swiglu_limit": 10**400}, CheckpointError, "swiglu_limit as a number"),
        ({"swiglu_alpha": True}, CheckpointError, "swiglu_alpha as a number"),
        ({"quantization_config": {"quant_method": "fp8"}}, UnsupportedError, "have mxfp4 as quant_method"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, options, kind, text):
    checkpoint(tmp_path / "ck", True, **options)
    with pytest.raises(kind) as caught:
        load_layer(tmp_path / "ck", 2)
    assert text in str(caught.value)
