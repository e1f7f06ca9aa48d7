"""The second definition of every key: groups of a matrix, and what the tests compare with."""

from __future__ import annotations

import numpy as np

from pymoe.quantization import QUANT_KEYS
from tests.codec import definitions
from tests.codec.definitions import F, fp8, int8, mxfp4, nvfp4, weight_only

SEED = 20261123
# Rows and columns that share a scale (0: all of them), and the definition of one group.
FORMS = {
    "kFp8StaticTensorSym": (0, 0, lambda g: fp8(g, "tensor", static=True)),
    "kFp8DynamicTensorSym": (0, 0, lambda g: fp8(g, "tensor")),
    "kFp8DynamicTokenSym": (1, 0, lambda g: fp8(g, "row")),
    "kFp8StaticChannelSym": (1, 0, lambda g: fp8(g, "row", static=True)),
    "kFp8Dynamic128Sym": (1, 128, lambda g: fp8(g, "block")),
    "kFp8Dynamic128E8M0Sym": (1, 128, lambda g: fp8(g, "ue8m0")),
    "kFp8Static128BlockSym": (128, 128, lambda g: fp8(g, "block", static=True)),
    "kFp8Static128BlockE8M0Sym": (128, 128, lambda g: fp8(g, "ue8m0", static=True)),
    "kInt8StaticTensorSym": (0, 0, lambda g: int8(g, "tensor", static=True)),
    "kInt8DynamicTensorSym": (0, 0, lambda g: int8(g, "tensor")),
    "kInt8DynamicTokenSym": (1, 0, lambda g: int8(g, "row")),
    "kInt8StaticChannelSym": (1, 0, lambda g: int8(g, "row", static=True)),
    "kInt8Static128BlockSym": (128, 128, lambda g: int8(g, "block", static=True)),
    "kInt8Dynamic128Sym": (1, 128, lambda g: int8(g, "block")),
    "kMxfp8Static": (1, 32, lambda g: fp8(g, "mx")),
    "kMxfp8Dynamic": (1, 32, lambda g: fp8(g, "mx")),
    "kMxfp4Static": (1, 32, mxfp4),
    "kMxfp4Dynamic": (1, 32, mxfp4),
    "kInt8Static": (1, 0, lambda g: weight_only(g, 8, True)),
    "kInt8StaticAsym": (1, 0, lambda g: weight_only(g, 8, False)),
    "kInt4Static": (1, 0, lambda g: weight_only(g, 4, True)),
    "kInt4StaticAsym": (1, 0, lambda g: weight_only(g, 4, False)),
}
NVFP4 = ("kNvfp4Static", "kNvfp4Dynamic")


def by_groups(x, rows, columns, group_of):
    """Codes (R, K) and the grids of whatever else the definition of a group returns."""
    R, K = x.shape
    rows, columns = rows or R, columns or K
    grid = [[group_of(x[r : r + rows, c : c + columns]) for c in range(0, K, columns)] for r in range(0, R, rows)]
    codes = np.block([[cell[0] for cell in line] for line in grid])
    return codes, *(np.array([[cell[i] for cell in line] for line in grid]) for i in range(1, len(grid[0][0])))


def expected(name, x, group=0, global_scale=None):
    """(codes, scale[, zero points]) of one matrix, codes unpacked."""
    if name not in NVFP4:
        rows, columns, group_of = FORMS[name]
        return by_groups(x, rows, columns or group, group_of)
    static = name == "kNvfp4Static"
    if global_scale is None:
        groups = [x[r, c : c + 16] for r in range(x.shape[0]) for c in range(0, x.shape[1], 16)]
        amax = max(definitions.magnitude(g) for g in groups if not np.isnan(g).any())
        global_scale = max(amax / F(448 * 6), F(2.0**-117)) if static else F(1)
    return by_groups(x, 1, 16, lambda g: nvfp4(g, global_scale, static))


def unpacked(codes, name):
    if not QUANT_KEYS[name].is_packed:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    if got.dtype.kind == "f":
        want = want.astype(got.dtype)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        got, want = np.where(np.isnan(got), 0, got), np.where(np.isnan(want), 0, want)
    np.testing.assert_array_equal(got, want)


def nibble_rows(zp):
    return np.stack([zp & 15, zp >> 4], axis=-2).reshape(-1, zp.shape[-1])


def special_rows():
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((12, 192)).astype(np.float32)
    x[0] = 0
    x[1] = -0.0
    x[2] *= 1e-42  # subnormal
    x[3] *= 1e-12  # below every floor
    x[4] *= 1e30
    x[5, 7] = np.nan
    x[6, [3, 40]] = np.inf, -np.inf
    x[7] = np.nan
    x[8] = np.inf
    x[9, 1:] = 0
    x[10] = np.abs(x[10])
    x[11] = -np.abs(x[11])
    return x
