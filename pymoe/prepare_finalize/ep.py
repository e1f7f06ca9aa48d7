"""What all pairs over several ranks share: rows leave quantized or as they are, and come back in float32.

Who gets what is planned on the host, also for arrays of a device: ids, router weights and scales are fetched there, a
few bytes for each row, while the rows stay; what comes back to the host goes to the device beside the rows.
"""

from __future__ import annotations

import abc
import contextlib
from typing import Any, NamedTuple

import numpy as np

from pymoe import checks
from pymoe.comm import Ranks
from pymoe.comm.plan import DispatchPlan, as_bytes, from_bytes, pack_meta, plan_dispatch, unpack_meta
from pymoe.comm.transports.base import Payload
from pymoe.contracts import FusedMoEExperts, FusedMoEPrepareAndFinalizeModular, PrepareResult, RowMap
from pymoe.device.arrays import beside, is_cuda, to_host
from pymoe.errors import ArgumentError, complaint
from pymoe.ops.permute.live import live_tokens
from pymoe.ops.quantize import quantize_activations
from pymoe.ops.unpermute import unpermute
from pymoe.prepare_finalize.exchange import Exchange
from pymoe.quantization import FusedMoEQuantConfig
from pymoe.tokens import weigh_input

Array = Any


class Received(NamedTuple):
    """Rows that a rank received, in the order of their ranks, and of their tokens within a rank.

    Attributes
    ----------
    rows : (M, K)
        Hidden dtype, or codes.
    scale : ndarray, optional
        One a row, or one for all; beside the rows.
    topk_ids : (M, topk) int32, on the host
        Numbers of experts here, -1 elsewhere.
    topk_weights : (M, topk) float32, on the host, optional
    """

    rows: Array
    scale: Array | None
    topk_ids: Array
    topk_weights: Array | None


class Quantized(NamedTuple):
    """Rows to send: with a scale each (`row_scale`), with one that all ranks know (`shared_scale`), or none."""

    rows: Array
    row_scale: Array | None
    shared_scale: Array | None
    late: bool


