"""Which experts run a configuration: the first candidate, in order of preference, that supports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from pymoe.comm import Ranks
from pymoe.config import FusedMoEConfig
from pymoe.contracts import FusedMoEActivationFormat, FusedMoEExperts, FusedMoEPrepareAndFinalize
from pymoe.environment import logger
from pymoe.errors import ArgumentError, UnsupportedError, complaint
from pymoe.experts import (
    CpuExperts,
    CpuMonolithicExperts,
    CudaBatchedExperts,
    CudaGroupedExperts,
    CudaMonolithicExperts,
    NaiveBatchedExperts,
    NumbaCudaExperts,
    NumpyReferenceExperts,
)
from pymoe.prepare_finalize import (
    AllGatherMonolithicPrepareAndFinalize,
    AllGatherPrepareAndFinalize,
    BatchedEpPrepareAndFinalize,
    BatchedPrepareAndFinalize,
    CudaBatchedPrepareAndFinalize,
    SingleProcessMonolithicPrepareAndFinalize,
    SingleProcessPrepareAndFinalize,
    StandardEpPrepareAndFinalize,
)
from pymoe.quantization import FusedMoEQuantConfig

__all__ = ["CANDIDATES", "Choice", "Refusal", "select"]

CANDIDATES: dict[str, tuple[type[FusedMoEExperts], ...]] = {
    "cpu": (CpuExperts, NumpyReferenceExperts, NaiveBatchedExperts, CpuMonolithicExperts),
    "cuda": (CudaGroupedExperts, CudaBatchedExperts, CudaMonolithicExperts, NumbaCudaExperts),
}
"""Experts by device, best first."""


class Refusal(NamedTuple):
    """A candidate that was not taken, and why."""

    experts: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """The pair that runs a configuration, and every candidate that does not."""

    prepare_finalize: FusedMoEPrepareAndFinalize
    experts: FusedMoEExperts
    refused: tuple[Refusal, ...]


def select(
    moe_config: FusedMoEConfig,
    quant_config: FusedMoEQuantConfig,
    *,
    activation_format: FusedMoEActivationFormat = FusedMoEActivationFormat.Standard,
    monolithic: bool = False,
    ranks: Ranks | None = None,
) -> Choice:
    """Return the preferred pair for a configuration.

    Parameters
    ----------
    moe_config, quant_config
        The layer and its scheme.
    activation_format : FusedMoEActivationFormat
        Format between prepare and experts.
    monolithic : bool
        Whether the experts route themselves.
    ranks : Ranks, optional
        The ranks that share the experts; None for one process.

    Raises
    ------
    UnsupportedError
        No candidate supports the configuration; the message lists every reason.
    """
    candidates = CANDIDATES.get(moe_config.device)
    if candidates is None:
        raise ArgumentError(complaint("select", "device", f"be one of {', '.join(CANDIDATES)}", moe_config.device))
    refused: list[Refusal] = []
    chosen: type[FusedMoEExperts] | None = None
    for candidate in candidates:
        supported, reason = candidate.is_supported_config(
            moe_config, quant_config.weight_key, quant_config.activation_key, activation_format
        )
        if supported and candidate.is_monolithic() != monolithic:
            kind = "router logits" if candidate.is_monolithic() else "ids and weights"
            supported, reason = False, f"kernel takes {kind}"
        if supported and chosen is not None:
            supported, reason = False, f"supported, but {chosen.__name__} is preferred"
        if supported:
            chosen = candidate
        else:
            refused.append(Refusal(candidate.__name__, reason or "not supported"))
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
        raise UnsupportedError(complaint("select", "the configuration", "suit one of the candidates", reasons))
    logger.debug("select: %s; refused %s", chosen.__name__, refused)
    if ranks is not None:
        refused.extend(Refusal(f"transport {name}", reason) for name, reason in ranks.group.refused)
    return Choice(*_build(chosen, moe_config, quant_config, ranks), tuple(refused))


def _build(
    chosen: type[FusedMoEExperts],
    moe_config: FusedMoEConfig,
    quant_config: FusedMoEQuantConfig,
    ranks: Ranks | None,
) -> tuple[FusedMoEPrepareAndFinalize, FusedMoEExperts]:
    """Return prepare/finalize of the chosen experts' kind and format, and the experts built for it."""
    prepare_finalize: FusedMoEPrepareAndFinalize
    if ranks is not None:
        return _build_ep(chosen, moe_config, quant_config, ranks)
    if chosen.activation_format() is FusedMoEActivationFormat.BatchedExperts:
        slabs = BatchedPrepareAndFinalize if moe_config.device == "cpu" else CudaBatchedPrepareAndFinalize
        prepare_finalize = slabs(moe_config.max_num_tokens, moe_config.num_local_experts)
        capacity = prepare_finalize.max_num_tokens_per_rank()
        return prepare_finalize, chosen(moe_config, quant_config, capacity, prepare_finalize.num_dispatchers())
    if chosen.is_monolithic():
        prepare_finalize = SingleProcessMonolithicPrepareAndFinalize()
    else:
        prepare_finalize = SingleProcessPrepareAndFinalize()
    return prepare_finalize, chosen(moe_config, quant_config)


def _build_ep(
    chosen: type[FusedMoEExperts], moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig, ranks: Ranks
) -> tuple[FusedMoEPrepareAndFinalize, FusedMoEExperts]:
    """Return the pair over several ranks."""
    if chosen.activation_format() is FusedMoEActivationFormat.BatchedExperts:
        batched = BatchedEpPrepareAndFinalize(ranks, moe_config.max_num_tokens, asynchronous=True)
        return batched, chosen(moe_config, quant_config, moe_config.max_num_tokens, ranks.size)
    if chosen.is_monolithic():
        return AllGatherMonolithicPrepareAndFinalize(ranks), chosen(moe_config, quant_config)
    gathers = moe_config.moe_parallel_config.all2all_backend == "allgather_reducescatter"
    pair = AllGatherPrepareAndFinalize if gathers else StandardEpPrepareAndFinalize
    return pair(ranks, asynchronous=True), chosen(moe_config, quant_config)
