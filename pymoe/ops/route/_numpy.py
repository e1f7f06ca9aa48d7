"""The definition of routing, one array statement a step.

1. Clean the float32 logits: NaN becomes -inf, +inf the largest float32.  A row of nothing but -inf ends here.
2. Without bias and groups compare the logits; otherwise float32 scores of all experts, plus the float32 bias.
3. With groups, a group stands for the float32 sum of its two best (with a bias, or the method DeepSeekV3) or its best;
   the `topk_group` largest stay, ties to the lowest group.  The experts of the others cannot be chosen.
4. Choose the `topk` largest in descending order, ties to the lowest id.
5. Weights in float64: e**(logit - largest chosen) for the softmax over the chosen, the logit itself for TopK (-inf: 0),
   else the float32 score, which holds no bias.  When renormalizing, divide by their sum over slots 0..topk-1 plus
   epsilon (0, or 1e-20 for groups, DeepSeekV3 and MiniMax2); a sum of 0 gives 0.  Multiply by the scaling factor, and
   round once to float32.
"""

from __future__ import annotations

import numpy as np

from pymoe.ops.route._rule import Rule
from pymoe.ops.route._scores import SCORES, clean, exp


def route_rows(logits: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return (weights float32, ids int32), both (M, topk), of float32 logits (M, E)."""
    M, E = logits.shape
    with np.errstate(all="ignore"):
        x = clean(logits)
        dead = (x == -np.inf).all(axis=1)
        scores = SCORES[rule.scoring](x) if rule.scoring in SCORES else x
        if rule.by_logit:
            choice, eligible = x, np.ones((M, E), bool)
        else:
            choice = scores if rule.bias is None else scores + rule.bias
            eligible = _eligible(choice, rule)
        # Stable and least significant key first: eligible experts, then the largest, then the lowest id.
        ids = np.lexsort((-choice, ~eligible), axis=-1)[:, : rule.topk]
        ids[dead] = np.arange(rule.topk)
        weights = _weights(np.take_along_axis(scores, ids, axis=1), rule)
        weights[dead] = 0
    return weights, ids.astype(np.int32)


def _eligible(choice: np.ndarray, rule: Rule) -> np.ndarray:
    """Return (M, E) bool: experts of the `topk_group` best groups."""
    M, E = choice.shape
    if rule.groups == 0:
        return np.ones((M, E), bool)
    best = -np.sort(-choice.reshape(M, rule.groups, E // rule.groups), axis=2)[:, :, : rule.group_best]
    group_scores = best[:, :, 0] if rule.group_best == 1 else best[:, :, 0] + best[:, :, 1]
    kept = np.argsort(-group_scores, axis=1, kind="stable")[:, : rule.topk_group]
    chosen = np.zeros((M, rule.groups), bool)
    np.put_along_axis(chosen, kept, True, axis=1)
    return np.repeat(chosen, E // rule.groups, axis=1)


def _weights(chosen: np.ndarray, rule: Rule) -> np.ndarray:
    """Return the float32 weights of the chosen scores (or logits): float64 steps, one rounding."""
    w = chosen.astype(np.float64)
    renormalize = rule.renormalize
    if rule.scoring == "chosen":
        w, renormalize = exp(w - w[:, :1]), True
    elif rule.scoring == "logit":
        w[w == -np.inf] = 0
    if renormalize:
        total = np.cumsum(w, axis=1)[:, -1:]
        w = np.where(total > 0, w / (total + rule.epsilon), 0.0)
    return (w * rule.scale).astype(np.float32)
