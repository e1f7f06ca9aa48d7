"""The example's promises: accuracy and expert load in every scheme, and logits near those of plain NumPy."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

import pymoe
from tests import oracle

FOLDER = Path(__file__).parents[1] / "examples" / "digits"


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("digits_model", FOLDER / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def reference(model, images):
    """Logits with the MoE layer in float64 loops on the checkpoint's own weights."""
    weights = pymoe.checkpoint.load_layer(FOLDER / "checkpoint", 0)
    gate = weights.gate.astype(np.float64)

    def moe(x):
        scale, ids = oracle.route(x.astype(np.float64) @ gate.T, weights.topk)
        return oracle.layer(x, weights.w1, weights.w2, scale, ids).astype(np.float32)

    return model.DigitsModel(model.read_float32(FOLDER / "checkpoint" / "model.safetensors"), moe).logits(images)


# What the number format alone changes in the logits (2-norm, measured once), times about 1.5.
LIMITS = {"fp32": 1e-6, "bf16": 3e-3, "int8": 1e-2, "fp8": 3e-2, "int4": 6e-2, "mxfp4": 0.16}


@pytest.mark.parametrize("scheme", LIMITS)
def test_every_scheme_classifies_held_out_digits(model, scheme):
    images, labels = model.load_digits("test")
    tensors = model.read_float32(FOLDER / "checkpoint" / "model.safetensors")
    with pymoe.MoELayer.from_checkpoint(FOLDER / "checkpoint", 0, scheme=scheme) as layer:
        digits = model.DigitsModel(tensors, lambda x: layer(x.astype(layer.dtype)).astype(np.float32))
        assert digits.accuracy(images, labels) >= 0.985
        assert layer.last_load.sum() == 2 * len(images) and layer.last_load.min() > 0.05 * len(images)
        few = images[:100]
        want = reference(model, few)
        assert np.linalg.norm(digits.logits(few) - want) <= LIMITS[scheme] * np.linalg.norm(want)
