"""Arguments of the public calls: keys, and scales between their public shapes and grids (B, row blocks, columns)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.device.arrays import BFLOAT16, as_array, is_float
from pymoe.errors import ArgumentError, DTypeError, ShapeError, complaint
from pymoe.ops.quantize import _rules as rules
from pymoe.quantization import QUANT_KEYS, QuantKey

Array = Any


def quant_key(call: str, key: Any) -> QuantKey:
    """Return the key, also by its name, or refuse it."""
    if isinstance(key, str):
        if key not in QUANT_KEYS:
            raise ArgumentError(complaint(call, "key", f"be one of {', '.join(QUANT_KEYS)}", repr(key)))
        return QUANT_KEYS[key]
    if not isinstance(key, QuantKey):
        raise DTypeError(complaint(call, "key", "be a QuantKey or the name of one", type(key).__name__))
    return key


def stack(call: str, argument: str, x: Any) -> tuple[Array, bool]:
    """Return `x` as matrices (B, R, K), and whether it was a single one."""
    x = as_array(call, argument, x)
    checks.shape(call, argument, x, (None, None), (None, None, None))
    return (x[None], True) if x.ndim == 2 else (x, False)


def grid(call: str, argument: str, scale: Any, key: QuantKey, shape: tuple[int, int, int], block: Any) -> Array:
    """Return scales of public shape as (B, row blocks, column blocks), or refuse them; B matrices of (R, K)."""
    B, R, K = shape
    kind = rules.layout(key)
    scale = as_array(call, argument, scale if hasattr(scale, "__dlpack__") else _number(call, argument, scale))
    names = {"e8m0": ("uint8", "float8_e8m0fnu"), "fp8": ("uint8", "float8_e4m3fn")}.get(key.scale.dtype)
    if names is None:
        checks.float_dtype(call, argument, scale)
        with np.errstate(all="ignore"):
            scale = scale.astype(np.float32, copy=False)
    elif scale.dtype.name not in names:
        raise DTypeError(complaint(call, argument, f"have dtype {' or '.join(names)} for {key.name}", scale.dtype))
    else:
        scale = scale.view(np.uint8)
    rows, columns = -(-R // block[0]), -(-K // block[1])
    if kind == "tensor":
        if scale.size == 1:
            scale = np.broadcast_to(scale.reshape(1), (B,))
        checks.shape(call, argument, scale, (B,))
        return scale.reshape(B, 1, 1)
    lead = (B,) if B != 1 or scale.ndim == 3 else ()
    whole = [(*lead, rows, columns)] + ([(*lead, rows), (B, rows)] if columns == 1 else [])
    checks.shape(call, argument, scale, *whole)
    return scale.reshape(B, rows, columns)


def global_scale(call: str, argument: str, value: Any, B: int) -> Array:
    """Return nvfp4's global scale as (B,) float32, or refuse it."""
    value = as_array(call, argument, value if hasattr(value, "__dlpack__") else _number(call, argument, value))
    checks.float_dtype(call, argument, value)
    if value.size == 1:
        value = np.broadcast_to(value.reshape(1), (B,))
    checks.shape(call, argument, value, (B,))
    return value.astype(np.float32, copy=False)


def value_dtype(call: str, dtype: Any) -> np.dtype:
    """Return the dtype of values, or refuse it."""
    try:
        dtype = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    except TypeError:
        raise DTypeError(complaint(call, "dtype", "be a floating dtype", repr(dtype))) from None
    if not is_float(dtype) or dtype.itemsize > 8:
        raise DTypeError(complaint(call, "dtype", "be float32, float16, bfloat16 or float64", dtype))
    return dtype


def code_dtype(call: str, codes: Array, key: QuantKey) -> None:
    """Refuse codes of another dtype than the key's."""
    names = {"fp8": ("uint8", "float8_e4m3fn"), "int8": ("int8",)}.get(key.dtype, ("uint8",))
    if codes.dtype.name not in names:
        raise DTypeError(complaint(call, "codes", f"have dtype {' or '.join(names)} for {key.name}", codes.dtype))


def inferred_group(call: str, scale: Any, axes: int, K: int) -> tuple[int, int]:
    """Return (0, group) of weight-only integers from the number of scales along a row of `K`, if there is one answer.

    A group that is a power of two and divides K is told apart from any other power of two.  `axes` is that of the
    codes; scales with one axis less have one group a row.
    """
    scale = as_array(call, "scale", scale)
    groups = scale.shape[-1] if scale.ndim == axes else 1
    group, rest = divmod(K, groups or 1)
    if groups > 1 and (rest or group & (group - 1)):
        rule = f"be given for {groups} groups of {K} columns, which fit several group lengths"
        raise ArgumentError(complaint(call, "block_shape", rule, None))
    return 0, group


def positive(call: str, argument: str, scale: Array) -> None:
    """Refuse float32 scales to quantize with that are not finite and above 0."""
    good = np.isfinite(scale) & (scale > 0)
    if scale.dtype == np.float32 and not good.all():
        raise ArgumentError(complaint(call, argument, "be finite and above 0", scale[~good][0]))


def zero_points(call: str, zp: Any, key: QuantKey, shape: tuple[int, int, int]) -> Array:
    """Return zero points (B, R, G) of the public (…, R, G), or (…, R/2, G) packed; `shape` is (B, R, G)."""
    B, R, groups = shape
    zp = as_array(call, "zp", zp)
    rows = R // 2 if key.is_packed else R
    if key.is_packed and R % 2:
        raise ShapeError(complaint(call, "zp", "belong to an even number of rows", R))
    checks.shape(call, "zp", zp, *([(rows, groups)] if B == 1 else []), (B, rows, groups))
    if zp.dtype != np.uint8:
        raise DTypeError(complaint(call, "zp", "have dtype uint8", zp.dtype))
    zp = zp.reshape(B, rows, groups)
    return np.stack([zp & np.uint8(15), zp >> np.uint8(4)], axis=2).reshape(B, R, groups) if key.is_packed else zp


def packed_zero_points(zp: Array, key: QuantKey) -> Array:
    """Return zero points (..., R, G) as they are stored: two rows a byte for 4-bit codes, low nibble = even row."""
    return zp[..., 0::2, :] | (zp[..., 1::2, :] << np.uint8(4)) if key.is_packed else zp


def public_scale(scale: Array, key: QuantKey, single: bool) -> Array:
    """Return scales (B, rows, columns) in the public shape."""
    kind = rules.layout(key)
    if kind == "tensor":
        return scale.reshape(-1)
    if kind == "row" and key.scale.static:
        scale = scale[..., 0]
    return scale[0] if single else scale


def _number(call: str, argument: str, value: Any) -> Array:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating | np.integer):
        raise DTypeError(complaint(call, argument, "be an array or a number", type(value).__name__))
    return np.asarray(value, np.float32 if not isinstance(value, np.floating) else value.dtype)
