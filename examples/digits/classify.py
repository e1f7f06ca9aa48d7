"""Classify the held-out handwritten digits with the MoE layer of `checkpoint/` under six number formats.

    python examples/digits/classify.py

Prints ``SCHEME accuracy 0.xxxx`` for each format and, at the end, how many rows each expert got in fp32.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from model import CHECKPOINT, LAYER, DigitsModel, load_digits, read_float32

import pymoe

SCHEMES = ("fp32", "bf16", "fp8", "int8", "int4", "mxfp4")
BAR = 40


def classify(scheme: str) -> tuple[float, np.ndarray]:
    """Held-out accuracy with the experts in `scheme`, and the rows (E,) that each expert got.

    bf16 means tokens in bf16 too; the other formats take fp32 tokens, and quantize them where the scheme says so.
    """
    token_dtype = np.dtype(ml_dtypes.bfloat16 if scheme == "bf16" else np.float32)
    with pymoe.MoELayer.from_checkpoint(CHECKPOINT, LAYER, scheme=scheme) as layer:
        tensors = read_float32(CHECKPOINT / "model.safetensors")
        model = DigitsModel(tensors, lambda normed: layer(normed.astype(token_dtype)))
        return model.accuracy(*load_digits("test")), layer.last_load


def main() -> None:
    """Print one line a scheme, then the expert load."""
    loads = {}
    for scheme in SCHEMES:
        accuracy, loads[scheme] = classify(scheme)
        print(f"{scheme} accuracy {accuracy:.4f}", flush=True)
    load = loads["fp32"]
    print(f"expert load ({load.sum()} routed rows)")
    for e, rows in enumerate(load):
        print(f"  expert {e}  {rows:4d}  {'#' * round(BAR * rows / load.max())}")


if __name__ == "__main__":
    main()
