"""A layer over several ranks: built, called and closed by all of them together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from pymoe import checks
from pymoe.comm import Group, Ranks, agree, connecting, place
from pymoe.comm.eplb import ExpertPlan
from pymoe.comm.placement import experts_of as placed_experts
from pymoe.config import FusedMoEConfig, FusedMoEParallelConfig
from pymoe.device.arrays import is_cuda
from pymoe.errors import ArgumentError, DTypeError, complaint
from pymoe.layer.arguments import expert_map_of

Array = Any
Method = TypeVar("Method", bound=Callable[..., Any])


def number_of_ranks(call: str, comm: Any, transport: Any) -> int:
    """Return how many ranks share a layer; 1 for None.  Refuses what is no communicator or no transport."""
    ranks = 1 if comm is None else comm.Get_size() if hasattr(comm, "Get_size") else getattr(comm, "size", None)
    if ranks is None:
        raise DTypeError(complaint(call, "comm", "be a communicator or None", type(comm).__name__))
    if not isinstance(transport, str):
        raise DTypeError(complaint(call, "transport", "be a string", type(transport).__name__))
    if ranks == 1 and transport not in ("auto", "local"):
        raise ArgumentError(complaint(call, "transport", "be 'auto' or 'local' for one rank", repr(transport)))
    return ranks


def built_together(init: Method) -> Method:
    """Make the constructor of a layer collective where it is given a communicator of several ranks."""

    @functools.wraps(init)
    def build(layer: Any, *args: Any, **options: Any) -> None:
        comm, transport = options.get("comm"), options.get("transport", "auto")
        layer._ranks = None
        if number_of_ranks("MoELayer", comm, transport) == 1:
            return init(layer, *args, **options)
        with connecting("MoELayer", comm, transport) as group:
            layer._ranks = group
            init(layer, *args, **options)
            values = {"topk": layer.topk, "K": layer.K, "I": layer.I, "gate": int(layer.gate is not None)}
            key, routing = layer.quant_config.weight_key, layer.routing
            own = layer.activation.activation  # ranks may have registered different functions by one name
            method = f"{routing.method.name} renormalize={routing.renormalize} {routing.scoring_func}"
            names = {
                "w1": f"{'as given' if key is None else key.name} {layer._w1.dtype}{' on CUDA' * is_cuda(layer._w1)}",
                "activation": f"{own.value} {own.program.digest[:16] if hasattr(own, 'program') else ''}".rstrip(),
                "routing": f"{method} {routing.num_expert_group} {routing.topk_group}",
                "routed_dtype": str(layer.routed_dtype),
                "deterministic": str(layer.deterministic),
            }
            agree("MoELayer", layer._ranks, values, names)

    return build  # type: ignore[return-value]


def building_from(call: str, comm: Any, options: dict[str, Any]) -> contextlib.AbstractContextManager[Group | None]:
    """Surround the reading of weights and the building of a layer from them; yields the group of several ranks."""
    transport = options.get("transport", "auto")
    if number_of_ranks(call, comm, transport) == 1:
        return contextlib.nullcontext()
    return connecting(call, comm, transport, keep=False)


def own_experts(folder: Any, layer: int, experts: Any, options: dict[str, Any], group: Group) -> Any:
    """Return the global ids that this rank reads: those given, else its part of the checkpoint's."""
    from pymoe.checkpoint import list_layers

    placement = options.get("placement", "linear")
    if not isinstance(placement, ExpertPlan):
        options.pop("placement", None)
    if experts is not None:
        return experts
    for entry in list_layers(folder):
        if entry.layer == layer:
            return placed_experts("MoELayer.from_checkpoint", placement, entry.num_experts, group.size, group.rank)
    return None


def called_together(method: Method) -> Method:
    """Let an error in a method of a layer be raised by every rank."""

    @functools.wraps(method)
    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer._ranks is None or layer._closed:
            return method(layer, *args, **kwargs)
        name = "MoELayer" if method.__name__ == "__call__" else f"MoELayer.{method.__name__}"
        with layer._ranks.group.guard(name):
            return method(layer, *args, **kwargs)

    return run  # type: ignore[return-value]


def experts_of(
    call: str, group: Any, placement: Any, num_experts: Any, w1: Array
) -> tuple[Ranks | None, int, Array | None]:
    """Return (ranks, E, expert map) of a layer with the experts w1 here; collective where there is a group."""
    E_local = w1.shape[0]
    E = None if num_experts is None else checks.integer(call, "num_experts", num_experts, 1)
    if group is None:
        E = E_local if E is None else E
        return None, E, expert_map_of(call, placement, E, E_local)
    ranks = place(call, group, placement, E, E_local)
    return ranks, ranks.num_experts, ranks.expert_map


def config_of(layer: Any, dtype: Any) -> FusedMoEConfig:
    """Return sizes and choices of a layer for tokens of `dtype`, and its place among the ranks."""
    return FusedMoEConfig(
        num_experts=layer.num_experts,
        experts_per_token=layer.topk,
        hidden_dim=layer.K,
        intermediate_size_per_partition=layer.I,
        num_local_experts=layer._w1.shape[0],
        activation=layer.activation,
        in_dtype=dtype,
        device=layer.device,
        moe_parallel_config=_parallel_config(layer._ranks),
        routing=layer.routing,
        has_bias=layer.quant_config.w1.bias is not None or layer.quant_config.w2.bias is not None,
        routed_dtype=layer.routed_dtype,
        deterministic=layer.deterministic,
    )


def _parallel_config(ranks: Ranks | None) -> FusedMoEParallelConfig:
    if ranks is None:
        return FusedMoEParallelConfig.make_no_parallel()
    return FusedMoEParallelConfig.make_expert_parallel(ranks.size, ranks.rank)
