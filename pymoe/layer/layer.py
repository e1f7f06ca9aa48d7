"""The layer object: router, routed experts and shared experts of one MoE layer, built once and called often."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np

from pymoe import checks
from pymoe.activations import ActivationConfig, MoEActivation, RegisteredActivation
from pymoe.config import RoutingConfig, resolve_activation, routed_dtype_of
from pymoe.dense import Gate, SharedExperts, add_shared
from pymoe.device.arrays import HIDDEN_DTYPES, as_array, as_given, as_it_came, device_of, is_cuda, namespace
from pymoe.errors import ArgumentError, ClosedError, DTypeError, complaint
from pymoe.kernel import FusedMoEKernel
from pymoe.layer.arguments import arrays_of, deterministic_of, gate_of, most_tokens, routing_of, settings_of, topk_of
from pymoe.layer.capture import CapturedCall, captured_arrays, run_once
from pymoe.layer.plan import Plan
from pymoe.layer.router import LayerRouter, loads
from pymoe.layer.tapes import tapes_for
from pymoe.layer.together import (
    building_from,
    built_together,
    called_together,
    config_of,
    experts_of,
    own_experts,
)
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig
from pymoe.select import Refusal, select

__all__ = ["MoELayer", "Plan"]

Array = Any


class MoELayer:
    """A Mixture-of-Experts layer.  Thread-safe; weights are borrowed, inputs never written.

    Parameters
    ----------
    w1 : ndarray, (E_local, N, K), w2 : ndarray, (E_local, K, I)
        Weights of one dtype, or codes under `quant_config`.
    topk : int
        Experts a token.
    num_experts : int, optional
        Global experts; default E_local.
    gate : ndarray, (num_experts, K), or Gate, optional
        Router; without it every call brings logits, or ids and weights.
    activation : MoEActivation, str or ActivationConfig
    quant_config : FusedMoEQuantConfig, optional
    routing : RoutingConfig, optional
        Default: softmax over all experts, top-k, renormalized.
    shared_experts : callable or SharedExperts, optional
        Maps tokens (M, K) to (M, K); y is the sum of routed and shared in float32, rounded once.
    comm : mpi4py communicator, optional
        Ranks that share out the experts; building, calls and close are then collective.
    placement : "linear", "round_robin", ExpertPlan or sequence of int
        Which global experts are here, in the order of w1: blocks in rank order, or, by a plan, some on several ranks.
    transport : {"auto", "local", "shm", "host", "hier"}
        How rows travel between ranks.
    max_num_tokens : int, optional
        Calls with more tokens are refused.
    chunk_size : int, optional
        Tokens that the experts see at once; default 16384.
    deterministic : bool, optional
        False lets a GPU add the experts' rows to their tokens in any order, in float32; last bits then differ between
        calls.  All else is deterministic always.
    batch_invariant : bool, optional
        Every backend is, at no price, but for one dynamic scale of all rows: True is refused there and with
        ``deterministic=False``.
    routed_dtype : dtype, optional
        What a GPU rounds the experts' weighed rows to before it sums them in float32: float32, or None for the dtype of
        the tokens.  The CPU keeps them in float32 always.

    Raises
    ------
    ShapeError, DTypeError, ArgumentError, UnsupportedError
        An argument is wrong, or no experts support the configuration.

    Examples
    --------
    >>> import numpy as np, pymoe
    >>> rng = np.random.default_rng(0)
    >>> w1 = rng.standard_normal((4, 16, 8), dtype=np.float32)
    >>> w2 = rng.standard_normal((4, 8, 8), dtype=np.float32)
    >>> layer = pymoe.MoELayer(w1, w2, topk=2, gate=rng.standard_normal((4, 8), dtype=np.float32))
    >>> layer(rng.standard_normal((3, 8), dtype=np.float32)).shape
    (3, 8)
    >>> int(layer.last_load.sum())
    6
    """

    @built_together
    def __init__(
        self,
        w1: Array,
        w2: Array,
        *,
        topk: int,
        num_experts: int | None = None,
        gate: Array | Gate | None = None,
        activation: MoEActivation | RegisteredActivation | ActivationConfig | str = "silu",
        quant_config: FusedMoEQuantConfig | None = None,
        routing: RoutingConfig | None = None,
        shared_experts: Any = None,
        comm: Any = None,
        placement: Any = "linear",
        transport: str = "auto",
        max_num_tokens: int | None = None,
        chunk_size: int | None = None,
        deterministic: bool = True,
        batch_invariant: bool | None = None,
        routed_dtype: Any = None,
    ) -> None:
        call = "MoELayer"
        config = FUSED_MOE_UNQUANTIZED_CONFIG if quant_config is None else quant_config
        checks.quant_config_type(call, config)
        self.activation = resolve_activation(call, activation, config)
        self._w1: Any = as_array(call, "w1", w1)
        self._w2: Any = as_array(call, "w2", w2)
        checks.one_device(call, w1=self._w1, w2=self._w2)
        self.device = "cuda" if is_cuda(self._w1) else "cpu"
        checks.shape(call, "w2", self._w2, (None, None, None))
        self.K = self._w2.shape[1]
        E_local, N, self.I = checks.weights(call, self._w1, self._w2, self.K, self.activation, config)
        self.quant_config = checks.quant_config(call, config, self._w1, N, self.K, self.I)
        shared_out = experts_of(call, self._ranks, placement, num_experts, self._w1)  # type: ignore[has-type]
        self._ranks, self.num_experts, mapping = shared_out
        with device_of(self._w1):
            self._expert_map = None if mapping is None else namespace(self._w1).asarray(mapping)
        self.topk = topk_of(call, topk, self.num_experts)
        self.routing = routing_of(call, routing, self.topk, self.num_experts)
        self.gate = None if gate is None else gate_of(call, gate, self.num_experts, self.K)
        checks.one_device(call, w1=self._w1, gate=None if self.gate is None else self.gate.weight)
        if shared_experts is not None and not callable(shared_experts):
            raise DTypeError(complaint(call, "shared_experts", "be callable or None", type(shared_experts).__name__))
        self.shared_experts = shared_experts
        self.max_num_tokens = most_tokens(call, max_num_tokens)
        self.deterministic = deterministic_of(call, deterministic, batch_invariant, self.quant_config)
        self.routed_dtype = routed_dtype_of(call, routed_dtype)
        self._chunk_size = None if chunk_size is None else checks.integer(call, "chunk_size", chunk_size, 1)
        self.dtype = self._w1.dtype if self._w1.dtype in HIDDEN_DTYPES else np.dtype("float32")
        self._tapes = tapes_for(self)
        self._router: Any = LayerRouter(self.gate, self.routing, self.num_experts)
        self._kernels: dict[Any, tuple[FusedMoEKernel, tuple[Refusal, ...]]] = {}
        self._lock = threading.Lock()
        self._routed: Array | None = None
        self._last_load: Array | None = None
        self._closed = False
        self._kernel(self.dtype)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | os.PathLike[str],
        layer: int,
        *,
        experts: Any = None,
        scheme: str | None = None,
        comm: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> MoELayer:
        """Build the layer number `layer` of the checkpoint in `folder`.

        Parameters
        ----------
        folder : path
            With ``config.json`` and safetensors files, of a family in `pymoe.checkpoint`.
        layer : int
            Number of the decoder layer.
        experts : sequence of int, optional
            Global ids to load; the others map to -1 and contribute 0.
        scheme : str, optional
            Quantize the routed experts on the way, see `quantize_experts`, one expert at a time; also from codes.
        comm : mpi4py communicator, optional
            Ranks that share out the experts by `placement`; each reads only its own.
        dtype : dtype, optional
            Computing dtype, to which floating weights are cast; default the checkpoint's.
        **options
            Further keywords of `MoELayer`.

        Raises
        ------
        CheckpointError
            A file is missing, malformed, or of an unknown family; names file and tensor.
        """
        from pymoe.checkpoint import load_layer

        with building_from("MoELayer.from_checkpoint", comm, options) as group:
            experts = experts if group is None else own_experts(folder, layer, experts, options, group)
            weights = load_layer(folder, layer, experts=experts, dtype=dtype, scheme=scheme)
            built = cls(weights.w1, weights.w2, comm=comm, **(settings_of(weights) | options))
        built.dtype = np.dtype(weights.dtype)
        return built

    @called_together
    def __call__(
        self,
        hidden_states: Array,
        router_logits: Array | None = None,
        topk_weights: Array | None = None,
        topk_ids: Array | None = None,
        *,
        input_ids: Array | None = None,
        shared_experts_input: Array | None = None,
        out: Array | None = None,
    ) -> Array:
        """Run the layer.

        Parameters
        ----------
        hidden_states : ndarray, (M, K), float32 | float16 | bfloat16
        router_logits : ndarray, (M, num_experts), float, optional
            In place of the gate's.
        topk_weights, topk_ids : ndarray, (M, topk), optional
            Both, in place of a router.
        input_ids : ndarray, (M,), optional
            For routers that look experts up.
        shared_experts_input : ndarray, optional
            What the shared experts get instead of `hidden_states` (latent MoE).
        out : ndarray, (M, K), dtype of `hidden_states`, optional
            Written and returned; must not overlap an input.

        Returns
        -------
        ndarray, (M, K), dtype of `hidden_states`

        Raises
        ------
        ClosedError, ShapeError, DTypeError, ArgumentError
            The layer is closed, or an argument is wrong; nothing has been computed.
        """
        self._check_open("MoELayer")
        arrays = (hidden_states, router_logits, topk_weights, topk_ids)
        if self._tapes is not None and input_ids is None and shared_experts_input is None:
            y = self._tapes.call(arrays, out)
            if y is not None:
                return y
        y, self._routed = self._compute(
            *arrays, input_ids=input_ids, shared_experts_input=shared_experts_input, out=out
        )
        self._last_load = None if self._ranks is None else self._ranks.load()
        return y

    def _compute(
        self,
        hidden_states: Array,
        router_logits: Array | None,
        topk_weights: Array | None,
        topk_ids: Array | None,
        *,
        input_ids: Array | None = None,
        shared_experts_input: Array | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Array]:
        """Check the arguments, route, and run the experts; return the answer, and ids to count."""
        call = "MoELayer"
        x = as_array(call, "hidden_states", hidden_states)
        checks.hidden(call, "hidden_states", x, self.K)
        checks.one_device(call, w1=self._w1, hidden_states=x)
        self._check_tokens(call, x.shape[0])
        given = arrays_of(call, router_logits=router_logits, topk_weights=topk_weights, topk_ids=topk_ids)
        target = None
        if out is not None:
            target = as_array(call, "out", out)
            checks.one_device(call, hidden_states=x, out=target)
            inputs = {"hidden_states": x, **given, "w1": self._w1, "w2": self._w2}
            inputs |= arrays_of(call, shared_experts_input=shared_experts_input)
            checks.output(call, target, x.shape[0], x.shape[1], x.dtype, inputs)
        if shared_experts_input is None and not isinstance(self.shared_experts, SharedExperts):
            shared_experts_input = hidden_states  # a function of the user's gets the user's own kind of array
        with device_of(x):
            weights, ids = self._router.route(call, x, **given, input_ids=input_ids)
            y = self._run(call, self._kernel(x.dtype)[0], x, weights, ids, shared_experts_input, target)
            # Counted when asked for; the caller's own ids may have changed by then.
            ids = ids if topk_ids is None else ids.copy()
        return (as_given(y, hidden_states) if out is None else as_it_came(out)), ids

    def _run(
        self, call: str, kernel: FusedMoEKernel, x: Array, weights: Array, ids: Array, shared_input: Any, out: Any
    ) -> Array:
        """Run routed and shared experts; their sum is taken in float32 and rounded once."""
        shared = kernel.impl.shared_experts is not None  # type: ignore[union-attr]
        result = kernel.apply_as(
            call,
            x,
            self._w1,
            self._w2,
            topk_weights=weights,
            topk_ids=ids,
            activation=self.activation,
            global_num_experts=self.num_experts,
            expert_map=self._expert_map,
            apply_router_weight_on_input=self.routing.apply_router_weight_on_input,
            shared_experts_input=shared_input,
            out=None if shared else out,
            out_dtype=np.float32 if shared else None,
        )
        if not shared:
            return result
        beside, routed = result
        return add_shared(call, routed, beside, x.dtype, out)

    def plan(self, M: int) -> Plan:
        """Return what a call with `M` tokens of `dtype` does, and every candidate that was refused with its reason."""
        self._check_open("MoELayer.plan")
        M = checks.integer("MoELayer.plan", "M", M, 0)
        self._check_tokens("MoELayer.plan", M)
        kernel, refused = self._kernel(self.dtype)
        chunks, _ = kernel.impl._chunk_info(M)  # type: ignore[union-attr]
        names = type(kernel.prepare_finalize).__name__, type(kernel.fused_experts).__name__
        return Plan(*names, kernel.workspace_bytes(M), 0, chunks, refused)

    @called_together
    def warm_up(self, M: int = 1) -> None:
        """Compile what a call with `M` tokens of `dtype` runs, by running one on zeros; `last_load` stays."""
        self._check_open("MoELayer.warm_up")
        M = checks.integer("MoELayer.warm_up", "M", M, 0)
        self._check_tokens("MoELayer.warm_up", M)
        with device_of(self._w1):
            run_once(self, M)

    def capture(self, M: int, inputs: str = "hidden") -> CapturedCall:
        """Return a call with `M` tokens of `dtype` as a CUDA graph, with ``inputs``, ``output`` and ``replay()``.

        `inputs` is "hidden", "logits" or "topk": whether the gate, logits, or ids and weights say who computes what.
        The graph keeps the weights alive, also after `close`; its replays do not count in `last_load`.  Raises
        UnsupportedError for weights on the host.
        """
        self._check_open("MoELayer.capture")
        M = checks.integer("MoELayer.capture", "M", M, 1)
        self._check_tokens("MoELayer.capture", M)
        arrays, routed = captured_arrays(self, M, inputs), self._routed
        kernel = self._kernel(self.dtype)[0]
        held = (self._w1, self._w2, self._expert_map, self.gate, self.shared_experts, kernel)
        try:
            return CapturedCall(self, arrays, held, kernel.impl.workspaces)  # type: ignore[union-attr]
        finally:
            self._routed = routed

    @property
    def last_load(self) -> Array | None:
        """Rows that each global expert computed here in the last call, (num_experts,) int64, read-only; None before.

        A NumPy array; asking for it after a call on a device waits for that call.
        """
        load, routed = self._last_load, self._routed
        if load is None and routed is not None:
            load = self._last_load = loads(routed, self.num_experts, self._expert_map)
        return load

    def close(self) -> None:
        """Let go of the weights and kernels; later calls raise `ClosedError`.  May be called again."""
        with self._lock:
            if self._ranks is not None:
                self._ranks.close("MoELayer")
            self._closed = True
            self._kernels.clear()
            self._w1 = self._w2 = self._routed = self._tapes = None
            self.gate = self.shared_experts = self._router = None

    def __enter__(self) -> MoELayer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        key = self.quant_config.weight_key
        return (
            f"MoELayer(E={self.num_experts}, K={self.K}, I={self.I}, topk={self.topk}, "
            f"activation={self.activation.activation.value!r}, weights={'as given' if key is None else key.name})"  # type: ignore[union-attr]
        )

    def _kernel(self, dtype: Any) -> tuple[FusedMoEKernel, tuple[Refusal, ...]]:
        """Return the kernel for hidden dtype `dtype` with its refusals, chosen at the first call with that dtype."""
        with self._lock:
            if dtype not in self._kernels:
                choice = select(config_of(self, dtype), self.quant_config, ranks=self._ranks)
                kernel = FusedMoEKernel(
                    choice.prepare_finalize, choice.experts, self.shared_experts, chunk_size=self._chunk_size
                )
                self._kernels[dtype] = kernel, choice.refused
            return self._kernels[dtype]

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise ClosedError(complaint(call, "the layer", "be open", "a closed one"))

    def _check_tokens(self, call: str, M: int) -> None:
        if self.max_num_tokens is not None and M > self.max_num_tokens:
            rule = f"bring at most max_num_tokens = {self.max_num_tokens} tokens"
            raise ArgumentError(complaint(call, "a call", rule, M))
