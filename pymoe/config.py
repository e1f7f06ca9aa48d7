"""Configuration objects of a layer: routing method, parallel layout and the layer's own sizes."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation, find_activation
from pymoe.errors import ArgumentError, DTypeError, UnsupportedError, complaint
from pymoe.quantization import FusedMoEQuantConfig

__all__ = [
    "FusedMoEConfig",
    "FusedMoEParallelConfig",
    "RoutingConfig",
    "RoutingMethodType",
    "get_routing_method_type",
    "resolve_activation",
]

SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus")


class RoutingMethodType(enum.IntEnum):
    """How router logits become expert ids and weights; numbers are vLLM's.  Formulas: ``docs/numerics``."""

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    Unspecified = 9
    DeepseekV4 = 100
    Custom = 101
    Simulated = 102


def get_routing_method_type(
    scoring_func: str, topk: int, renormalize: bool, num_expert_group: int | None, has_e_score_bias: bool
) -> RoutingMethodType:
    """Return the method that a set of flags stands for, ``Unspecified`` where none does (vLLM's derivation)."""
    method = RoutingMethodType
    if scoring_func == "sqrtsoftplus":
        return method.DeepseekV4 if renormalize else method.Unspecified
    if has_e_score_bias:
        if scoring_func == "sigmoid" and renormalize:
            return method.DeepSeekV3 if (num_expert_group or 0) > 0 else method.MiniMax2
        return method.Unspecified
    if (num_expert_group or 0) > 1:
        return method.Unspecified
    if scoring_func == "sigmoid":
        return method.SigmoidRenorm if renormalize else method.Sigmoid
    if scoring_func == "softmax":
        return method.RenormalizeNaive if renormalize else method.Default
    return method.Unspecified


# Flags that each method fixes; a flag given with another value contradicts the method.
_METHOD_FLAGS: dict[RoutingMethodType, dict[str, Any]] = {
    RoutingMethodType.Default: {"scoring_func": "softmax", "renormalize": False},
    RoutingMethodType.Renormalize: {"scoring_func": "softmax", "renormalize": True},
    RoutingMethodType.DeepSeekV3: {"scoring_func": "sigmoid", "renormalize": True},
    RoutingMethodType.Llama4: {"scoring_func": "sigmoid", "renormalize": False},
    RoutingMethodType.RenormalizeNaive: {"scoring_func": "softmax", "renormalize": True},
    RoutingMethodType.TopK: {"renormalize": False},
    RoutingMethodType.SigmoidRenorm: {"scoring_func": "sigmoid", "renormalize": True},
    RoutingMethodType.MiniMax2: {"scoring_func": "sigmoid", "renormalize": True},
    RoutingMethodType.Sigmoid: {"scoring_func": "sigmoid", "renormalize": False},
    RoutingMethodType.DeepseekV4: {"scoring_func": "sqrtsoftplus", "renormalize": True},
}


