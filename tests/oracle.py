"""A layer in float64 and plain loops; imports nothing of pymoe, so that it shares no bug with it."""

from __future__ import annotations

import math

import numpy as np


def silu(x):
    return x / (1 + math.exp(-x)) if x > -700 else 0.0


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu2(x):
    return max(x, 0.0) ** 2


def swigluoai(gate, up):
    gate, up = min(gate, 7.0), min(max(up, -7.0), 7.0)
    return gate / (1 + math.exp(-1.702 * gate)) * (up + 1)


def swiglustep(gate, up):
    return min(silu(gate), 7.0) * min(max(up, -7.0), 7.0)


def activate(z, name):
    """Return h of one row of GEMM1 in float64."""
    half = len(z) // 2
    plain = {"silu_no_mul": silu, "gelu_no_mul": gelu, "gelu_tanh_no_mul": gelu_tanh, "relu2_no_mul": relu2}
    if name in plain:
        return np.array([plain[name](v) for v in z])
    if name == "swigluoai":
        return np.array([swigluoai(g, u) for g, u in zip(z[::2], z[1::2], strict=True)])
    if name == "swiglustep":
        return np.array([swiglustep(g, u) for g, u in zip(z[:half], z[half:], strict=True)])
    fn = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}[name]
    return np.array([fn(g) * u for g, u in zip(z[:half], z[half:], strict=True)])


def layer(x, w1, w2, weights, ids, *, activation="silu", b1=None, b2=None, round_h=None, expert_map=None):
    """Return y (M, K) in float64.

    `round_h` maps the float64 row h to the numbers that GEMM2 multiplies (a rounding or a requantization); slots whose
    id is outside the experts, or mapped to -1, add nothing.
    """
    x, w1, w2 = (np.asarray(a, np.float64) for a in (x, w1, w2))
    y = np.zeros((x.shape[0], w2.shape[1]))
    number = w1.shape[0] if expert_map is None else len(expert_map)
    for m in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[m, j])
            if not 0 <= e < number:
                continue
            e = e if expert_map is None else int(expert_map[e])
            if e < 0:
                continue
            z = w1[e] @ x[m] + (0 if b1 is None else b1[e])
            h = activate(z, activation)
            h = h if round_h is None else round_h(h)
            y[m] += float(weights[m, j]) * (w2[e] @ h + (0 if b2 is None else b2[e]))
    return y


def route(logits, topk, *, scoring="softmax", renormalize=True):
    """Return (weights, ids) of the ungrouped methods: sort by logit, ties to the lowest id."""
    M, E = logits.shape
    ids = np.empty((M, topk), np.int64)
    weights = np.zeros((M, topk))
    for m in range(M):
        row = [-math.inf if math.isnan(v) else float(min(v, np.finfo(np.float32).max)) for v in logits[m]]
        ids[m] = sorted(range(E), key=lambda e, row=row: (-row[e], e))[:topk]
        largest = max(row)
        if largest == -math.inf:
            continue
        if scoring == "softmax":
            scores = [math.exp(v - largest) for v in row]
            total = sum(scores)
            scores = [s / total for s in scores]
        else:
            scores = [1 / (1 + math.exp(-v)) if v > -700 else 0.0 for v in row]
        chosen = [scores[e] for e in ids[m]]
        total = sum(chosen) if renormalize else 1.0
        weights[m] = [c / total if total > 0 else 0.0 for c in chosen]
    return weights, ids
