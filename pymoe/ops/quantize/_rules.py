"""What each key asks for, in float32: its groups, the scale of a group, and how an element becomes a code.

Both backends share this file; they differ only in how fast they find the extremes of a group and encode its elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pymoe.codec.e8m0 import E8M0_NAN, decode_e8m0, encode_e8m0_ceil, inverse_power
from pymoe.codec.fp8 import decode_e4m3, encode_e4m3
from pymoe.quantization import QuantKey
from pymoe.quantization.keys import PER_CHANNEL, PER_TENSOR, PER_TOKEN

Array = Any

FLT_MAX = np.finfo(np.float32).max
FLT_MIN = np.finfo(np.float32).tiny
TINY_AMAX = np.float32(1e-10)
TINY_RANGE = np.float32(1e-5)
TOKEN_FLOOR = np.float32(1) / np.float32(448 * 512)
# With a global scale of at least this, 1 / (block scale * global scale) is finite for the least block scale, 2^-9.
GLOBAL_FLOOR = np.float32(2.0**-117)

_448, _127, _6 = np.float32(448), np.float32(127), np.float32(6)
_INTEGERS = {"int8": (-128, 127), "uint8b128": (0, 255), "uint8": (0, 255), "uint4b8": (0, 15), "uint4": (0, 15)}
_MIDDLE = {"uint8b128": 128, "uint4b8": 8}


@dataclass(frozen=True)
class Coder:
    """How a scaled element becomes a code.

    `kind` is ``e4m3``, ``e2m1`` or the rounding of an integer: ``rint`` (ties to even), ``away`` (ties away from 0) or
    ``trunc`` (towards 0).  Integers are clamped to `low`..`high` after the offset has been added; NaN takes the
    offset's code.  `divides` says whether the factor divides the element; else it multiplies.
    """

    kind: str
    divides: bool
    low: int = 0
    high: int = 0


class Scaling(NamedTuple):
    """Per group: what is stored, what an element is multiplied with or divided by, and what is added to its code.

    `scale` is float32, or uint8 for e8m0 and e4m3 scales; `factor` and `offset` (zero points, exact) are float32.
    """

    scale: Array
    factor: Array
    offset: Array | None = None


def layout(key: QuantKey) -> str:
    """Return what shares a scale: ``tensor``, ``row`` (a token or an output channel) or ``block``."""
    shape = key.scale.group_shape
    if shape == PER_TENSOR:
        return "tensor"
    if shape == PER_CHANNEL or (shape == PER_TOKEN and key.dtype in ("fp8", "int8")):
        return "row"
    return "block"


def is_mx(key: QuantKey) -> bool:
    """Whether the key is mxfp8 or mxfp4: groups of 32 with an e8m0 scale."""
    return key.scale.dtype == "e8m0" and key.scale.group_shape == (1, 32)


def is_weight_only(key: QuantKey) -> bool:
    """Whether codes are unsigned integers, which weights alone have."""
    return key.dtype in ("uint8b128", "uint8", "uint4b8", "uint4")


def poisons(key: QuantKey) -> bool:
    """Whether a NaN makes the scale of its group NaN, because its own code cannot say so."""
    return not (key.dtype == "fp8" or layout(key) == "tensor")


def coder(key: QuantKey) -> Coder:
    """Return how elements of `key` are encoded."""
    kind = layout(key)
    if key.dtype == "fp8":
        return Coder("e4m3", divides=kind == "row")
    if key.dtype == "fp4":
        return Coder("e2m1", divides=False)
    low, high = _INTEGERS[key.dtype]
    if key.dtype == "int8" and not key.scale.static and kind != "tensor":
        return Coder("away", False, low, high) if kind == "row" else Coder("trunc", True, low, high)
    return Coder("rint", True, low, high)


def middle(key: QuantKey) -> int:
    """Return the code of zero where there are no zero points."""
    return _MIDDLE.get(key.dtype, 0)


def scaling(key: QuantKey, low: Array, high: Array, global_scale: Array | None = None) -> Scaling:
    """Return the scales of groups whose elements lie in ``low <= 0 <= high``.

    Parameters
    ----------
    low, high : ndarray, float32
        Finite, or NaN where the group is poisoned.
    global_scale : ndarray, float32, optional
        nvfp4: what multiplies (static) or divides (dynamic), broadcast against the groups.
    """
    with np.errstate(all="ignore"):
        found = _scaling(key, low, high, global_scale)
    if found.scale.dtype == np.float32:
        # One NaN for all: which bits arithmetic gives it is the machine's affair.
        return found._replace(scale=np.where(np.isnan(found.scale), np.float32(np.nan), found.scale))
    return found


def _scaling(key: QuantKey, low: Array, high: Array, global_scale: Array | None) -> Scaling:
    if is_weight_only(key):
        return _weight_only_scaling(key, low, high)
    amax = np.abs(np.maximum(-low, high))  # a zero without its sign: its bits are read below
    if key.dtype == "fp8":
        return _mx_scaling(amax, 8, 0x600000) if is_mx(key) else _fp8_scaling(key, amax)
    if key.dtype == "fp4":
        return _mx_scaling(amax, 2, 0x5FFFFF) if is_mx(key) else _nvfp4_scaling(key, amax, global_scale)
    return _int8_scaling(key, amax)


def largest(key: QuantKey) -> np.float32:
    """Return the largest magnitude of a code of fp8 or int8."""
    return _448 if key.dtype == "fp8" else _127


def is_made_by_group(key: QuantKey) -> bool:
    """Whether a group's float32 scale follows from its largest magnitude alone, as dynamic fp8's and int8's does."""
    return (
        key.dtype in ("fp8", "int8")
        and not key.scale.static
        and key.scale.dtype == "float32"
        and layout(key) != "tensor"
    )


