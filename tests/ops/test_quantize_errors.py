"""Errors of quantize, dequantize and quantize_activations: before any work, with argument, rule and value."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import dequantize, quantize
from pymoe.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from pymoe.ops.quantize import quantize_activations


def config_of(scheme, **kwargs):
    w1, w2 = np.ones((1, 32, 64), np.float32), np.ones((1, 64, 32), np.float32)
    return pymoe.quantize_experts(w1, w2, scheme, **kwargs)[2]


# -- errors: before any work, with argument, rule and value --

X = np.ones((4, 64), np.float32)
ERRORS = {
    "x is a list": (
        lambda: quantize([[1.0]], "kFp8DynamicTokenSym"),
        DTypeError,
        "x must be a NumPy, CuPy or DLPack array",
    ),
    "x is integer": (lambda: quantize(np.ones((2, 2), int), "kInt4Static"), DTypeError, "x must have a floating dtype"),
    "x has one axis": (lambda: quantize(X[0], "kInt4Static"), ShapeError, "x must have shape"),
    "x has no columns": (lambda: quantize(X[:, :0], "kInt8Static"), ShapeError, "at least one column; got 0"),
    "unknown key": (lambda: quantize(X, "kFp7"), ArgumentError, "key must be one of kFp8StaticTensorSym.*got 'kFp7'"),
    "key of no kind": (lambda: quantize(X, 8), DTypeError, "key must be a QuantKey or the name of one; got int"),
    "mx tail": (lambda: quantize(X[:, :48], "kMxfp8Dynamic"), ShapeError, "multiple of 32 columns.*got 48"),
    "nvfp4 tail": (lambda: quantize(X[:, :40], "kNvfp4Static"), ShapeError, "multiple of 16 columns.*got 40"),
    "odd nibbles": (lambda: quantize(X[:, :7], "kInt4Static"), ShapeError, "multiple of 2 columns.*got 7"),
    "odd rows of zp": (lambda: quantize(X[:3], "kInt4StaticAsym"), ShapeError, "even number of rows.*got 3"),
    "block of a token": (
        lambda: quantize(X, "kFp8DynamicTokenSym", block_shape=(1, 2)),
        ArgumentError,
        "block_shape must be None for kFp8DynamicTokenSym",
    ),
    "block of one number": (
        lambda: quantize(X, "kInt4Static", block_shape=32),
        ArgumentError,
        "block_shape must be two integers; got 32",
    ),
    "block of nothing": (
        lambda: quantize(X, "kFp8Dynamic128Sym", block_shape=(1, 0)),
        ArgumentError,
        "block_shape must be",
    ),
    "scale of a dynamic key": (
        lambda: quantize(X, "kFp8DynamicTokenSym", scale=1.0),
        ArgumentError,
        "scale must be None for kFp8DynamicTokenSym",
    ),
    "scale of 0": (
        lambda: quantize(X, "kFp8StaticTensorSym", scale=0.0),
        ArgumentError,
        "scale must be finite and above 0; got 0.0",
    ),
    "scale of NaN": (
        lambda: quantize(X, "kInt8StaticChannelSym", scale=np.full(4, np.nan, np.float32)),
        ArgumentError,
        "finite and above 0; got nan",
    ),
    "scale of another shape": (
        lambda: quantize(X, "kFp8StaticChannelSym", scale=np.ones(3, np.float32)),
        ShapeError,
        "scale must have shape",
    ),
    "scale is text": (lambda: quantize(X, "kFp8StaticTensorSym", scale="1"), DTypeError, "scale must be an array"),
    "codes are floating": (
        lambda: dequantize(X, X[:, :1], "kFp8DynamicTokenSym"),
        DTypeError,
        "codes must have dtype uint8",
    ),
    "e8m0 scale is floating": (
        lambda: dequantize(X.astype(np.uint8), X[:, :2], "kMxfp8Dynamic"),
        DTypeError,
        "scale must have dtype uint8",
    ),
    "values are integer": (
        lambda: dequantize(X.astype(np.uint8), X[:, :1], "kInt8Static", dtype=int),
        DTypeError,
        "dtype must be float32",
    ),
    "values are no dtype": (
        lambda: dequantize(X.astype(np.uint8), X[:, :1], "kInt8Static", dtype="wide"),
        DTypeError,
        "dtype must be",
    ),
    "zp is missing": (
        lambda: dequantize(X.astype(np.uint8), X[:, :1], "kInt8StaticAsym"),
        ArgumentError,
        "zp must be given",
    ),
    "zp of a symmetric key": (
        lambda: dequantize(X.astype(np.uint8), X[:, :1], "kInt8Static", zp=X[:, :1].astype(np.uint8)),
        ArgumentError,
        "zp must be None for kInt8Static",
    ),
    "zp is floating": (
        lambda: dequantize(X.astype(np.uint8), X[:, :1], "kInt8StaticAsym", zp=X[:, :1]),
        DTypeError,
        "zp must have dtype",
    ),
    "group is ambiguous": (
        lambda: dequantize(np.ones((4, 96), np.uint8), X[:, :2], "kInt8Static"),
        ArgumentError,
        "block_shape must be given",
    ),
    "e5m2": (
        lambda: dequantize(X.astype(ml_dtypes.float8_e5m2), X[:, :1], "kFp8DynamicTokenSym"),
        UnsupportedError,
        "codes must be e4m3fn",
    ),
    "backend": (
        lambda: quantize_activations(X, config_of("fp8_w8a8"), backend="cuda"),
        ArgumentError,
        "backend must be numpy",
    ),
    "which": (
        lambda: quantize_activations(X, config_of("fp8_w8a8"), "w1"),
        ArgumentError,
        "which must be 'a1' or 'a2'; got 'w1'",
    ),
    "weight-only config": (
        lambda: quantize_activations(X, config_of("fp8_w8a16")),
        ArgumentError,
        "quant_config must quantize activations",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_argument_rule_and_value(case):
    call, kind, text = ERRORS[case]
    with pytest.raises(kind, match=text):
        call()
