"""Activation on the GPU in Numba: a thread an element; exp, tanh and erfc in float64, rounded, as the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.codec._numba_cuda import decode, encode, format_of
from pymoe.device.numba_gpu import bits_of, cuda, device, everywhere, kernel, launch, product, require
from pymoe.ops.activation import _numpy as definition
from pymoe.ops.activation._numba_cuda_formula import THREADS, kernel_of

__all__ = ["activate_rows", "activation"]

Array = Any

_GRID_Y = 65535

SWIGLU, SWIGLUSTEP, GELU, GELU_TANH, SITU, RELU2 = range(6)
_KINDS = {
    MoEActivation.SWIGLUSTEP: SWIGLUSTEP,
    MoEActivation.GELU: GELU,
    MoEActivation.GELU_TANH: GELU_TANH,
    MoEActivation.SITU: SITU,
    MoEActivation.GELU_NO_MUL: GELU,
    MoEActivation.GELU_TANH_NO_MUL: GELU_TANH,
    MoEActivation.RELU2_NO_MUL: RELU2,
}

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_MINUS_SQRT_HALF = np.float32(-definition._SQRT_HALF)
_TANH_SCALE, _TANH_CUBIC = np.float32(definition._TANH_SCALE), np.float32(definition._TANH_CUBIC)
_EXP_MAX = 90.0
"""Beyond it a float32 exponential is infinite."""


# docs: formulas
@device
def exp(z):
    wide = np.float64(z)
    return np.float32(math.exp(_EXP_MAX if wide > _EXP_MAX else wide))


@device
def silu(g, alpha):
    return np.float32(g / np.float32(_ONE + exp(product(-alpha, g))))


@device
def clamped(v, limit):
    """Return `v` within -limit..limit; NaN passes."""
    v = -limit if v < -limit else v
    return limit if v > limit else v


@device
def gate_of(g, kind, limit, alpha, beta):
    """Return the activation of the gate alone; `beta` is that of situ."""
    if kind == SWIGLU:
        return silu(limit if g > limit else g, alpha)
    if kind == SWIGLUSTEP:
        step = silu(g, _ONE)
        return limit if step > limit else step
    if kind == GELU:
        return product(product(_HALF, g), np.float32(math.erfc(np.float64(product(_MINUS_SQRT_HALF, g)))))
    if kind == GELU_TANH:
        inner = np.float32(g + product(_TANH_CUBIC, product(product(g, g), g)))
        return np.float32(g / np.float32(_ONE + exp(product(_TANH_SCALE, inner))))
    if kind == SITU:
        bent = product(beta, np.float32(math.tanh(np.float64(np.float32(g / beta)))))
        return np.float32(bent / np.float32(_ONE + exp(-g)))
    positive = _ZERO if g < _ZERO else g
    return product(positive, positive)


@device
def up_of(u, kind, limit, beta, linear):
    """Return what the gate is multiplied with; `linear` is situ's, 0 without."""
    if kind == SWIGLU:
        return np.float32(clamped(u, limit) + beta)
    if kind == SWIGLUSTEP:
        return clamped(u, limit)
    if kind == SITU and linear > _ZERO:
        return product(linear, np.float32(math.tanh(np.float64(np.float32(u / linear)))))
    return u


@kernel
def activation_kernel(out, form, x, x_form, row_to_slot, gated, interleaved, kind, limit, alpha, beta, linear):
    """Write the activation of row ``blockIdx.x``, if it is one."""
    row, width = cuda.blockIdx.x, out.shape[1]
    if row_to_slot[row] < 0:
        return
    for i in range(cuda.blockIdx.y * THREADS + cuda.threadIdx.x, width, cuda.gridDim.y * THREADS):
        g = decode(x[row, 2 * i if interleaved else i], x_form)
        y = gate_of(g, kind, limit, alpha, beta)
        if gated:
            u = decode(x[row, 2 * i + 1 if interleaved else width + i], x_form)
            y = product(y, up_of(u, kind, limit, beta, linear))
        out[row, i] = encode(y, form)


# end: formulas


def activate_rows(x: Array, config: ActivationConfig, row_to_slot: Array, out: Array) -> None:
    """Write the activation of the rows of `x` (R, N) that have a slot to `out` (R, I), rounded once."""
    require("activation", x, out)
    grid = (x.shape[0], min(-(-out.shape[1] // THREADS), _GRID_Y))
    arrays = (bits_of(out), format_of(out.dtype), bits_of(x), format_of(x.dtype), row_to_slot)
    kind = config.activation
    if isinstance(kind, RegisteredActivation):
        launch(kernel_of(kind.program, kind.is_gated), grid, THREADS, *arrays)
        return
    p = {name: np.float32(value or 0) for name, value in config.resolved().items()}
    limit = p["clamp_limit"] if p["clamp_limit"] else np.float32(np.inf)
    beta = p["situ_beta"] if kind is MoEActivation.SITU else p["beta"]
    alpha = p["alpha"] if config.is_gated else _ONE
    kind_number = _KINDS.get(kind, SWIGLU)
    flags = (config.is_gated, config.is_interleaved, kind_number)
    launch(activation_kernel, grid, THREADS, *arrays, *flags, limit, alpha, beta, p["situ_linear_beta"])


def activation(x: Array, config: ActivationConfig, out: Array) -> None:
    """Write the activation of all rows of `x` to `out`."""
    activate_rows(x, config, everywhere(x, 0, x.shape[:1], np.int32), out)
