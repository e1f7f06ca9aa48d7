"""What the portable kernel multiplies; apart from it, so that a layer can ask without loading Numba."""

from __future__ import annotations

from pymoe.quantization import QuantKey


def supports(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    """Return whether the kernel multiplies this pair: floats by floats or fp8, fp8 by fp8, int8 by int8.

    Scales may be one for all, for a token, for an output channel, or for blocks on both sides.
    """
    if weight_key is None or activation_key is None:
        alone = weight_key is None or (weight_key.dtype == "fp8" and weight_key.scale.group_shape.col <= 1)
        return activation_key is None and alone
    if weight_key.dtype != activation_key.dtype or weight_key.dtype not in ("fp8", "int8"):
        return False
    weight, activation = weight_key.scale.group_shape, activation_key.scale.group_shape
    if max(weight.col, activation.col) <= 1:
        return True
    # In a group of one row, which is mx, scales belong to the values and not to the sums.
    return weight.col == activation.col and weight.row > 1