class EpPrepareAndFinalize(FusedMoEPrepareAndFinalizeModular):
    """Common part of the pairs over several ranks.

    Activations with a scale for each token or group, or with a static one, are quantized before they travel, scales
    beside the rows.  One dynamic scale for all rows is taken of the rows that a rank receives.

    Parameters
    ----------
    ranks : Ranks
        With the placement of the experts; ids in calls are global.
    asynchronous : bool
        Offer prepare_async, which returns a hook and a receiver, and finalize_async, which returns a receiver.
    """

    _sends_weights = True
    _reducible = True

    def __init__(self, ranks: Ranks, *, asynchronous: bool = False) -> None:
        self.ranks = ranks
        self._asynchronous = bool(asynchronous)
        self._pair = type(self).__name__
        self._exchange: Exchange | None = None

    def post_init_setup(self, fused_experts: FusedMoEExperts) -> None:
        self._pair = f"{type(self).__name__} with {type(fused_experts).__name__}"
        check_placement(type(self).__name__, self.ranks, fused_experts)

    def topk_indices_dtype(self) -> Any:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def num_dispatchers(self) -> int:
        return self.ranks.size

    def output_is_reduced(self) -> bool:
        return True

    def supports_async(self) -> bool:
        return self._asynchronous

    def guard(self, call: str) -> contextlib.AbstractContextManager[None]:
        return self.ranks.group.guard(call)

    def localizes_ids(self) -> bool:
        return True

    def combine_dtype(self, out_dtype: Any) -> Any:
        return np.dtype("float32")

    def prepare(self, *args: Any, **kwargs: Any) -> PrepareResult:
        hook, receiver = self.prepare_async(*args, **kwargs)
        hook()
        return receiver()

    def prepare_async(
        self,
        a1: Array,
        topk_weights: Array,
        topk_ids: Array,
        num_experts: int,
        expert_map: Array | None,
        apply_router_weight_on_input: bool,
        quant_config: FusedMoEQuantConfig,
        defer_input_quant: bool = False,
    ) -> Any:
        call = f"{type(self).__name__}.prepare"
        self._check_tokens(call, len(a1))
        a1 = weigh_input(call, a1, topk_weights, apply_router_weight_on_input)
        sent = quantize_to_send(a1, quant_config, defer_input_quant)
        owner, local = self.ranks.placement.find(to_host(topk_ids))
        plan = self._plan(owner)
        weighted = self._sends_weights and not apply_router_weight_on_input
        # Ids of other ranks' experts are nobody's there.  Rows are taken by `take`, seven times as fast as by an index.
        here = owner.take(plan.token, 0) == plan.destination()[:, None]
        ids = np.where(here, local.take(plan.token, 0), np.int32(-1)).astype(np.int32, copy=False)
        meta = pack_meta(
            ids,
            to_host(topk_weights).take(plan.token, 0).astype(np.float32, copy=False) if weighted else None,
            None if sent.row_scale is None else to_host(sent.row_scale).take(plan.token, 0),
        )
        topk, K = topk_ids.shape[1], a1.shape[1]
        back = self._rows_back(plan, owner)
        payloads = [Payload(as_bytes(sent.rows), plan.token), Payload(meta)]
        exchange = Exchange(self.ranks, plan, back, payloads, 4 * K, self._reducible)
        values = {"num_experts": num_experts, "topk": topk, "K": K}
        exchange.announce(call, len(a1), values, {"pair": self._pair, "dtype": sent.rows.dtype.name})
        self._exchange = exchange
        self._remember(owner, topk_weights)

        def receive() -> PrepareResult:
            raw, meta = exchange.receive()
            rows, scale = from_bytes(raw, sent.rows.dtype), sent.shared_scale
            scale_dtype = None if sent.row_scale is None else sent.row_scale.dtype
            ids, weights, row_scale = unpack_meta(meta, topk, weighted, scale_dtype)
            if sent.late:
                live = live_tokens(beside(rows, ids), len(self.ranks.experts), None)
                rows, scale = quantize_activations(rows, quant_config, "a1", live=live)
            elif row_scale is not None:
                scale = beside(rows, row_scale)
            counts = np.bincount(ids.reshape(-1) + 1, minlength=len(self.ranks.experts) + 1)
            self.ranks.expert_num_tokens = counts[1:]  # the first are slots of other ranks' experts
            return self._arrange(Received(rows, scale, ids, weights))

        return exchange.send, receive

    def _check_tokens(self, call: str, M: int) -> None:
        """Refuse a call that is too large for the pair."""

    def _plan(self, owner: Array) -> DispatchPlan:
        """Return which tokens go where, for the ranks `owner` (M, topk) of the slots' experts."""
        return plan_dispatch(owner, self.ranks.size)

    def _rows_back(self, plan: DispatchPlan, owner: Array) -> Array:
        """Return how many rows each rank returns."""
        return plan.counts

    def _remember(self, owner: Array, topk_weights: Array) -> None:
        """Keep what finalize needs of the call."""

    @abc.abstractmethod
    def _arrange(self, received: Received) -> PrepareResult:
        """Return the received rows in the experts' format."""

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        receiver: Any = self.finalize_async(*args, **kwargs)
        receiver()

    def _take_exchange(self) -> Exchange:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        return exchange


def check_placement(call: str, ranks: Ranks, fused_experts: FusedMoEExperts) -> None:
    """Refuse experts that are built for another number of experts than the placement has."""
    found = fused_experts.moe_config.num_experts
    if found != ranks.num_experts:
        rule = f"count the {ranks.num_experts} experts of the placement"
        raise ArgumentError(complaint(call, "moe_config.num_experts", rule, found))


def quantize_to_send(a1: Array, quant_config: FusedMoEQuantConfig, defer_input_quant: bool) -> Quantized:
    """Return rows as they travel: codes where each row, or nothing but the config, says its scale."""
    if quant_config.quant_dtype is None or defer_input_quant:
        return Quantized(a1, None, None, False)
    if quant_config.is_dynamic_per_tensor:
        return Quantized(a1, None, None, True)
    rows, scale = quantize_activations(a1, quant_config, "a1")
    key = quant_config.activation_key
    assert key is not None
    shared = key.scale.group_shape.row == -1
    return Quantized(rows, None if shared else scale, scale if shared else None, False)


def sum_rows(rows: Array, places: Array, output: Array, topk_weights: Array | None = None) -> None:
    """Write each token's float32 sum of the rows at `places` (M, w), in that order, rounded once to `output`.

    `topk_weights` (M, w) weigh the rows; -1 in `places`, which are on the host, is no row.
    """
    checks.shape("finalize", "output", output, (len(places), rows.shape[1]))
    if is_cuda(rows):
        from pymoe.ops.unpermute import _cuda

        _cuda.unpermute_any(rows, beside(rows, np.ascontiguousarray(places, np.int32)), topk_weights, output)
        return
    row_map = RowMap(np.array([0, len(rows)]), np.zeros(0, np.int64), places)
    unpermute(rows, row_map, topk_weights=topk_weights, out=output)