@dataclass(frozen=True)
class RoutingConfig:
    """How a token's experts are chosen.

    Parameters
    ----------
    topk : int
        Experts a token; 1..E.
    renormalize : bool, optional
        Divide the chosen weights by their sum.  None: the method's own, True without a method.
    scoring_func : {"softmax", "sigmoid", "sqrtsoftplus"}, optional
        None: the method's own, softmax without a method.
    num_expert_group, topk_group : int, optional
        Grouped top-k: E experts in `num_expert_group` equal groups, of which `topk_group` are kept.
    e_score_correction_bias : array, (E,), optional
        Added to the scores for selection only.
    routed_scaling_factor : float
        Multiplies the weights last.
    routing_method : RoutingMethodType, its name or number, optional
        None: derived from the flags.
    custom_routing_function : callable, optional
        ``fn(hidden_states, router_logits, topk, renormalize) -> (weights, ids)``.
    apply_router_weight_on_input : bool
        Multiply the input instead of the output; needs topk 1.

    Raises
    ------
    ArgumentError
        A value outside its rule, or a flag that contradicts the method.
    """

    topk: int
    renormalize: bool | None = None
    scoring_func: str | None = None
    num_expert_group: int | None = None
    topk_group: int | None = None
    e_score_correction_bias: Any = None
    routed_scaling_factor: float = 1.0
    routing_method: RoutingMethodType | str | int | None = None
    custom_routing_function: Callable[..., Any] | None = None
    apply_router_weight_on_input: bool = False

    def __post_init__(self) -> None:
        call = "RoutingConfig"
        for name in ("topk", "num_expert_group", "topk_group"):
            value = getattr(self, name)
            if value is None and name != "topk":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise DTypeError(complaint(call, name, "be an integer", repr(value)))
            if value < 1:
                raise ArgumentError(complaint(call, name, "be at least 1", value))
            object.__setattr__(self, name, int(value))
        if self.scoring_func is not None and self.scoring_func not in SCORING_FUNCS:
            rule = f"be one of {', '.join(SCORING_FUNCS)}"
            raise ArgumentError(complaint(call, "scoring_func", rule, repr(self.scoring_func)))
        if (self.num_expert_group is None) != (self.topk_group is None):
            missing = "topk_group" if self.topk_group is None else "num_expert_group"
            raise ArgumentError(complaint(call, missing, "be given with the other group argument", None))
        if not np.isfinite(self.routed_scaling_factor):
            raise ArgumentError(complaint(call, "routed_scaling_factor", "be finite", self.routed_scaling_factor))
        if self.apply_router_weight_on_input and self.topk != 1:
            rule = "be False unless topk is 1"
            raise ArgumentError(complaint(call, "apply_router_weight_on_input", rule, f"True with topk {self.topk}"))
        self._settle_method(call)

    def _settle_method(self, call: str) -> None:
        """Fill `renormalize`, `scoring_func` and `routing_method` from each other, refusing contradictions."""
        method = _method(call, self.routing_method)
        fixed = _METHOD_FLAGS.get(method, {}) if method is not None else {}
        for name, value in fixed.items():
            given = getattr(self, name)
            if given is not None and given != value:
                assert method is not None
                raise ArgumentError(complaint(call, name, f"be {value} for the method {method.name}", given))
        if method is RoutingMethodType.Llama4 and self.topk != 1:
            raise ArgumentError(complaint(call, "topk", "be 1 for the method Llama4", self.topk))
        if method is RoutingMethodType.DeepSeekV3 and self.num_expert_group is None:
            raise ArgumentError(complaint(call, "num_expert_group", "be given for the method DeepSeekV3", None))
        grouped_ok = (None, RoutingMethodType.DeepSeekV3, RoutingMethodType.Unspecified)
        if self.num_expert_group is not None and self.num_expert_group > 1 and method not in grouped_ok:
            raise ArgumentError(
                complaint(call, "num_expert_group", f"be None for the method {method.name}", self.num_expert_group)
            )
        if method is RoutingMethodType.Custom and self.custom_routing_function is None:
            raise ArgumentError(complaint(call, "custom_routing_function", "be given for the method Custom", None))
        if self.custom_routing_function is not None and method not in (None, RoutingMethodType.Custom):
            rule = f"be None for the method {method.name}"
            raise ArgumentError(complaint(call, "custom_routing_function", rule, self.custom_routing_function))
        renormalize = self.renormalize if self.renormalize is not None else fixed.get("renormalize", True)
        scoring_func = self.scoring_func or fixed.get("scoring_func", "softmax")
        object.__setattr__(self, "renormalize", bool(renormalize))
        object.__setattr__(self, "scoring_func", scoring_func)
        if method is None:
            has_bias = self.e_score_correction_bias is not None
            method = (
                RoutingMethodType.Custom
                if self.custom_routing_function is not None
                else get_routing_method_type(scoring_func, self.topk, renormalize, self.num_expert_group, has_bias)
            )
        object.__setattr__(self, "routing_method", method)

    @property
    def method(self) -> RoutingMethodType:
        """The settled method."""
        assert isinstance(self.routing_method, RoutingMethodType)
        return self.routing_method


def _method(call: str, method: RoutingMethodType | str | int | None) -> RoutingMethodType | None:
    if method is None:
        return None
    try:
        return RoutingMethodType[method] if isinstance(method, str) else RoutingMethodType(method)
    except (KeyError, ValueError):
        rule = f"be one of {', '.join(member.name for member in RoutingMethodType)}"
        raise ArgumentError(complaint(call, "routing_method", rule, repr(method))) from None


