"""Numbers and structures by which device code knows formats, scales and activations: enumerators of ``cuda_src``."""

from __future__ import annotations

import math

from pymoe.activations import ActivationConfig, MoEActivation

__all__ = ["FORMATS", "NO_ACTIVATION", "SCALES", "ActivationFields", "activation_fields"]

FORMATS = {name: i for i, name in enumerate(("F32", "BF16", "FP16", "E4M3", "S8", "U8", "U4", "E2M1", "TF32"))}
"""`Format` of ``common/convert.cuh``."""
SCALES = {"F32": 0, "E8M0": 1, "E4M3": 2}
"""`ScaleFormat` of ``common/convert.cuh``."""

_KINDS = {
    MoEActivation.SILU: 0,
    MoEActivation.SWIGLUOAI: 0,
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: 0,
    MoEActivation.SWIGLUSTEP: 1,
    MoEActivation.GELU: 2,
    MoEActivation.GELU_TANH: 3,
    MoEActivation.SITU: 4,
    MoEActivation.SILU_NO_MUL: 5,
    MoEActivation.GELU_NO_MUL: 6,
    MoEActivation.GELU_TANH_NO_MUL: 7,
    MoEActivation.RELU2_NO_MUL: 8,
}
"""`Activation` of ``activation/activation.cuh``."""

ActivationFields = tuple[int, int, float, float, float, float, float]
"""Kind, layout of gate and up (0 plain, 1 halves, 2 interleaved), limit, alpha, beta, situ_beta, situ_linear_beta:
`ActivationParameters` of ``activation/activation.cuh``."""
NO_ACTIVATION: ActivationFields = (0, 0, math.inf, 1.0, 0.0, 1.0, 0.0)


def activation_fields(config: ActivationConfig) -> ActivationFields:
    """Return the parameters of an activation as device code takes them; of a user's only the layout counts."""
    kind = config.activation
    p = config.resolved()

    def number(name: str, otherwise: float) -> float:
        value = p[name]
        return otherwise if value is None else float(value)

    member = _KINDS[kind] if isinstance(kind, MoEActivation) else 0
    layout = 2 if config.is_interleaved else 1 if config.is_gated else 0
    return (
        member, layout, number("clamp_limit", math.inf), number("alpha", 1.0), number("beta", 0.0),
        number("situ_beta", 1.0), number("situ_linear_beta", 0.0),
    )  # fmt: skip
