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
BELOW_SIGN, POSITIVE_ZERO = np.int32(2**31 - 1), np.float32(0.0)
LOWEST, ID_BITS, LAST_ID = np.int64(-(2**63)), 32, 2**31 - 1
BLOCK = 8
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


@jit(inline="always")  # too long for LLVM to inline by itself; a call would keep the loop below scalar
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
def _sqrtsoftplus_all(x, scores):
    for e in range(x.size):
        scores[e] = _sqrtsoftplus(x[e])


@jit
def _score_all(x, scoring, scores, powers, lanes):
    if scoring == SIGMOID:
        for e in range(x.size):
            scores[e] = _sigmoid(x[e])
    elif scoring == SQRTSOFTPLUS:
        _sqrtsoftplus_all(x, scores)
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
def _key(v, e):
    """Return an integer in the order of (v, then the lower id): all keys of a row differ."""
    bits = np.float32(v + POSITIVE_ZERO).view(np.int32)  # the sum turns -0 into 0, which it ties with
    ordered = np.int64(np.int32(bits ^ np.int32((bits >> np.int32(31)) & BELOW_SIGN)))
    return (ordered << ID_BITS) | (LAST_ID - e)


@jit
def _value(key):
    """Return the float32 of a key."""
    ordered = np.int32(key >> ID_BITS)
    return np.int32(ordered ^ np.int32((ordered >> np.int32(31)) & BELOW_SIGN)).view(np.float32)


@jit
def _peak(keys, start, stop):
    top = LOWEST
    for i in range(start, stop):
        top = max(top, keys[i])
    return top


@jit
def _choose(keys, peaks, ids):
    """Write the ids of the largest keys in descending order; `keys`, padded to whole blocks, loses them."""
    for b in range(peaks.size):
        peaks[b] = _peak(keys, b * BLOCK, b * BLOCK + BLOCK)
    for j in range(ids.size):
        e = LAST_ID - (_peak(peaks, 0, peaks.size) & LAST_ID)
        ids[j] = e
        keys[e] = LOWEST
        start = e // BLOCK * BLOCK
        peaks[e // BLOCK] = _peak(keys, start, start + BLOCK)


@jit
def _close_groups(keys, E, group_best, group_keys, group_peaks, kept, is_kept):
    """Set the keys outside the best groups to `LOWEST`."""
    groups = is_kept.size
    width = E // groups
    for g in range(groups):
        is_kept[g] = False
        top = _peak(keys, g * width, (g + 1) * width)
        score = _value(top)
        if group_best == 2:
            second = LOWEST
            for e in range(g * width, (g + 1) * width):
                second = max(second, keys[e] if keys[e] < top else LOWEST)
            score = np.float32(score + _value(second))
        group_keys[g] = _key(score, g)
    _choose(group_keys, group_peaks, kept)
    for i in range(kept.size):
        is_kept[kept[i]] = True
    for g in range(groups):
        if not is_kept[g]:
            for e in range(g * width, (g + 1) * width):
                keys[e] = LOWEST


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
def _blocks_of(count):
    """Return (keys, peaks) for `count` numbers, the keys padded to whole blocks."""
    blocks = (count + BLOCK - 1) // BLOCK
    keys = np.empty(blocks * BLOCK, np.int64)
    keys[count:] = LOWEST
    return keys, np.empty(blocks, np.int64)


@jit
def _route_by_logit(start, stop, logits, scoring, renormalize, epsilon, scale, weights, ids):
    E, topk = logits.shape[1], weights.shape[1]
    x, powers, lanes, w = np.empty(E, np.float32), np.empty(E), np.empty(LANES), np.empty(topk)
    keys, peaks = _blocks_of(E)
    for m in range(start, stop):
        if not _clean(logits[m], x):
            _route_nowhere(weights[m], ids[m])
            continue
        for e in range(E):
            keys[e] = _key(x[e], e)
        _choose(keys, peaks, ids[m])
        _raw_weights(x, ids[m], scoring, powers, lanes, w)
        _weigh(w, renormalize or scoring == CHOSEN, epsilon, scale, weights[m])


@jit
def _route_by_score(
    start, stop, logits, bias, scoring, renormalize, groups, topk_group, group_best, epsilon, scale, weights, ids
):
    E, topk = logits.shape[1], weights.shape[1]
    x, scores = np.empty(E, np.float32), np.empty(E, np.float32)
    powers, lanes, w = np.empty(E), np.empty(LANES), np.empty(topk)
    keys, peaks = _blocks_of(E)
    group_keys, group_peaks = _blocks_of(groups)
    kept, is_kept = np.empty(topk_group, np.int32), np.empty(groups, np.bool_)
    for m in range(start, stop):
        if not _clean(logits[m], x):
            _route_nowhere(weights[m], ids[m])
            continue
        _score_all(x, scoring, scores, powers, lanes)
        for e in range(E):
            keys[e] = _key(scores[e] + bias[e], e)
        if topk_group < groups:
            _close_groups(keys, E, group_best, group_keys, group_peaks, kept, is_kept)
        _choose(keys, peaks, ids[m])
        for j in range(topk):
            w[j] = scores[ids[m, j]]
        _weigh(w, renormalize, epsilon, scale, weights[m])
