"""Weights of a whole layer to codes and a quant config, by the name of a scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.device.arrays import BFLOAT16, answers_in_kind, as_array
from pymoe.errors import ArgumentError, DTypeError, ShapeError, complaint
from pymoe.ops.quantize import _arguments as arguments
from pymoe.ops.quantize import _matrices as matrices
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig, QuantKey
from pymoe.quantization import keys as k

Array = Any


@dataclass(frozen=True)
class Scheme:
    """One row of the table: the weights' key, the dtypes of activations and weights, and the flags of `make`.

    `group` is the default group length of schemes that have a choice: columns for weight-only integers (-1 is the
    whole row), both sides of a square block for the others; None where the format fixes it.
    """

    key: QuantKey
    activations: str | None
    weights: str
    flags: Mapping[str, bool] = field(default_factory=dict)
    group: int | None = None


_CHANNEL = {"per_out_ch_quant": True}
_TOKEN = {"per_act_token_quant": True}

SCHEMES: dict[str, Scheme] = {
    "fp8_w8a8": Scheme(k.kFp8StaticChannelSym, "fp8", "fp8", _CHANNEL | _TOKEN),
    "fp8_w8a8_tensor": Scheme(k.kFp8StaticTensorSym, "fp8", "fp8"),
    "fp8_w8a8_tensor_token": Scheme(k.kFp8StaticTensorSym, "fp8", "fp8", _TOKEN),
    "fp8_w8a8_block": Scheme(k.kFp8Static128BlockSym, "fp8", "fp8", group=128),
    "fp8_w8a8_block_ue8m0": Scheme(k.kFp8Static128BlockE8M0Sym, "fp8", "fp8", group=128),
    "fp8_w8a16": Scheme(k.kFp8StaticChannelSym, None, "fp8", _CHANNEL),
    "int8_w8a8": Scheme(k.kInt8StaticChannelSym, "int8", "int8", _CHANNEL | _TOKEN),
    "int8_w8a8_tensor": Scheme(k.kInt8StaticTensorSym, "int8", "int8"),
    "int8_w8a8_block": Scheme(k.kInt8Static128BlockSym, "int8", "int8", group=128),
    "int8_w8a16": Scheme(k.kInt8Static, None, "int8", group=-1),
    "int8_w8a16_zp": Scheme(k.kInt8StaticAsym, None, "int8", group=-1),
    "int4_w4a16": Scheme(k.kInt4Static, None, "int4", group=128),
    "int4_w4a16_zp": Scheme(k.kInt4StaticAsym, None, "int4", group=128),
    "mxfp8": Scheme(k.kMxfp8Static, "mxfp8", "mxfp8"),
    "mxfp8_w8a16": Scheme(k.kMxfp8Static, None, "mxfp8"),
    "mxfp4": Scheme(k.kMxfp4Static, "mxfp4", "mxfp4"),
    "mxfp4_w4a16": Scheme(k.kMxfp4Static, None, "mxfp4"),
    "mxfp4_mxfp8": Scheme(k.kMxfp4Static, "mxfp8", "mxfp4"),
    "nvfp4": Scheme(k.kNvfp4Static, "nvfp4", "nvfp4"),
    "nvfp4_w4a16": Scheme(k.kNvfp4Static, None, "nvfp4"),
}
ALIASES = {"fp8": "fp8_w8a8", "int8": "int8_w8a8", "int4": "int4_w4a16"}
CASTS = {"fp32": np.dtype("float32"), "bf16": BFLOAT16, "fp16": np.dtype("float16")}


@answers_in_kind
def quantize_experts(
    w1: Array, w2: Array, scheme: str, *, group_size: int | None = None
) -> tuple[Array, Array, FusedMoEQuantConfig]:
    """Quantize both weights of a layer.

    Parameters
    ----------
    w1 : ndarray, (E, N, K), w2 : ndarray, (E, K, I), float
        Read, never written.
    scheme : str
        ``fp8_w8a8`` (channel x token; also ``fp8``), ``fp8_w8a8_tensor``, ``fp8_w8a8_tensor_token``,
        ``fp8_w8a8_block``, ``fp8_w8a8_block_ue8m0``, ``fp8_w8a16``, ``int8_w8a8`` (channel x token; also ``int8``),
        ``int8_w8a8_tensor``, ``int8_w8a8_block``, ``int8_w8a16``, ``int8_w8a16_zp``, ``int4_w4a16`` (also ``int4``),
        ``int4_w4a16_zp``, ``mxfp8``, ``mxfp8_w8a16``, ``mxfp4``, ``mxfp4_w4a16``, ``mxfp4_mxfp8``, ``nvfp4``,
        ``nvfp4_w4a16``; and ``fp32``, ``bf16``, ``fp16``, which cast.
    group_size : int, optional
        Columns of a group for weight-only int4 (default 128) and int8 (default -1, the whole row); side of a block
        for ``*_block*`` (default 128).

    Returns
    -------
    w1q, w2q : ndarray
        New arrays: codes (E, N, K), or (E, N, K/2) for 4 bits, and alike for w2.
    quant_config : FusedMoEQuantConfig
        Scales and zero points for `fused_experts` and `MoELayer`; dynamic activations.

    Raises
    ------
    ArgumentError
        An unknown scheme, or a group size that the scheme does not have.
    ShapeError
        Weights that do not belong together, or whose K or I is no multiple of the group (mx 32, nvfp4 16, 4 bits 2).
    DTypeError
        Weights that are not floating.

    Examples
    --------
    >>> import numpy as np, pymoe
    >>> w1, w2 = np.ones((2, 8, 4), np.float32), np.ones((2, 4, 4), np.float32)
    >>> w1q, w2q, config = pymoe.quantize_experts(w1, w2, "fp8_w8a8")
    >>> w1q.dtype.name, config.w1.scale.shape, config.activation_key.name
    ('uint8', (2, 8), 'kFp8DynamicTokenSym')
    """
    call = "quantize_experts"
    w1, w2 = _weights(call, w1, w2)
    name = ALIASES.get(scheme, scheme) if isinstance(scheme, str) else scheme
    if not isinstance(name, str) or (name not in SCHEMES and name not in CASTS):
        names = ", ".join((*SCHEMES, *ALIASES, *CASTS))
        raise ArgumentError(complaint(call, "scheme", f"be one of {names}", repr(scheme)))
    group = _group(call, name, group_size)
    if name in CASTS:
        with np.errstate(all="ignore"):
            return w1.astype(CASTS[name]), w2.astype(CASTS[name]), FUSED_MOE_UNQUANTIZED_CONFIG
    entry = SCHEMES[name]
    block_shape = None if group is None else (0, group) if _is_weight_only(entry) else (group, group)
    blocks = [_block(call, label, w, entry.key, block_shape) for label, w in (("w1", w1), ("w2", w2))]
    arrays: dict[str, Any] = {}
    codes = []
    for label, w, block in zip(("w1", "w2"), (w1, w2), blocks, strict=True):
        result = matrices.quantize_matrices(w, entry.key, block)
        codes.append(result.codes)
        arrays[f"{label}_scale"] = arguments.public_scale(result.scale, entry.key, False)
        if result.global_scale is not None:
            arrays[f"{label}_scale_2"] = result.global_scale
        if result.zp is not None:
            arrays[f"{label}_zp"] = arguments.packed_zero_points(result.zp, entry.key)
    config = FusedMoEQuantConfig.make(
        entry.activations, entry.weights, block_shape=block_shape, **entry.flags, **arrays
    )
    return codes[0], codes[1], config


def _is_weight_only(entry: Scheme) -> bool:
    return entry.weights in ("int4", "int8") and entry.activations is None


def _weights(call: str, w1: Any, w2: Any) -> tuple[Array, Array]:
    w1, w2 = as_array(call, "w1", w1), as_array(call, "w2", w2)
    for label, w in (("w1", w1), ("w2", w2)):
        checks.shape(call, label, w, (None, None, None))
        checks.float_dtype(call, label, w)
        if not all(w.shape[1:]):
            raise ShapeError(complaint(call, label, "have rows and columns", w.shape))
    E, _, K = w1.shape
    checks.shape(call, "w2", w2, (E, K, None))
    if w1.dtype != w2.dtype:
        raise DTypeError(complaint(call, "w2", f"have the dtype of w1, {w1.dtype}", w2.dtype))
    return w1, w2


def _group(call: str, name: str, group_size: Any) -> int | None:
    """Return the group length of the scheme, or refuse the one given."""
    default = SCHEMES[name].group if name in SCHEMES else None
    if group_size is None:
        return default
    if default is None:
        raise ArgumentError(complaint(call, "group_size", f"be None for {name}", repr(group_size)))
    whole_row = _is_weight_only(SCHEMES[name])
    group = checks.integer(call, "group_size", group_size, -1 if whole_row else 1)
    if group == 0:
        raise ArgumentError(complaint(call, "group_size", "be -1 or at least 1", group))
    return group


def _block(call: str, label: str, w: Array, key: QuantKey, block_shape: Any) -> tuple[int, int]:
    if key.dtype == "uint4" and w.shape[1] % 2:
        raise ShapeError(complaint(call, label, "have an even number of rows to pack zero points", w.shape))
    return matrices.block_of(call, key, w.shape[1], w.shape[2], block_shape, argument=label)