@dataclass(frozen=True)
class FusedMoEParallelConfig:
    """Ranks that share a layer: tensor, data and expert parallel sizes and this rank's place in each.

    `all2all_backend` says how tokens reach their experts: "standard" sends a row once to each rank that needs it,
    "allgather_reducescatter" sends every row to every rank.
    """

    tp_size: int = 1
    pcp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    tp_rank: int = 0
    pcp_rank: int = 0
    dp_rank: int = 0
    ep_rank: int = 0
    sp_size: int = 1
    use_ep: bool = False
    all2all_backend: str = "allgather_reducescatter"
    enable_eplb: bool = False

    @classmethod
    def make(
        cls,
        tp: tuple[int, int],
        pcp: tuple[int, int],
        dp: tuple[int, int],
        sp_size: int = 1,
        *,
        enable_expert_parallel: bool = False,
        **kwargs: Any,
    ) -> FusedMoEParallelConfig:
        """Return the layout of ``(size, rank)`` pairs: with expert parallelism all ranks share out the experts.

        Without it they split every expert (tensor parallel), as vLLM flattens them.
        """
        size = dp[0] * pcp[0] * tp[0]
        rank = dp[1] * pcp[0] * tp[0] + pcp[1] * tp[0] + tp[1]
        use_ep = size > 1 and enable_expert_parallel
        flat: dict[str, Any] = {"ep_size": size, "ep_rank": rank} if use_ep else {"tp_size": size, "tp_rank": rank}
        return cls(
            dp_size=dp[0],
            dp_rank=dp[1],
            pcp_size=pcp[0],
            pcp_rank=pcp[1],
            sp_size=sp_size,
            use_ep=use_ep,
            **flat,
            **kwargs,
        )

    @classmethod
    def make_no_parallel(cls) -> FusedMoEParallelConfig:
        """Return the layout of a single process."""
        return cls()

    @classmethod
    def make_expert_parallel(cls, size: int, rank: int, all2all_backend: str = "standard") -> FusedMoEParallelConfig:
        """Return the layout in which `size` ranks, each with tokens of its own, share out the experts."""
        return cls(
            ep_size=size, ep_rank=rank, dp_size=size, dp_rank=rank, use_ep=size > 1, all2all_backend=all2all_backend
        )

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether each tensor-parallel rank holds a slice of the tokens."""
        return self.sp_size > 1

    @property
    def use_all2all_kernels(self) -> bool:
        """Whether tokens travel between ranks."""
        return self.use_ep and (self.dp_size > 1 or self.pcp_size > 1 or self.sp_size > 1)


@dataclass(frozen=True)
class FusedMoEConfig:
    """Sizes and choices of one MoE layer, known before any token.

    `hidden_dim` is K, `intermediate_size_per_partition` I; `num_experts` counts the global expert space,
    `num_local_experts` this process's.  `routed_dtype` is "float32", or None: see `rows_dtype`.  Without
    `deterministic` a GPU may add a token's rows in any order.
    """

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size_per_partition: int
    num_local_experts: int
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    in_dtype: Any = np.dtype("float32")
    device: str = "cpu"
    routing: RoutingConfig | None = None
    router_logits_dtype: Any = None
    moe_parallel_config: FusedMoEParallelConfig = field(default_factory=FusedMoEParallelConfig)
    num_logical_experts: int | None = None
    max_num_tokens: int = 256
    has_bias: bool = False
    routed_dtype: Any = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        routed_dtype_of("FusedMoEConfig", self.routed_dtype)

    @property
    def rows_dtype(self) -> np.dtype:
        """What a GPU rounds weighed rows to before it sums them: the tokens' dtype unless `routed_dtype` says float32.

        The CPU keeps them in float32 always.
        """
        return np.dtype(self.in_dtype if self.routed_dtype is None else self.routed_dtype)

    @property
    def routing_method(self) -> RoutingMethodType:
        """The router's method; ``Unspecified`` where ids and weights come from outside."""
        return RoutingMethodType.Unspecified if self.routing is None else self.routing.method

    @property
    def is_act_and_mul(self) -> bool:
        """Whether GEMM1 yields gate and up."""
        return self.activation.is_gated

    @property
    def N(self) -> int:
        """Width of GEMM1: 2 I when gated, I otherwise."""
        return self.intermediate_size_per_partition * (2 if self.is_act_and_mul else 1)


def routed_dtype_of(call: str, routed_dtype: Any) -> Any:
    """Return float32 or None, or refuse another dtype of routed rows."""
    try:
        known = routed_dtype is None or np.dtype(routed_dtype) == np.float32
    except TypeError:
        known = False
    if not known:
        rule = "be float32, or None for the tokens' dtype on a GPU and float32 on the CPU"
        raise DTypeError(complaint(call, "routed_dtype", rule, routed_dtype))
    return None if routed_dtype is None else np.dtype(np.float32)


def resolve_activation(
    call: str,
    activation: MoEActivation | RegisteredActivation | ActivationConfig | str,
    quant_config: FusedMoEQuantConfig,
) -> ActivationConfig:
    """Join the activation argument with the quant config's ``gemm1_*`` parameters.

    Raises
    ------
    ArgumentError
        The two give one parameter different values, or the activation does not read it.
    UnsupportedError
        Gated RELU2.
    """
    given = activation if isinstance(activation, ActivationConfig) else None
    names = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    if given is not None and all(getattr(quant_config, name) is None for name in names):
        return given
    chosen = find_activation(call, activation if given is None else given.activation)
    parameters = given.parameters() if given is not None else {}
    for name, label in (("alpha", "gemm1_alpha"), ("beta", "gemm1_beta"), ("clamp_limit", "gemm1_clamp_limit")):
        value = getattr(quant_config, label)
        if value is None:
            continue
        if parameters.get(name) is not None and parameters[name] != value:
            raise ArgumentError(complaint(call, label, f"equal the activation's {name} {parameters[name]}", value))
        parameters[name] = value
    try:
        return ActivationConfig(chosen, **parameters)
    except (ArgumentError, UnsupportedError, DTypeError) as error:
        error.add_note(f"while {call} joined the activation with the quant config")
        raise
