"""The parts of the digits model around its MoE layer, in NumPy: embedding, RMS norm, residual and head.

x = embed(image)                      (M, 64) pixels -> (M, K)
y = x + moe(rms_norm(x))              the MoE layer is pymoe's
logits = head(y)                      (M, K) -> (M, 10)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE / "checkpoint"
DIGITS = HERE / "digits.npz"
LAYER = 0
EPSILON = 1e-5
MAX_PIXEL = 16

Tensors = dict[str, np.ndarray]


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split.

    Parameters
    ----------
    split : {"train", "test"}

    Returns
    -------
    images : float32, (M, 64)
        Pixels in 0..1, row after row of the 8 x 8 image.
    labels : int64, (M,)
        Digits 0..9.
    """
    with np.load(DIGITS) as digits:
        rows = digits[split]
        images = digits["images"][rows].astype(np.float32) / np.float32(MAX_PIXEL)
        return images, digits["labels"][rows].astype(np.int64)


def read_float32(path: Path) -> Tensors:
    """All tensors of a safetensors file that holds float32 only, as `train.py` writes it."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(raw[start + begin : start + end], dtype="<f4")
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mixtral's RMS norm of each row: ``x / sqrt(mean(x**2) + EPSILON) * weight``."""
    return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(EPSILON)) * weight


class DigitsModel:
    """Classify 8 x 8 images with any callable as the MoE layer.

    Parameters
    ----------
    tensors : dict of float32 arrays
        The checkpoint's tensors by name; those of the experts are not looked at.
    moe : callable
        Maps normed rows (M, K) to (M, K).
    """

    def __init__(self, tensors: Tensors, moe: Callable[[np.ndarray], np.ndarray]) -> None:
        self.embed_weight = tensors["model.embed.weight"]
        self.embed_bias = tensors["model.embed.bias"]
        self.norm_weight = tensors[f"model.layers.{LAYER}.post_attention_layernorm.weight"]
        self.head_weight = tensors["lm_head.weight"]
        self.head_bias = tensors["lm_head.bias"]
        self.moe = moe

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Class logits (M, 10) of images (M, 64) with pixels in 0..1."""
        x = images @ self.embed_weight.T + self.embed_bias
        routed = self.moe(rms_norm(x, self.norm_weight))
        return (x + routed.astype(np.float32)) @ self.head_weight.T + self.head_bias

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Fraction of the images whose largest logit is that of their label."""
        return float(np.mean(np.argmax(self.logits(images), axis=1) == labels))
