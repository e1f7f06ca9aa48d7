"""Checks of a whole call, made before any work.  Every one names the call, the argument, the rule and the value."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig
from pymoe.device.arrays import HIDDEN_DTYPES, as_array, is_cuda, is_float, namespace
from pymoe.environment import is_checked
from pymoe.errors import ArgumentError, DTypeError, ShapeError, complaint
from pymoe.quantization import FusedMoEQuantConfig, FusedMoEQuantDesc

Array = Any
_FLOAT_NAMES = ("float32", "float16", "bfloat16")


def integer(call: str, argument: str, value: Any, least: int) -> int:
    """Return `value` as int, or refuse a bool, a float or a number below `least`."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise DTypeError(complaint(call, argument, "be an integer", repr(value)))
    if value < least:
        raise ArgumentError(complaint(call, argument, f"be at least {least}", value))
    return int(value)


def shape(call: str, argument: str, x: Array, *expected: tuple[int | None, ...]) -> None:
    """Refuse an array whose shape fits none of `expected`; None stands for any length."""
    if x.shape in expected:  # most calls, and much cheaper than what follows
        return
    for want in expected:
        if x.ndim == len(want) and all(w is None or w == n for w, n in zip(want, x.shape, strict=True)):
            return
    words = " or ".join("(" + ", ".join("any" if w is None else str(w) for w in want) + ")" for want in expected)
    raise ShapeError(complaint(call, argument, f"have shape {words}", x.shape))


def float_dtype(call: str, argument: str, x: Array) -> None:
    """Refuse an array that is not float16, bfloat16, float32 or float64."""
    if not is_float(x.dtype):
        raise DTypeError(complaint(call, argument, "have a floating dtype", x.dtype))


def hidden(call: str, argument: str, x: Array, K: int | None = None) -> None:
    """Refuse tokens that are not (M, K) in float32, float16 or bfloat16."""
    shape(call, argument, x, (None, K))
    if x.dtype not in HIDDEN_DTYPES:
        remedy = "Hand over unquantized tokens"
        raise DTypeError(complaint(call, argument, f"have dtype {', '.join(_FLOAT_NAMES)}", x.dtype, remedy))
    if x.shape[1] < 1:
        raise ShapeError(complaint(call, argument, "have at least one column", x.shape))


