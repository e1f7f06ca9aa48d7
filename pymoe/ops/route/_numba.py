"""Routing in one pass a row: the steps of `_numpy.py` and `_scores.py`, operation for operation.

No fast-math and no contraction: the float64 operations are IEEE ones in the same order, so ids and weights have the
definition's bits.  Only what a row needs is computed: scores of the chosen experts alone where logits decide.
"""

from __future__ import annotations

import numpy as np

from pymoe.device.numba_cpu import jit
from pymoe.device.threads import run_blocks
from pymoe.ops.route import _scores
from pymoe.ops.route._rule import Rule

EXP_MIN, LOG2_E, ROUND = _scores.EXP_MIN, _scores.LOG2_E, _scores.ROUND
LN2_HIGH, LN2_LOW = _scores.LN2_HIGH, _scores.LN2_LOW
EXP_TERMS, LOG1P_TERMS = _scores.EXP_TERMS, _scores.LOG1P_TERMS
SOFTPLUS_LINEAR, LANES = _scores.SOFTPLUS_LINEAR, _scores.LANES
LARGEST, MINUS_INFINITY = np.float32(_scores.FLOAT32_MAX), np.float32(-np.inf)
EXPONENT_BIAS, FRACTION_BITS = 1023, 52
SOFTMAX, SIGMOID, SQRTSOFTPLUS, CHOSEN, LOGIT = range(5)
_CODES = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "sqrtsoftplus": SQRTSOFTPLUS, "chosen": CHOSEN, "logit": LOGIT}
_GRAIN = 1 << 14


