"""Routing on the GPU: one launch, one warp a token, the bits of ``_numpy.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pymoe.config import RoutingConfig
from pymoe.device.arrays import BFLOAT16, as_array, is_cuda, namespace
from pymoe.device.jit import KernelId
from pymoe.device.launch import LaunchPlan
from pymoe.device.parameters import struct
from pymoe.errors import UnsupportedError, complaint
from pymoe.ops.route import _cuda_gate
from pymoe.ops.route._rule import Rule, resolve

Array = Any

MAX_EXPERTS = 2048
_WARP = 32
_UNIT = "route/route.cu"
_ITEMS = (1, 2, 4, 8, 16, 32, 64)
"""Experts a lane holds: the kernel has an instance for each power of two."""
_SCORING = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2, "chosen": 3, "logit": 4}
_KINDS = {np.dtype("float32"): 0, np.dtype("float16"): 1, BFLOAT16: 2, np.dtype("float64"): 3}
_FEW_ROWS = 512
"""Up to here a token has a block of its own, which spreads few tokens over many multiprocessors."""
_ROWS_PER_BLOCK, _WARPS_PER_ROW = 4, 8
_SHARED_BYTES = 48 * 1024

_known: dict[tuple[int, int, Any], tuple[RoutingConfig, bytes | None, DeviceRule]] = {}
"""Rules by the identity of their configuration, which the entry keeps alive."""
_MOST_KNOWN = 64


class DeviceRule(NamedTuple):
    """A rule with what a launch needs: its bias on the device (0 for none), and its scalars as the kernel's struct."""

    rule: Rule
    E: int
    bias: Array | int
    scalars: np.void


def kernels(arch: str) -> tuple[KernelId, ...]:
    """Return every instance that can be asked for on `arch`."""
    return (*(_kernel(items) for items in _ITEMS), *_cuda_gate.kernels(arch))


def _kernel(items: int) -> KernelId:
    return KernelId(_UNIT, f"pymoe::route_kernel<{items}>")


def device_rule(call: str, config: RoutingConfig, logits: Array) -> DeviceRule:
    """Resolve `config` for the columns of `logits`, with its bias on their device; known again on the next call.

    A bias in device memory is read where it is, so later changes count; this waits for it once.  A bias in host memory
    is compared with the copy that is there already.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError
        As `pymoe.ops.route.route`.
    UnsupportedError
        More than `MAX_EXPERTS` experts.
    """
    E = logits.shape[1]
    if E > MAX_EXPERTS:
        raise UnsupportedError(complaint(call, "router_logits", f"have at most {MAX_EXPERTS} columns on a GPU", E))
    bias = config.e_score_correction_bias
    if bias is not None:
        bias = as_array(call, "e_score_correction_bias", bias)
    content = None if bias is None or is_cuda(bias) else bias.tobytes()
    key = id(config), E, getattr(logits.device, "id", None)
    known = _known.get(key)
    if known is not None and known[0] is config and known[1] == content:
        return known[2]
    if is_cuda(bias):
        rule = resolve(call, replace(config, e_score_correction_bias=bias.get()), E)
    else:
        rule = resolve(call, config, E)
        bias = rule.bias
    integers = (rule.topk, _SCORING[rule.scoring], int(rule.renormalize), rule.groups, rule.topk_group, rule.group_best)
    scalars = struct(*map(np.int32, integers), np.float64(rule.epsilon), np.float64(rule.scale))
    xp = namespace(logits)
    on_device = 0 if bias is None else xp.ascontiguousarray(xp.asarray(bias), dtype=np.float32)
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[key] = config, content, DeviceRule(rule, E, on_device, scalars)
    return _known[key][2]


def route(call: str, logits: Array, config: RoutingConfig) -> tuple[Array, Array]:
    """Route logits (M, E) of any float dtype and strides."""
    return route_rows(namespace(logits).ascontiguousarray(logits), device_rule(call, config, logits))


def route_rows(logits: Array, rule: DeviceRule, *, empty: Callable[..., Array] | None = None) -> tuple[Array, Array]:
    """Return (weights float32, ids int32), both (M, topk), of logits (M, E) of any float dtype, C-contiguous.

    Arrays come from ``empty(shape, dtype)``, by default CuPy's.
    """
    empty = empty or namespace(logits).empty
    M, topk = logits.shape[0], rule.rule.topk
    weights, ids = empty((M, topk), np.float32), empty((M, topk), np.int32)
    if M:
        plan, sizes = _plan(logits.dtype, M, rule.E, topk, rule.rule.groups)
        plan(weights, ids, logits, rule.bias, sizes, rule.scalars)
    return weights, ids


@lru_cache(maxsize=1024)
def _plan(dtype: np.dtype, M: int, E: int, topk: int, groups: int) -> tuple[LaunchPlan, np.void]:
    items = next(n for n in _ITEMS if n * _WARP >= E)
    bytes_ = shared_bytes(E, topk, groups)
    if M <= _FEW_ROWS:
        warps, rows = min(items, _WARPS_PER_ROW), 1
    else:
        warps, rows = 1, max(1, min(_ROWS_PER_BLOCK, _SHARED_BYTES // bytes_))
    plan = LaunchPlan(_kernel(items), (-(-M // rows), 1, 1), (_WARP, warps, rows), rows * bytes_)
    return plan, struct(*map(np.int32, (_KINDS[dtype], M, E)))


def shared_bytes(E: int, topk: int, groups: int) -> int:
    """Return the shared memory of one token, as ``route.cu`` lays it out."""
    return -(-(12 * topk + 8 * E + 8 * groups + 8 * _WARP) // 16) * 16