def given_scaling(key: QuantKey, scale: Array) -> Scaling:
    """Return the scaling by scales that were given beforehand (fp8 and int8; uint8 is e8m0)."""
    with np.errstate(all="ignore"):
        if scale.dtype == np.uint8:
            return Scaling(scale, np.float32(1) / decode_e8m0(scale))
        return Scaling(scale, scale if coder(key).divides else np.float32(1) / scale)


def global_scale_of(amax: Array) -> Array:
    """Return nvfp4's global scale for the largest magnitude `amax` of a matrix."""
    scale = np.maximum(amax / np.float32(448 * 6), GLOBAL_FLOOR)
    return np.where(amax == 0, np.float32(1), scale)


def _floored(amax: Array, largest: np.float32) -> Array:
    return np.where(amax == 0, np.float32(1), np.maximum(amax / largest, FLT_MIN))


def _fp8_scaling(key: QuantKey, amax: Array) -> Scaling:
    kind = layout(key)
    if key.scale.static or kind == "tensor":
        scale = _floored(amax, _448)
    elif kind == "row":
        scale = np.maximum(amax / _448, TOKEN_FLOOR)
    else:
        scale = np.maximum(amax, TINY_AMAX) / _448
    if key.scale.dtype == "e8m0":
        codes = encode_e8m0_ceil(scale)
        return Scaling(codes, inverse_power(codes))
    return Scaling(scale, scale if kind == "row" else np.float32(1) / scale)


def _int8_scaling(key: QuantKey, amax: Array) -> Scaling:
    kind = layout(key)
    if key.scale.static:
        scale = _floored(amax, _127)
    elif kind == "tensor":
        scale = np.maximum(amax / _127, TINY_AMAX)
    else:
        amax = np.maximum(amax, TINY_AMAX)
        scale = amax / _127
    return Scaling(scale, scale if coder(key).divides else _127 / amax)


def _mx_scaling(amax: Array, exponent: int, threshold: int) -> Scaling:
    """Return power-of-two scales: amax's exponent less `exponent`, one more if its mantissa is above `threshold`."""
    bits = amax.view(np.uint32).astype(np.int64)
    power = (bits >> 23) - exponent + ((bits & 0x7FFFFF) > threshold)
    codes = np.where(np.isnan(amax), E8M0_NAN, np.clip(power, 0, 254)).astype(np.uint8)
    return Scaling(codes, inverse_power(codes))


def _nvfp4_scaling(key: QuantKey, amax: Array, global_scale: Array | None) -> Scaling:
    one = np.float32(1)
    g = one if global_scale is None else global_scale
    codes = encode_e4m3(amax / _6 / g if key.scale.static else g * (amax / _6))
    block = decode_e4m3(codes)
    step = block * g if key.scale.static else block / g
    return Scaling(codes, np.where(block == 0, np.float32(0), one / step))


def _weight_only_scaling(key: QuantKey, low: Array, high: Array) -> Scaling:
    _, last = _INTEGERS[key.dtype]
    if key.symmetric:
        half = middle(key)
        scale = np.maximum(high / np.float32(half - 1), -low / np.float32(half))
        scale = np.where(scale == 0, np.float32(1), np.maximum(scale, FLT_MIN))
        return Scaling(scale, scale)
    scale = np.clip(high - low, TINY_RANGE, FLT_MAX) / np.float32(last)
    offset = np.clip(np.rint(-low / scale), np.float32(0), np.float32(last))
    return Scaling(scale, scale, np.where(np.isnan(offset), np.float32(0), offset))
