"""PyTorch: the Qwen3-MoE block of Hugging Face transformers, with the fastest experts it offers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pymoe.bench.cases import Shape, Weights, hidden_dtype
from pymoe.bench.contenders.contender import Contender
from pymoe.errors import UnsupportedError, complaint

Array = Any

GATHERING = "batched_mm"
"""Copies the weights of every slot: offered only where the slots are no more than the experts."""


class TorchBlock(Contender):
    """``Qwen3MoeSparseMoeBlock`` in inference mode on pymoe's weights, which it shares."""

    name = "torch"

    def __init__(self, shape: Shape, scheme: str, sets: Sequence[Weights], threads: int) -> None:
        import torch
        from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

        self.scheme, self._shape, self._torch = scheme, shape, torch
        self._before = torch.get_num_threads()
        torch.set_num_threads(threads)
        self.threads = torch.get_num_threads()
        self._dtype = torch.float32 if scheme == "fp32" else torch.bfloat16
        tensors = [self._tensors(w.cast(hidden_dtype(scheme))) for w in sets]
        self._blocks = {name: [self._block(qwen, name, *t) for t in tensors] for name in ("eager", *_offered())}

    def _tensors(self, weights: Weights) -> tuple[Any, Any, Any]:
        return tuple(self._tensor(w) for w in (weights.gate, weights.w1, weights.w2))  # type: ignore[return-value]

    def _tensor(self, w: Array) -> Any:
        """Return a tensor that shares the array's memory; bfloat16 passes as int16."""
        same = self._torch.from_numpy(w if w.dtype == "float32" else w.view("int16"))
        return same.view(self._dtype)

    def _block(self, qwen: Any, implementation: str, gate: Any, w1: Any, w2: Any) -> Any:
        shape = self._shape
        config = qwen.Qwen3MoeConfig(
            hidden_size=shape.K,
            moe_intermediate_size=shape.I,
            num_experts=shape.E,
            num_experts_per_tok=shape.topk,
            norm_topk_prob=True,
        )
        config._experts_implementation = implementation
        with self._torch.device("meta"):
            block = qwen.Qwen3MoeSparseMoeBlock(config)
        state = {"gate.weight": gate, "experts.gate_up_proj": w1, "experts.down_proj": w2}
        if set(block.state_dict()) != set(state):
            remedy = "Install transformers 5"
            raise UnsupportedError(
                complaint("pymoe bench", "transformers", "have stacked experts", "one module an expert", remedy)
            )
        block.load_state_dict(state, assign=True)
        return block.eval()

    def variants(self, M: int) -> tuple[str, ...]:
        few = M * self._shape.topk <= self._shape.E
        return tuple(name for name in self._blocks if name != GATHERING or few)

    def bind(self, number: int, x: Array, variant: str = "") -> Callable[[], Any]:
        block = self._blocks[variant or "eager"][number]
        tokens = self._torch.from_numpy(x).to(self._dtype)[None]
        inference_mode = self._torch.inference_mode

        def call() -> Any:
            with inference_mode():
                return block(tokens)

        return call

    def as_float32(self, result: Any) -> Array:
        return result[0].float().numpy()

    def close(self) -> None:
        self._torch.set_num_threads(self._before)


def _offered() -> tuple[str, ...]:
    """Return the implementations beside the eager one that run on a CPU and that this transformers has."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # before transformers 5
        return ()
    return tuple(name for name in ("grouped_mm", GATHERING) if name in ALL_EXPERTS_FUNCTIONS.keys())
