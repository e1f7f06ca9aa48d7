"""The definition: one row of the answer at a time, so that its bits depend on nothing but that row."""

from __future__ import annotations

import numpy as np

from pymoe.codec.weights import WeightOperand
from pymoe.ops.grouped_gemm._operands import Array, Rows, group_of


def grouped_gemm(rows: Rows, w: WeightOperand, expert_offsets: Array, gather: Array, out: Array) -> None:
    """Write ``out[r] = sum_k a[gather[r], k] * w[e, :, k]`` with all scales and the bias, for each row of expert e."""
    a, a_scale, group = rows.as_float32(), rows.sum_factors, group_of(rows, w)
    with np.errstate(all="ignore"):
        for e in np.flatnonzero(np.diff(expert_offsets)).tolist():
            mine = slice(int(expert_offsets[e]), int(expert_offsets[e + 1]))
            if group < w.K:
                _expert_in_groups(a, w, e, gather[mine], a_scale, group, out[mine])
            else:
                _expert(a, w, e, gather[mine], a_scale, out[mine])
            if w.bias is not None:
                out[mine] += w.bias[e]


def _expert(a: Array, w: WeightOperand, e: int, sources: Array, a_scale: Array | None, out: Array) -> None:
    """One sum over k, then the row scales of both sides."""
    exact = w.key is not None and w.key.dtype == "int8"  # integer sums stay below 2^53: exact in any order
    weights = w.decode(e)
    weights = weights.astype(np.float64) if exact else weights
    for row, source in zip(out, sources, strict=True):
        row[:] = weights @ a[source].astype(np.float64) if exact else (weights * a[source]).sum(axis=1)
        if a_scale is not None:
            row *= a_scale[source if a_scale.size > 1 else 0].reshape(())
        if w.row_scale is not None:
            row *= w.row_scale[e]


def _expert_in_groups(
    a: Array, w: WeightOperand, e: int, sources: Array, a_scale: Array | None, group: int, out: Array
) -> None:
    """One sum a group of codes, scaled by the product of the group's two scales, groups added in order."""
    codes, scale = w.codes_of(e), w.group_scale_of(e)
    assert scale is not None and a_scale is not None
    scale = np.repeat(scale, w.block[0], axis=0)[: codes.shape[0]]
    for row, source in zip(out, sources, strict=True):
        total = np.zeros(codes.shape[0])
        for g, start in enumerate(range(0, w.K, group)):
            k = slice(start, start + group)
            total += (codes[:, k] * a[source, k]).sum(axis=1) * (scale[:, g] * a_scale[source, g])
        row[:] = total
