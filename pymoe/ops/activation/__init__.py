"""Activation: what stands between GEMM1 and GEMM2."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.device.arrays import as_numpy, is_cuda
from pymoe.device.backend import uses_numba
from pymoe.errors import ArgumentError, ShapeError, complaint
from pymoe.ops.activation import _numpy

__all__ = ["activation"]

Array = Any


def activation(
    x: Array,
    config: ActivationConfig | MoEActivation | RegisteredActivation | str,
    *,
    out: Array | None = None,
    out_dtype: Any = None,
    backend: str | None = None,
) -> Array:
    """Apply the activation to the rows of GEMM1.

    Stage: GEMM1 -> **activation** -> GEMM2.

    Parameters
    ----------
    x : ndarray, (R, N), float
        Gated members read gate and up halves of a row (alternating columns if interleaved).
    config : ActivationConfig, or what its first parameter takes
        Which function, with which parameters.
    out : ndarray, (R, I), float, optional
        Written and returned; must not overlap `x`.
    out_dtype : dtype, optional
        Of the created result; None is the dtype of `x`.  Not together with `out`.
    backend : {"numpy", "numba", "cuda", "numba_cuda"}, optional
        None is the fastest there is; CuPy arrays take the last two.  They agree to 4 ulp of float32.

    Returns
    -------
    ndarray, (R, I)
        I is N / 2 if gated, else N.

    Raises
    ------
    ShapeError
        `x` is not 2-D, or N is odd for a gated activation.
    DTypeError, ArgumentError
        An argument is wrong; nothing has been computed.

    Notes
    -----
    Float32 arithmetic and one rounding to the dtype of `out`; formulas in ``docs/numerics``.  NaN stays in its element.

    Source
    ------
    vLLM 0.33.0 ``apply_moe_activation``; differs: no rounding of the gate before the product with up.

    Examples
    --------
    >>> import numpy as np
    >>> activation(np.array([[32.0, 0.0, 2.0, 1.0]], "f4"), "silu").tolist()
    [[64.0, 0.0]]
    """
    call = "activation"
    if not isinstance(config, ActivationConfig):
        config = ActivationConfig(config)
    if is_cuda(x):
        from pymoe.ops.activation import _cuda

        return _cuda.activation(x, config, out, out_dtype, backend)
    implementation = _implementation(backend)
    x = as_numpy(call, "x", x)
    checks.shape(call, "x", x, (None, None))
    checks.float_dtype(call, "x", x)
    R, N = x.shape
    if config.is_gated and N % 2:
        raise ShapeError(complaint(call, "x", "have an even number of columns for a gated activation", x.shape))
    shape = (R, config.width(N))
    if out is None:
        out = np.empty(shape, x.dtype if out_dtype is None else out_dtype)
        checks.float_dtype(call, "out_dtype", out)
    else:
        if out_dtype is not None:
            raise ArgumentError(complaint(call, "out_dtype", "be None where out is given", out_dtype))
        out = as_numpy(call, "out", out)
        checks.float_dtype(call, "out", out)
        checks.output(call, out, *shape, out.dtype, {"x": x})
    implementation.activation(x, config, out)
    return out


def _implementation(backend: str | None) -> Any:
    """Return the module that computes; Numba is loaded on first use only."""
    if backend == "numba_cuda":
        from pymoe.ops.activation import _numba_cuda

        return _numba_cuda
    if not uses_numba("activation", backend):
        return _numpy
    from pymoe.ops.activation import _numba

    return _numba