def weights(
    call: str, w1: Array, w2: Array, K: int, activation: ActivationConfig, quant_config: FusedMoEQuantConfig
) -> tuple[int, int, int]:
    """Return (E_local, N, I) of the weights, or refuse them."""
    key = quant_config.weight_key
    per_byte = 2 if key is not None and key.is_packed else 1
    for label, w in (("w1", w1), ("w2", w2)):
        shape(call, label, w, (None, None, None))
        _weight_dtype(call, label, w, key)
        if is_cuda(w) and not w.flags.c_contiguous:
            remedy = "Use cupy.ascontiguousarray once"
            raise ArgumentError(complaint(call, label, "be C-contiguous on a device", f"strides {w.strides}", remedy))
    if w1.dtype != w2.dtype:
        raise DTypeError(complaint(call, "w2", f"have the dtype of w1, {w1.dtype}", w2.dtype))
    E_local, N, columns = w1.shape
    if columns * per_byte != K:
        rule = f"have {K // per_byte} columns for K = {K}" if K % per_byte == 0 else f"pack an even K, not {K}"
        raise ShapeError(complaint(call, "w1", rule, w1.shape))
    if N < 1 or (activation.is_gated and N % 2):
        rule = "have an even number of rows for a gated activation" if N else "have at least one row"
        raise ShapeError(complaint(call, "w1", rule, w1.shape))
    width = activation.width(N)
    if width % per_byte:
        raise ShapeError(complaint(call, "w1", f"give an even I for {quant_config.weight_quant_dtype}", f"I = {width}"))
    shape(call, "w2", w2, (E_local, K, width // per_byte))
    return E_local, N, width


def _weight_dtype(call: str, label: str, w: Array, key: Any) -> None:
    allowed: tuple[str, ...] = _FLOAT_NAMES
    if key is not None:
        allowed = {"fp8": ("uint8", "float8_e4m3fn"), "int8": ("int8",), "tf32": ("float32",)}.get(
            key.dtype, ("uint8",)
        )
    if w.dtype.name not in allowed:
        scheme = "unquantized weights" if key is None else f"{key.dtype} weights"
        raise DTypeError(complaint(call, label, f"have dtype {' or '.join(allowed)} for {scheme}", w.dtype))


def topk_arrays(call: str, topk_weights: Array, topk_ids: Array, M: int) -> tuple[Array, Array]:
    """Return (float32 weights, ids as given), both (M, topk) and contiguous, or refuse them."""
    shape(call, "topk_ids", topk_ids, (M, None))
    if topk_ids.dtype.kind not in "iu":
        raise DTypeError(complaint(call, "topk_ids", "have an integer dtype", topk_ids.dtype))
    if topk_ids.shape[1] < 1:
        raise ShapeError(complaint(call, "topk_ids", "have at least one column", topk_ids.shape))
    shape(call, "topk_weights", topk_weights, topk_ids.shape)
    float_dtype(call, "topk_weights", topk_weights)
    xp = namespace(topk_weights)
    with np.errstate(all="ignore"):
        return xp.ascontiguousarray(topk_weights, dtype=np.float32), namespace(topk_ids).ascontiguousarray(topk_ids)


def legal_ids(call: str, topk_ids: Array, global_num_experts: int) -> Array:
    """Return int32 ids in which everything outside ``0..global_num_experts-1`` has become -1; the same, if none is.

    Compared in the ids' own dtype first, so that no wide or unsigned id can wrap into the range.  In the checked mode
    any id but -1 outside the range raises `ArgumentError`.  Ids on a device come back as they are: kernels skip the
    bad ones themselves, and only the checked mode waits for the device to look at them.
    """
    if is_cuda(topk_ids):
        if is_checked():
            legal_ids(call, topk_ids.get(), global_num_experts)
        return topk_ids
    legal = (topk_ids >= 0) & (topk_ids < global_num_experts)
    if topk_ids.dtype == np.int32 and legal.all():
        return topk_ids
    if is_checked() and not legal.all():
        wrong = ~legal if topk_ids.dtype.kind == "u" else ~legal & (topk_ids != -1)
        if wrong.any():
            row, slot = (int(i) for i in np.argwhere(wrong)[0])
            got = f"{topk_ids[row, slot]} at row {row}, slot {slot}"
            raise ArgumentError(complaint(call, "topk_ids", f"be -1 or in 0..{global_num_experts - 1}", got))
    ids = np.full(topk_ids.shape, -1, np.int32)
    np.copyto(ids, topk_ids, where=legal, casting="unsafe")
    return ids


def weight_on_input(call: str, flag: Any, topk: int) -> None:
    """Refuse the router weight on the input where a token has more than one expert."""
    if flag and topk != 1:
        got = f"True with topk {topk}"
        raise ArgumentError(complaint(call, "apply_router_weight_on_input", "be False unless topk is 1", got))


def expert_map(call: str, mapping: Array | None, global_num_experts: Any, E_local: int) -> tuple[Array | None, int]:
    """Return (int32 map or None, size of the global expert space), or refuse them."""
    given = integer(call, "global_num_experts", global_num_experts, -1)
    if given == 0 and E_local:
        raise ArgumentError(complaint(call, "global_num_experts", "be -1 or at least 1", given))
    if mapping is None:
        if given not in (-1, E_local):
            remedy = "Pass expert_map to say which of the experts are here"
            rule = f"be -1 or w1's {E_local} experts without an expert_map"
            raise ArgumentError(complaint(call, "global_num_experts", rule, given, remedy))
        return None, E_local
    shape(call, "expert_map", mapping, (None,))
    if mapping.dtype.kind not in "iu":
        raise DTypeError(complaint(call, "expert_map", "have an integer dtype", mapping.dtype))
    if given not in (-1, mapping.shape[0]):
        rule = f"be -1 or the length of expert_map, {mapping.shape[0]}"
        raise ArgumentError(complaint(call, "global_num_experts", rule, given))
    if not is_cuda(mapping):
        _local_ids(call, mapping, E_local)
    elif is_checked():  # else kernels take what is out of range for -1, so that nobody waits for the device
        _local_ids(call, mapping.get(), E_local)
    return namespace(mapping).ascontiguousarray(mapping, dtype=np.int32), mapping.shape[0]


def _local_ids(call: str, mapping: Array, E_local: int) -> None:
    wrong = mapping >= E_local if mapping.dtype.kind == "u" else (mapping >= E_local) | (mapping < -1)
    if wrong.any():
        where = int(np.argmax(wrong))
        rule = f"hold -1 or local ids in 0..{E_local - 1}"
        raise ArgumentError(complaint(call, "expert_map", rule, f"{mapping[where]} at {where}"))


def one_device(call: str, **arrays: Any) -> None:
    """Refuse arrays of which one is in host memory and another on a device, or on two devices; None is skipped."""
    first_label, first = "", None
    for label, x in arrays.items():
        if x is None:
            continue
        if first is None:
            first_label, first = label, x
        elif is_cuda(x) != is_cuda(first) or (is_cuda(x) and x.device.id != first.device.id):
            rule = f"be on the device of {first_label}, {place(first)}"
            raise ArgumentError(complaint(call, label, rule, place(x)))


def place(x: Any) -> str:
    """Return where an array is, in words."""
    return f"CUDA device {x.device.id}" if is_cuda(x) else "the host"


def output(call: str, out: Array, M: int, K: int, dtype: np.dtype, inputs: dict[str, Any]) -> None:
    """Refuse an `out` of another shape or dtype, a read-only one, or one that overlaps an input."""
    shape(call, "out", out, (M, K))
    if out.dtype != dtype:
        raise DTypeError(complaint(call, "out", f"have the dtype of hidden_states, {dtype}", out.dtype))
    if not is_cuda(out) and not out.flags.writeable:
        raise ArgumentError(complaint(call, "out", "be writeable", "a read-only array"))
    if out.size and any(s == 0 and n > 1 for s, n in zip(out.strides, out.shape, strict=True)):
        raise ArgumentError(complaint(call, "out", "not repeat an element", f"strides {out.strides}"))
    for label, x in inputs.items():
        if x is not None and namespace(x).may_share_memory(out, x) and _shares(out, x):
            raise ArgumentError(complaint(call, "out", f"not overlap {label}", "shared memory"))


def _shares(a: Any, b: Any) -> bool:
    if is_cuda(a):  # CuPy compares the bytes between first and last element, no finer
        return True
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def quant_config_type(call: str, config: Any) -> None:
    """Refuse anything that is not a quant config."""
    if not isinstance(config, FusedMoEQuantConfig):
        raise DTypeError(complaint(call, "quant_config", "be a FusedMoEQuantConfig or None", type(config).__name__))


def quant_config(call: str, config: FusedMoEQuantConfig, w1: Any, N: int, K: int, width: int) -> FusedMoEQuantConfig:
    """Return `config` with its arrays checked against the weights and made contiguous float32 or uint8.

    `width` is I.  Scales of activations given as plain numbers go to the weights' device.
    """
    quant_config_type(call, config)
    E_local = w1.shape[0]
    grids = {"w1": (N, K), "w2": (K, width)}
    checked: dict[str, Any] = {}
    for name, (rows, columns) in grids.items():
        desc = getattr(config, name)
        checked[name] = new = _weight_desc(call, name, desc, config, (E_local, rows, columns))
        arrays = {"scale": new.scale, "scale_2": new.scale_2, "zp": new.zp, "bias": new.bias}
        one_device(call, w1=w1, **{f"{name}_{part}": x for part, x in arrays.items()})
    for name in ("a1", "a2"):
        desc = getattr(config, name)
        scalars = {part: _scalar(call, f"{name}_{part}", getattr(desc, part), w1) for part in ("scale", "gscale")}
        checked[name] = dataclasses.replace(desc, **scalars)
    return dataclasses.replace(config, **checked)


def _weight_desc(
    call: str, name: str, desc: FusedMoEQuantDesc, config: FusedMoEQuantConfig, grid: tuple[int, int, int]
) -> FusedMoEQuantDesc:
    E_local, rows, columns = grid
    new: dict[str, Any] = {}
    if desc.bias is not None:
        bias = as_array(call, f"{name}_bias", desc.bias)
        shape(call, f"{name}_bias", bias, (E_local, rows))
        float_dtype(call, f"{name}_bias", bias)
        new["bias"] = namespace(bias).ascontiguousarray(bias, dtype=np.float32)
    if desc.scale is None:
        return dataclasses.replace(desc, **new)
    scale = as_array(call, f"{name}_scale", desc.scale)
    groups = _groups(call, name, desc, columns)
    key = config.weight_key
    assert key is not None and desc.shape is not None
    shapes: list[tuple[int | None, ...]]
    if desc.shape.row == -1 and desc.shape.col == -1:
        shapes = [(E_local,), (E_local, 2)] if name == "w1" and rows % 2 == 0 else [(E_local,)]
    elif desc.shape.row == -1:
        shapes = [(E_local, rows), (E_local, rows, 1)]
    elif desc.shape.row > 1 or (config.block_shape is not None and config.quant_dtype is not None):
        shapes = [(E_local, -(-rows // desc.shape.row), groups)]
    else:
        shapes = [(E_local, rows, groups)] + ([(E_local, rows)] if groups == 1 else [])
    shape(call, f"{name}_scale", scale, *shapes)
    new["scale"] = _scale_array(call, f"{name}_scale", scale, key.scale.dtype)
    if desc.scale_2 is not None:
        scale_2 = as_array(call, f"{name}_scale_2", desc.scale_2)
        shape(call, f"{name}_scale_2", scale_2, (E_local,))
        float_dtype(call, f"{name}_scale_2", scale_2)
        new["scale_2"] = namespace(scale_2).ascontiguousarray(scale_2, dtype=np.float32)
    if desc.zp is not None:
        zp = as_array(call, f"{name}_zp", desc.zp)
        packed = key.is_packed
        if packed and rows % 2:
            raise ShapeError(complaint(call, f"{name}_zp", "belong to an even number of rows", rows))
        shape(call, f"{name}_zp", zp, (E_local, rows // 2 if packed else rows, groups))
        if zp.dtype != np.uint8:
            raise DTypeError(complaint(call, f"{name}_zp", "have dtype uint8", zp.dtype))
        new["zp"] = namespace(zp).ascontiguousarray(zp)
    return dataclasses.replace(desc, **new)


def _groups(call: str, name: str, desc: FusedMoEQuantDesc, columns: int) -> int:
    """Return how many scales stand along a row of `columns` codes."""
    assert desc.shape is not None
    extent = columns if desc.shape.col == -1 else desc.shape.col
    if desc.dtype in ("mxfp8", "mxfp4", "nvfp4") and columns % extent:
        symbol = "K" if name == "w1" else "I"
        raise ShapeError(complaint(call, symbol, f"be a multiple of {extent} for {desc.dtype}", columns))
    return -(-columns // extent)


def _scale_array(call: str, label: str, scale: Array, dtype: str) -> Array:
    if dtype == "float32":
        float_dtype(call, label, scale)
        return namespace(scale).ascontiguousarray(scale, dtype=np.float32)
    names = {"e8m0": ("uint8", "float8_e8m0fnu"), "fp8": ("uint8", "float8_e4m3fn")}[dtype]
    if scale.dtype.name not in names:
        raise DTypeError(complaint(call, label, f"have dtype {' or '.join(names)}", scale.dtype))
    return namespace(scale).ascontiguousarray(scale).view(np.uint8)


def _scalar(call: str, label: str, value: Any, w1: Any) -> Any:
    """Return one number as a float32 array (1,) where the weights are; only numbers on the host are looked at."""
    if value is None:
        return None
    scalar = as_array(call, label, value) if hasattr(value, "__dlpack__") else np.asarray(value)
    if scalar.size != 1:
        raise ShapeError(complaint(call, label, "hold one number for all tokens", scalar.shape))
    if scalar.dtype.kind not in "iu":
        float_dtype(call, label, scalar)
    number = scalar.astype(np.float32).reshape(1)
    if is_cuda(number):
        one_device(call, w1=w1, **{label: number})
        return number
    if not np.isfinite(number[0]) or number[0] <= 0:
        raise ArgumentError(complaint(call, label, "be finite and above 0", number[0]))
    return namespace(w1).asarray(number)
