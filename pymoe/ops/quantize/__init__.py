"""Values to codes and scales, and back; every scheme bit for bit as ``docs/numerics`` states it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.device.arrays import answers_in_kind, is_cuda
from pymoe.errors import ArgumentError, ShapeError, complaint
from pymoe.ops.quantize import _arguments as arguments
from pymoe.ops.quantize import _matrices as matrices
from pymoe.ops.quantize import _rules as rules
from pymoe.ops.quantize.schemes import quantize_experts
from pymoe.quantization import FusedMoEQuantConfig, QuantKey

__all__ = ["dequantize", "dequantize_activations", "quantize", "quantize_activations", "quantize_experts"]

Array = Any


@answers_in_kind
def quantize(x: Array, key: QuantKey | str, *, scale: Any = None, block_shape: Any = None) -> tuple[Array, Any]:
    """Return the codes of `x` under `key`, and their scales.

    Parameters
    ----------
    x : ndarray, (R, K) or (E, R, K), float
        Tokens, or one weight matrix an expert; each matrix is quantized for itself.
    key : QuantKey or str
        Or the name of the constant, such as ``"kFp8DynamicTokenSym"``.
    scale : array, optional
        fp8 and int8 under a static key: the scales to use, in the shape that is returned, or one number; else they
        are made from `x`.  nvfp4: the global scale, one number or (E,), which divides values of
        ``kNvfp4Dynamic`` (default 1) and multiplies those of ``kNvfp4Static`` (default from `x`).
    block_shape : (int, int), optional
        Another block than the key's: (rows, columns) of fp8 and int8 blocks, (0, group) of weight-only integers,
        whose default is one group a row.

    Returns
    -------
    codes : ndarray, (..., R, K), or (..., R, K/2) for 4-bit codes
        uint8; int8 for int8 keys.
    scale : ndarray, or a pair of them
        Per tensor (1,) or (E,); token (..., R, 1); channel (..., R); group (..., R, ceil(K/g)); block
        (..., ceil(R/bn), ceil(K/bk)); float32, or uint8 for e8m0 and e4m3.  nvfp4: ``(block scales, global scale)``;
        with zero points: ``(scales, zero points)``.

    Raises
    ------
    ShapeError
        `x` has another number of axes, no columns, or columns that are no multiple of the group (mx 32, nvfp4 16,
        4 bits 2); packed zero points of an odd R.
    DTypeError, ArgumentError
        `x` is not floating, the key is unknown, or `scale` or `block_shape` do not fit the key.

    Notes
    -----
    ``docs/numerics`` states every key so that it can be computed bit for bit.  A NaN of `x` gives fp8 code 0x7F,
    per-tensor int8 code 0, and else a NaN scale for its token or group.

    Examples
    --------
    >>> import numpy as np, pymoe
    >>> codes, scale = pymoe.quantize(np.array([[1.0, -448.0]], np.float32), "kFp8DynamicTokenSym")
    >>> codes.tolist(), scale.tolist()
    ([[56, 254]], [[1.0]])
    """
    call = "quantize"
    key = arguments.quant_key(call, key)
    x, single = arguments.stack(call, "x", x)
    checks.float_dtype(call, "x", x)
    B, R, K = x.shape
    block = matrices.block_of(call, key, R, K, block_shape)
    if key.dtype == "uint4" and R % 2:
        raise ShapeError(complaint(call, "x", "have an even number of rows to pack zero points", R))
    given = global_scale = None
    if scale is not None:
        if key.scale2 is not None:
            global_scale = arguments.global_scale(call, "scale", scale, B)
            arguments.positive(call, "scale", global_scale)
        elif key.scale.static and key.dtype in ("fp8", "int8") and not rules.is_mx(key):
            given = arguments.grid(call, "scale", scale, key, x.shape, block)
            arguments.positive(call, "scale", given)
        else:
            raise ArgumentError(complaint(call, "scale", f"be None for {key.name}", "an array"))
    result = matrices.quantize_matrices(x, key, block, scale=given, global_scale=global_scale)
    codes, scales = result.codes[0] if single else result.codes, arguments.public_scale(result.scale, key, single)
    if result.global_scale is not None:
        return codes, (scales, result.global_scale)
    if result.zp is not None:
        zp = arguments.packed_zero_points(result.zp, key)
        return codes, (scales, zp[0] if single else zp)
    return codes, scales


@answers_in_kind
def dequantize(
    codes: Array, scale: Any, key: QuantKey | str, *, dtype: Any = "float32", zp: Any = None, block_shape: Any = None
) -> Array:
    """Return the values of `codes`: ``code * scale`` in float32, rounded once to `dtype`.

    Parameters
    ----------
    codes : ndarray, (R, K) or (E, R, K), or K/2 columns of bytes for 4-bit codes
    scale : array, or a pair of them
        As `quantize` returns it; the second of a pair may be left out where it is 1, or given as `zp`.
    key : QuantKey or str
    dtype : dtype
        float32, float16, bfloat16 or float64.
    zp : ndarray, uint8, optional
        Zero points (..., R, G), or (..., R/2, G) with two rows a byte for 4-bit codes, low nibble = even row.
    block_shape : (int, int), optional
        What `quantize` was given.  Weight-only integers can do without it where the group is the whole row or a power
        of two that divides it.

    Returns
    -------
    ndarray, (R, K) or (E, R, K), `dtype`

    Raises
    ------
    ShapeError, DTypeError, ArgumentError
        The arrays do not fit each other or the key.

    Examples
    --------
    >>> import numpy as np, pymoe
    >>> codes = np.array([[0x38, 0xFE]], np.uint8)
    >>> pymoe.dequantize(codes, np.ones((1, 1), np.float32), "kFp8DynamicTokenSym").tolist()
    [[1.0, -448.0]]
    """
    call = "dequantize"
    key = arguments.quant_key(call, key)
    dtype = arguments.value_dtype(call, dtype)
    codes, single = arguments.stack(call, "codes", codes)
    arguments.code_dtype(call, codes, key)
    B, R, columns = codes.shape
    K = 2 * columns if key.is_packed else columns
    scale, second = scale if isinstance(scale, tuple) else (scale, None)
    if block_shape is None and key.scale.group_shape == (1, -1) and rules.is_weight_only(key):
        block_shape = arguments.inferred_group(call, scale, 2 if single else 3, K)
    block = matrices.block_of(call, key, R, K, block_shape)
    grid = arguments.grid(call, "scale", scale, key, (B, R, K), block)
    zp = zp if key.scale2 is not None or second is None else second
    if zp is not None:
        if key.symmetric:
            raise ArgumentError(complaint(call, "zp", f"be None for {key.name}", "an array"))
        zp = arguments.zero_points(call, zp, key, grid.shape)
    elif not key.symmetric:
        raise ArgumentError(complaint(call, "zp", f"be given for {key.name}", None))
    factor = None if key.scale2 is None or second is None else arguments.global_scale(call, "scale", second, B)
    if is_cuda(codes):
        from pymoe.ops.quantize import _cuda

        values = _cuda.dequantize_matrices(codes, key, block, grid, factor, zp, dtype)
        return values[0] if single else values
    values = np.empty((B, R, K), dtype)
    with np.errstate(all="ignore"):
        for e in range(B):
            values[e] = matrices.dequantize_matrix(
                codes[e], key, block, grid[e], None if factor is None else factor[e], None if zp is None else zp[e]
            )
    return values[0] if single else values


def quantize_activations(
    x: Array,
    quant_config: FusedMoEQuantConfig,
    which: str = "a1",
    *,
    live: Array | None = None,
    live_rows: Array | None = None,
    scale: Array | None = None,
    backend: str | None = None,
    empty: Any = None,
) -> tuple[Array, Array]:
    """Return (codes, scale) of the rows `x` under the activation scheme of a quant config.

    Parameters
    ----------
    x : ndarray, (M, K), float32 | float16 | bfloat16
    which : {"a1", "a2"}
        Whose static or global scale to use.
    live : ndarray, (M,), bool, optional
        Rows that take part in a scale which all rows share; None is all of them.
    live_rows : ndarray, (n,), int32, optional
        On a device, in place of `live`: of n equal slabs of the rows the first ``live_rows[i]`` take part each, and no
        other row is read or written.
    scale : ndarray, (1,), optional
        Static scale in place of the config's.
    backend : {"numpy", "numba", "numba_cuda"}, optional
    empty : callable, optional
        On a device: ``empty(shape, dtype)`` gives every array, so that a captured call allocates nothing.

    Returns
    -------
    codes : ndarray, (M, K) or (M, K/2)
    scale : ndarray
        (1,) for all rows, (M, 1) for each, (M, ceil(K/g)) for its groups; float32, or uint8 where it is e8m0 or e4m3
        (nvfp4 without a global scale; with one it is the float32 quotient of the two).

    Raises
    ------
    ShapeError
        K is no multiple of the scheme's group.
    """
    call = "quantize_activations"
    key = quant_config.activation_key
    if key is None:
        raise ArgumentError(complaint(call, "quant_config", "quantize activations", "a16"))
    if which not in ("a1", "a2"):
        raise ArgumentError(complaint(call, "which", "be 'a1' or 'a2'", repr(which)))
    desc = getattr(quant_config, which)
    scale = desc.scale if scale is None else scale
    block = matrices.block_of(call, key, *x.shape)
    given = None if scale is None else arguments.grid(call, "scale", scale, key, (1, *x.shape), block)
    gscale = None if desc.gscale is None else arguments.global_scale(call, "gscale", desc.gscale, 1)
    if backend == "numba_cuda":
        from pymoe.ops.quantize import _numba_cuda

        return _numba_cuda.quantize_alone(call, x, key, given, live)
    if is_cuda(x):
        from pymoe.ops.quantize import _cuda

        made = _cuda.quantize_matrices(
            x[None], key, block, scale=given, global_scale=gscale, live=live if live_rows is None else live_rows,
            over_global=gscale is not None, empty=empty,
        )  # fmt: skip
        return made.codes[0], arguments.public_scale(made.scale, key, True)
    if live_rows is not None:
        raise ArgumentError(complaint(call, "live_rows", "be None for arrays in host memory", "an array"))
    result = matrices.quantize_matrices(
        x[None], key, block, scale=given, global_scale=gscale, live=live, backend=backend
    )
    scale = arguments.public_scale(result.scale, key, True)
    if gscale is not None:
        with np.errstate(all="ignore"):
            scale = matrices.float_scale(scale, key) / gscale[0]
    return result.codes[0], scale


def dequantize_activations(codes: Array, scale: Array, quant_config: FusedMoEQuantConfig) -> Array:
    """Return the float32 rows (M, K) of what `quantize_activations` returned."""
    key = quant_config.activation_key
    if key is None:
        raise ArgumentError(complaint("dequantize_activations", "quant_config", "quantize activations", "a16"))
    M, columns = codes.shape
    block = matrices.block_of("dequantize_activations", key, M, 2 * columns if key.is_packed else columns)
    grid = scale.reshape(1, 1) if scale.ndim == 1 else scale
    if is_cuda(codes):
        from pymoe.ops.quantize import _cuda

        return _cuda.dequantize_matrices(codes[None], key, block, grid[None], None, None, np.dtype(np.float32))[0]
    return matrices.dequantize_matrix(codes, key, block, grid)