def route_rows(logits: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return (weights float32, ids int32), both (M, topk), of float32 logits (M, E)."""
    M, E = logits.shape
    weights = np.empty((M, rule.topk), np.float32)
    ids = np.empty((M, rule.topk), np.int32)
    scoring, grain = _CODES[rule.scoring], max(1, _GRAIN // max(1, E))
    if rule.by_logit:
        run_blocks(
            _route_by_logit, M, logits, scoring, rule.renormalize, rule.epsilon, rule.scale, weights, ids, grain=grain
        )  # fmt: skip
    else:
        # Without groups one group holds all; without a bias adding 0 changes no comparison.
        bias = np.zeros(E, np.float32) if rule.bias is None else rule.bias
        run_blocks(
            _route_by_score, M, logits, bias, scoring, rule.renormalize, max(1, rule.groups), max(1, rule.topk_group),
            rule.group_best, rule.epsilon, rule.scale, weights, ids, grain=grain,
        )  # fmt: skip
    return weights, ids


@jit
def _exp(t):
    t = t if t > EXP_MIN else EXP_MIN
    shifted = t * LOG2_E + ROUND
    n = shifted - ROUND
    r = (t - n * LN2_HIGH) - n * LN2_LOW
    p = EXP_TERMS[0]
    for k in range(1, len(EXP_TERMS)):
        p = p * r + EXP_TERMS[k]
    # The low bits of `shifted` hold n in two's complement: n + 1023 moved up is the float64 2**n.
    power = np.int64((np.float64(shifted).view(np.int64) + EXPONENT_BIAS) << FRACTION_BITS)
    return p * power.view(np.float64)


@jit
def _sigmoid(x):
    t = np.float64(x)
    z = _exp(-abs(t))
    return np.float32((1.0 if t >= 0 else z) / (1.0 + z))


@jit(inline="always")  # too long for LLVM to inline by itself, and a call would keep its loop scalar
def _sqrtsoftplus(x):
    t = np.float64(x)
    z = _exp(-abs(t))
    s = z / (2.0 + z)
    q = s * s
    p = LOG1P_TERMS[0]
    for k in range(1, len(LOG1P_TERMS)):
        p = p * q + LOG1P_TERMS[k]
    soft = (t if t > 0.0 else 0.0) + s * p
    return np.float32(np.sqrt(t if t > SOFTPLUS_LINEAR else soft))


@jit
def _clean(row, x):
    """Write clean logits to `x`; return whether one of them is above -inf."""
    alive = 0
    for e in range(row.size):
        v = row[e]
        # A comparison with NaN is false, so NaN ends as -inf.
        x[e] = v if v <= LARGEST else (LARGEST if v > LARGEST else MINUS_INFINITY)
        alive |= x[e] > MINUS_INFINITY
    return alive != 0


@jit
def _softmax_terms(x, top, powers, lanes):
    """Write e**(x - top) to `powers` and return its sum in the definition's order."""
    for i in range(LANES):
        lanes[i] = 0.0
    for e in range(x.size):
        powers[e] = _exp(np.float64(x[e]) - top)
    whole = x.size // LANES * LANES
    for start in range(0, whole, LANES):
        for i in range(LANES):
            lanes[i] += powers[start + i]
    for e in range(whole, x.size):
        lanes[e - whole] += powers[e]
    half = LANES // 2
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


@jit
def _score_all(x, scoring, scores, powers, lanes):
    if scoring == SIGMOID:
        for e in range(x.size):
            scores[e] = _sigmoid(x[e])
    elif scoring == SQRTSOFTPLUS:
        for e in range(x.size):
            scores[e] = _sqrtsoftplus(x[e])
    else:
        top = MINUS_INFINITY
        for e in range(x.size):
            top = x[e] if x[e] > top else top
        total = _softmax_terms(x, np.float64(top), powers, lanes)
        for e in range(x.size):
            scores[e] = np.float32(powers[e] / total)


@jit
def _route_nowhere(weights, ids):
    for j in range(ids.size):
        ids[j] = j
        weights[j] = 0.0


@jit
def _insert(values, ids, place, v, e):
    """Put (v, e) before every smaller value among the first `place`, moving those up; equal values stay before it."""
    while place > 0 and values[place - 1] < v:
        values[place] = values[place - 1]
        ids[place] = ids[place - 1]
        place -= 1
    values[place] = v
    ids[place] = e


@jit
def _take_best(choice, start, stop, values, ids, count):
    """Keep the largest in descending order, ties in order of id; return how many are kept so far."""
    topk = values.size
    e = start
    while e < stop and count < topk:
        _insert(values, ids, count, choice[e], e)
        count += 1
        e += 1
    while e < stop:
        end = min(e + LANES, stop)
        least = values[topk - 1]
        hit = 0
        for i in range(e, end):
            hit |= choice[i] > least
        if hit != 0:
            for i in range(e, end):
                if choice[i] > values[topk - 1]:
                    _insert(values, ids, topk - 1, choice[i], i)
        e = end
    return count


@jit
def _keep_groups(choice, groups, group_best, values, kept, is_kept):
    """Mark the best groups in `is_kept`."""
    width = choice.size // groups
    count = 0
    for g in range(groups):
        is_kept[g] = kept.size == groups
    if kept.size == groups:
        return
    for g in range(groups):
        first = second = MINUS_INFINITY
        for e in range(g * width, (g + 1) * width):
            v = choice[e]
            if v > first:
                first, second = v, first
            elif v > second:
                second = v
        score = first if group_best == 1 else np.float32(first + second)
        if count < kept.size:
            _insert(values, kept, count, score, g)
            count += 1
        elif score > values[kept.size - 1]:
            _insert(values, kept, kept.size - 1, score, g)
    for i in range(kept.size):
        is_kept[kept[i]] = True


@jit
def _weigh(w, renormalize, epsilon, scale, weights):
    if renormalize:
        total = 0.0
        for j in range(w.size):
            total += w[j]
        for j in range(w.size):
            w[j] = w[j] / (total + epsilon) if total > 0 else 0.0
    for j in range(w.size):
        weights[j] = np.float32(w[j] * scale)


@jit
def _raw_weights(x, ids, scoring, powers, lanes, w):
    """Write the unnormalised float64 weights of experts that logits chose, the largest first."""
    top = np.float64(x[ids[0]])
    total = _softmax_terms(x, top, powers, lanes) if scoring == SOFTMAX else 1.0
    for j in range(w.size):
        v = x[ids[j]]
        if scoring == CHOSEN:
            w[j] = _exp(np.float64(v) - top)
        elif scoring == SOFTMAX:
            w[j] = np.float32(powers[ids[j]] / total)
        elif scoring == SIGMOID:
            w[j] = _sigmoid(v)
        elif scoring == SQRTSOFTPLUS:
            w[j] = _sqrtsoftplus(v)
        else:
            w[j] = v if v > MINUS_INFINITY else 0.0


@jit
def _route_by_logit(start, stop, logits, scoring, renormalize, epsilon, scale, weights, ids):
    E, topk = logits.shape[1], weights.shape[1]
    x, powers, lanes = np.empty(E, np.float32), np.empty(E, np.float64), np.empty(LANES, np.float64)
    values, w = np.empty(topk, np.float32), np.empty(topk, np.float64)
    for m in range(start, stop):
        if not _clean(logits[m], x):
            _route_nowhere(weights[m], ids[m])
            continue
        _take_best(x, 0, E, values, ids[m], 0)
        _raw_weights(x, ids[m], scoring, powers, lanes, w)
        _weigh(w, renormalize or scoring == CHOSEN, epsilon, scale, weights[m])


@jit
def _route_by_score(
    start, stop, logits, bias, scoring, renormalize, groups, topk_group, group_best, epsilon, scale, weights, ids
):
    E, topk = logits.shape[1], weights.shape[1]
    width = E // groups
    x, scores, choice = np.empty(E, np.float32), np.empty(E, np.float32), np.empty(E, np.float32)
    powers, lanes = np.empty(E, np.float64), np.empty(LANES, np.float64)
    values, w = np.empty(topk, np.float32), np.empty(topk, np.float64)
    group_values, kept, is_kept = np.empty(topk_group, np.float32), np.empty(topk_group, np.int32), np.empty(groups, np.bool_)
    for m in range(start, stop):
        if not _clean(logits[m], x):
            _route_nowhere(weights[m], ids[m])
            continue
        _score_all(x, scoring, scores, powers, lanes)
        for e in range(E):
            choice[e] = scores[e] + bias[e]
        _keep_groups(choice, groups, group_best, group_values, kept, is_kept)
        count = 0
        for g in range(groups):
            if is_kept[g]:
                count = _take_best(choice, g * width, (g + 1) * width, values, ids[m], count)
        for j in range(topk):
            w[j] = scores[ids[m, j]]
        _weigh(w, renormalize, epsilon, scale, weights[m])
