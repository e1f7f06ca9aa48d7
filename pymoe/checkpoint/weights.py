"""What a family's reader returns: one MoE layer of a checkpoint, ready for `MoELayer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymoe.activations import ActivationConfig
from pymoe.config import RoutingConfig
from pymoe.quantization import FusedMoEQuantConfig

Array = Any


@dataclass(frozen=True)
class LayerWeights:
    """One MoE layer of a checkpoint.

    Attributes
    ----------
    w1 : ndarray, (len(experts), N, K)
        Gate rows, then up rows, or alternating where `activation` reads them so; floats, or codes of `quant_config`.
    w2 : ndarray, (len(experts), K, I)
    gate : ndarray, (num_experts, K), or Gate
    num_experts, topk : int
    experts : tuple of int
        Global ids of the loaded experts, in the order of w1 and w2.
    routing : RoutingConfig
    activation : ActivationConfig
    dtype : str
        Name of the dtype to compute in: the checkpoint's own, or the one asked for.
    quant_config : FusedMoEQuantConfig
        Scales and biases.
    shared_experts : SharedExperts, optional
    """

    w1: Array
    w2: Array
    gate: Array
    num_experts: int
    topk: int
    experts: tuple[int, ...]
    routing: RoutingConfig
    activation: ActivationConfig
    dtype: str
    quant_config: FusedMoEQuantConfig
    shared_experts: Any = None


@dataclass(frozen=True)
class LayerSummary:
    """What `list_layers` says of one MoE layer without reading its weights.

    `scheme` is what the routed experts are stored in; `nbytes` is theirs, with scales.
    """

    layer: int
    num_experts: int
    topk: int
    K: int
    I: int  # noqa: E741  the project's symbol
    scheme: str
    nbytes: int
