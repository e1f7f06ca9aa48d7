"""Experts looked up by token id (the hash layers of DeepSeek V4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pymoe import checks
from pymoe.config import SCORING_FUNCS
from pymoe.device.arrays import as_float32, as_numpy, is_integer
from pymoe.errors import ArgumentError, DTypeError, complaint
from pymoe.ops.route._scores import SCORES, clean

__all__ = ["HashRouter"]

Array = Any


class HashRouter:
    """Take a token's experts from a table of its vocabulary, and their weights from the scores.

    A `custom_routing_function`: ``RoutingConfig(topk, custom_routing_function=HashRouter(table))``.

    Parameters
    ----------
    table : ndarray, (vocabulary, topk), integer
        The experts of each token id, in slot order; copied.
    scoring_func : {"sqrtsoftplus", "sigmoid", "softmax"}

    Raises
    ------
    DTypeError, ShapeError, ArgumentError
        A table that is not 2-D integer or holds a negative id; an unknown scoring function.

    Notes
    -----
    Weights are float32 scores of the table's experts, divided by their sum when renormalizing (a sum of 0 gives 0).
    A row of nothing but -inf keeps the table's ids, with weights 0.

    Source
    ------
    vLLM 0.33.0 `FusedTopKBiasRouter` with `hash_indices_table`.

    Examples
    --------
    >>> import numpy as np, pymoe
    >>> from pymoe.ops.route import HashRouter
    >>> router = HashRouter(np.array([[2, 0], [1, 2]]))
    >>> logits = np.zeros((1, 3), np.float32)
    >>> weights, ids = pymoe.select_experts(
    ...     logits, 2, custom_routing_function=router, input_ids=np.array([1])
    ... )
    >>> weights.tolist(), ids.tolist()
    ([[0.5, 0.5]], [[1, 2]])
    """

    def __init__(self, table: Array, *, scoring_func: str = "sqrtsoftplus") -> None:
        call = "HashRouter"
        table = as_numpy(call, "table", table)
        checks.shape(call, "table", table, (None, None))
        if not is_integer(table.dtype):
            raise DTypeError(complaint(call, "table", "have an integer dtype", table.dtype))
        if scoring_func not in SCORING_FUNCS:
            rule = f"be one of {', '.join(SCORING_FUNCS)}"
            raise ArgumentError(complaint(call, "scoring_func", rule, repr(scoring_func)))
        self.largest = int(table.max(initial=0))
        if self.largest > np.iinfo(np.int32).max or table.min(initial=0) < 0:
            wrong = table.min() if table.min(initial=0) < 0 else self.largest
            raise ArgumentError(complaint(call, "table", "hold expert ids", wrong))
        self.table = table.astype(np.int32)
        self.table.flags.writeable = False
        self.scoring_func = scoring_func

    def __call__(
        self, hidden_states: Array | None, router_logits: Array, topk: int, renormalize: bool, *, input_ids: Array
    ) -> tuple[Array, Array]:
        """Return (weights, ids) of the tokens `input_ids`; `hidden_states` is not read."""
        call = "HashRouter"
        logits = as_numpy(call, "router_logits", router_logits)
        checks.shape(call, "router_logits", logits, (None, None))
        checks.float_dtype(call, "router_logits", logits)
        tokens = self._tokens(call, input_ids, logits.shape[0])
        if topk != self.table.shape[1]:
            raise ArgumentError(complaint(call, "topk", f"be {self.table.shape[1]}, the table's columns", topk))
        if self.largest >= logits.shape[1]:
            rule = f"have more than {self.largest} columns, the table's largest expert"
            raise ArgumentError(complaint(call, "router_logits", rule, logits.shape[1]))
        ids = self.table[tokens]
        with np.errstate(all="ignore"):
            scores = SCORES[self.scoring_func](clean(as_float32(logits)))
            weights = np.take_along_axis(scores, ids, axis=1)
            if renormalize:
                wide = weights.astype(np.float64)
                total = np.cumsum(wide, axis=1)[:, -1:]
                weights = np.where(total > 0, wide / total, 0.0).astype(np.float32)
        return weights, ids

    def _tokens(self, call: str, input_ids: Array, M: int) -> np.ndarray:
        """Return the token ids, or refuse them: none may index outside the table."""
        if input_ids is None:
            raise ArgumentError(complaint(call, "input_ids", "be given", None))
        tokens = as_numpy(call, "input_ids", input_ids)
        checks.shape(call, "input_ids", tokens, (M,))
        if not is_integer(tokens.dtype):
            raise DTypeError(complaint(call, "input_ids", "have an integer dtype", tokens.dtype))
        vocabulary = self.table.shape[0]
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocabulary))
        if wrong.size:
            got = f"{tokens[wrong[0]]} at row {wrong[0]}"
            raise ArgumentError(complaint(call, "input_ids", f"be in 0..{vocabulary - 1}, the table's rows", got))
        return tokens
