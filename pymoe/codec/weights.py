"""Weights as GEMMs read them: codes with whatever turns them into numbers, one expert at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from pymoe.codec.e8m0 import decode_e8m0
from pymoe.codec.fp4 import decode_e2m1, unpack_nibbles
from pymoe.codec.fp8 import decode_e4m3
from pymoe.device.arrays import namespace
from pymoe.quantization import FusedMoEQuantConfig, FusedMoEQuantDesc, QuantKey, kTf32

__all__ = ["WeightOperand", "code_table"]

Array = Any


@dataclass(frozen=True)
class WeightOperand:
    """One weight tensor (E, N, K) with its scheme.

    Attributes
    ----------
    codes : ndarray, (E, N, K) or (E, N, K/2)
        Floats where `key` is None, float32 where it is `kTf32`, else int8 or uint8; 4-bit codes two a byte, low nibble
        = even k.
    K : int
        Columns, unpacked.
    key : QuantKey or None
    row_scale : ndarray, (E, N) float32, or None
        Scales of a tensor or channel scheme, or nvfp4's scale of an expert: they leave the sum over k as one factor.
    group_scale : ndarray, (E, ceil(N/bn), ceil(K/bk)), float32, or uint8 (e8m0; e4m3 for nvfp4), or None
        Scales that change along k.
    block : (int, int)
        (bn, bk) of `group_scale`.
    zp : ndarray or None
        Zero points, uint8: (E, N, groups), or (E, N/2, groups) with two a byte, low nibble = even n.
    bias : ndarray, (E, N) float32, or None
        Added to the sum after all scales.
    """

    codes: Array
    K: int
    key: QuantKey | None = None
    row_scale: Array | None = None
    group_scale: Array | None = None
    block: tuple[int, int] = (1, 1)
    zp: Array | None = None
    bias: Array | None = None

    @classmethod
    def unquantized(cls, w: Array, bias: Array | None = None) -> WeightOperand:
        """Return the operand of floating weights (E, N, K)."""
        return cls(w, w.shape[2], bias=bias)

    @classmethod
    def from_quant_config(
        cls, w: Array, desc: FusedMoEQuantDesc, quant_config: FusedMoEQuantConfig, K: int, interleaved: bool = False
    ) -> WeightOperand:
        """Return the operand of `w` under its descriptor in `quant_config`.

        Parameters
        ----------
        w : ndarray
            (E, N, K) floats or codes, or packed codes.
        desc : FusedMoEQuantDesc
            `quant_config.w1` or `quant_config.w2`, checked.
        K : int
            Columns, unpacked.
        interleaved : bool
            Which rows the two scales of an (E, 2) tensor scheme belong to: even and odd ones instead of halves.
        """
        key = quant_config.weight_key
        xp = namespace(w)
        bias = None if desc.bias is None else xp.asarray(desc.bias, np.float32)
        if key is None or key == kTf32:
            return cls(w, K, key, bias=bias)
        codes = w.view(np.uint8) if w.dtype.itemsize == 1 and w.dtype != np.int8 else w
        E, N = w.shape[:2]
        scale = xp.asarray(desc.scale)
        assert desc.shape is not None
        if desc.shape.row == -1:
            return cls(codes, K, key, row_scale=_row_scale(scale, E, N, interleaved), bias=bias)
        columns = K if desc.shape.col == -1 else desc.shape.col
        scale = scale.reshape(E, scale.shape[1], -(-K // columns))
        scale = scale.view(np.uint8) if scale.dtype.itemsize == 1 else xp.ascontiguousarray(scale, np.float32)
        row_scale = None
        if desc.scale_2 is not None:
            scale_2 = xp.asarray(desc.scale_2, np.float32)
            row_scale = xp.ascontiguousarray(xp.broadcast_to(scale_2[:, None], (E, N)))
        return cls(codes, K, key, row_scale, scale, (desc.shape.row, columns), desc.zp, bias)

    def group_scale_of(self, e: int) -> Array | None:
        """Return the group scales of expert `e` in float32, (ceil(N/bn), ceil(K/bk)); None without groups."""
        if self.group_scale is None:
            return None
        scale = self.group_scale[e]
        return self.scale_table[scale] if scale.dtype == np.uint8 else scale

    @property
    def scale_table(self) -> Array:
        """The float32 number of each one-byte group scale, 256 entries."""
        assert self.key is not None
        return code_table("fp8" if self.key.scale.dtype == "fp8" else "e8m0")

    def zero_point_of(self, e: int) -> Array | None:
        """Return the zero points of expert `e` in float32, (N, groups); None in a symmetric scheme."""
        if self.zp is None:
            return None
        zp = self.zp[e]
        if self.key is not None and self.key.is_packed:
            zp = np.stack([zp & 15, zp >> 4], axis=1).reshape(-1, zp.shape[1])
        return zp.astype(np.float32)

    def codes_of(self, e: int) -> Array:
        """Return the numbers that the codes of expert `e` stand for, unscaled, (N, K) float32, C-contiguous."""
        codes = self.codes[e]
        if self.key is None:
            return np.ascontiguousarray(codes, np.float32)
        if self.key.is_packed:
            codes = unpack_nibbles(codes)
        return code_table(self.key.dtype)[codes.view(np.uint8) if codes.dtype == np.int8 else codes]

    def decode(self, e: int) -> Array:
        """Return expert `e` as the GEMM multiplies it: (N, K) float32, every scale but `row_scale` applied.

        ``(code - zero point) * scale``, one float32 rounding for each operation.
        """
        w = self.codes_of(e)
        with np.errstate(all="ignore"):
            scale, zp = self.group_scale_of(e), self.zero_point_of(e)
            if zp is not None:
                w -= np.repeat(zp, self.block[1], axis=1)[:, : self.K]
            if scale is not None:
                rows = np.repeat(scale, self.block[0], axis=0)[: w.shape[0]] if self.block[0] > 1 else scale
                w *= np.repeat(rows, self.block[1], axis=1)[:, : self.K]
        return w


def _row_scale(scale: Array, E: int, N: int, interleaved: bool) -> Array:
    """Return tensor scales (E,) or (E, 2), or channel scales (E, N) or (E, N, 1), as (E, N) float32."""
    xp = namespace(scale)
    scale = xp.asarray(scale, np.float32)
    if scale.ndim == 1:
        scale = xp.broadcast_to(scale[:, None], (E, N))
    elif scale.shape[1] == 2 and N != 2:
        scale = xp.tile(scale, (1, N // 2)) if interleaved else xp.repeat(scale, N // 2, axis=1)
    return xp.ascontiguousarray(scale.reshape(E, N))


@cache
def code_table(dtype: str) -> Array:
    """Return the float32 number of each code of a `QuantKey.dtype` or of e8m0: 256 entries, 16 for 4-bit codes."""
    codes = np.arange(256, dtype=np.uint8)
    table = {
        "fp8": lambda: decode_e4m3(codes),
        "e8m0": lambda: decode_e8m0(codes),
        "int8": lambda: codes.view(np.int8).astype(np.float32),
        "uint8b128": lambda: codes.astype(np.float32) - 128,
        "uint8": lambda: codes.astype(np.float32),
        "uint4b8": lambda: codes[:16].astype(np.float32) - 8,
        "uint4": lambda: codes[:16].astype(np.float32),
        "fp4": lambda: decode_e2m1(codes[:16]),
    }[dtype]()
    table.flags.writeable = False
    return table
