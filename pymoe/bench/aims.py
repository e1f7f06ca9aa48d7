"""How much faster than its fastest peer the layer is meant to be on the CPU, for the shape that is followed."""

from __future__ import annotations

__all__ = ["NEAR_FLOOR", "aim_for"]

NEAR_FLOOR = 1.1
"""Within this factor of the floor an aim counts as met: nothing can be much faster."""

_AIMS = {
    (32, 4, 1024, 512): {
        ("fp32", 1): 1.0, ("fp32", 16): 2.0, ("fp32", 128): 2.0, ("fp32", 1024): 1.25,
        ("bf16", 1): 1.5, ("bf16", 16): 2.0, ("bf16", 128): 1.5, ("bf16", 1024): 1.0,
        ("int8", 128): 2.0,
    },
}  # fmt: skip


def aim_for(shape: tuple[int, int, int, int], scheme: str, tokens: int) -> float | None:
    """Return the aim for a row, None where there is none."""
    return _AIMS.get(shape, {}).get((scheme, tokens))
