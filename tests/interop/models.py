"""Tiny models of Hugging Face transformers with random weights and biases, and their MoE blocks called on arrays."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest

WIDTHS = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "intermediate_size": 24,
          "experts_implementation": "eager"}  # fmt: skip
MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
          "first_k_dense_replace": 1}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
          "vision_output_dim": 16, "image_size": 28, "patch_size": 14, "projector_input_dim": 16,
          "projector_output_dim": 16}  # fmt: skip

FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"num_experts": 8, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2Moe", MOE | {"num_experts": 8, "shared_expert_intermediate_size": 40}),
    "deepseek_v3": ("DeepseekV3", MOE | LATENT | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": ("Llama4", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 12}),
    "llama4": ("Llama4", {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 12}),
}
"""By model_type: the stem of transformers' class names, and the configuration on top of `WIDTHS`."""


@dataclass(frozen=True)
class Case:
    """A family with changes to its configuration; `layer` is the one compared, and `layers` all that have experts."""

    family: str
    label: str = "plain"
    config: dict = field(default_factory=dict)
    layer: int = 1
    layers: tuple[int, ...] = (0, 1)

    def __str__(self):
        return f"{self.family}-{self.label}"


CASES = [
    Case("mixtral"),
    Case("mixtral", "odd sizes, top 3", {"hidden_size": 37, "intermediate_size": 19, "num_experts_per_tok": 3}),
    Case("mixtral", "one expert", {"num_local_experts": 1, "num_experts_per_tok": 1}, layer=0),
    Case("mixtral", "gelu", {"hidden_act": "gelu"}),
    Case("mixtral", "gelu by tanh", {"hidden_act": "gelu_pytorch_tanh", "num_local_experts": 9}),
    Case("qwen3_moe"),
    Case("qwen3_moe", "not renormalized", {"norm_topk_prob": False, "num_experts_per_tok": 4}),
    Case("qwen3_moe", "odd sizes", {"hidden_size": 33, "moe_intermediate_size": 7, "num_experts": 11}),
    Case("qwen3_moe", "every other layer dense", {"decoder_sparse_step": 2}, layers=(1,)),
    Case("qwen2_moe"),
    Case("qwen2_moe", "renormalized", {"norm_topk_prob": True, "num_experts_per_tok": 3}),
    Case("qwen2_moe", "odd shared width", {"shared_expert_intermediate_size": 13, "hidden_size": 21}),
    Case("qwen2_moe", "the first layer dense", {"mlp_only_layers": [0]}, layers=(1,)),
    Case("deepseek_v3", layers=(1,)),
    Case("deepseek_v3", "not renormalized", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}, layers=(1,)),
    Case("deepseek_v3", "two shared experts", {"n_shared_experts": 2, "num_experts_per_tok": 3}, layers=(1,)),
    Case("deepseek_v3", "one group", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 5}, layers=(1,)),
    Case("deepseek_v3", "all groups", {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 5}, layers=(1,)),
    Case("deepseek_v3", "one of two groups, odd sizes", {"n_group": 2, "topk_group": 1, "n_routed_experts": 10,
         "hidden_size": 35, "moe_intermediate_size": 9, "num_experts_per_tok": 4}, layers=(1,)),
    Case("deepseek_v3", "no dense layer", {"first_k_dense_replace": 0}, layer=0),
    Case("gpt_oss"),
    Case("gpt_oss", "odd sizes, top 3", {"hidden_size": 36, "intermediate_size": 15, "num_experts_per_tok": 3,
         "num_local_experts": 7}),
    Case("gpt_oss", "another limit", {"swiglu_limit": 1.5}),
    Case("gpt_oss", "another limit and alpha", {"swiglu_limit": 2.0, "swiglu_alpha": 1.0}),
    Case("llama4_text"),
    Case("llama4_text", "every other layer dense", {"interleave_moe_layer_step": 2}, layers=(1,)),
    Case("llama4_text", "odd sizes", {"hidden_size": 34, "intermediate_size": 11, "num_local_experts": 6}),
    Case("llama4", "inside the multimodal model"),
]  # fmt: skip


def torch():
    """Return PyTorch, or skip the test with the reason."""
    module = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'pymoe[interop]'")
    module.set_num_threads(1)  # these models are too small to share
    return module


def transformers():
    """Return transformers, or skip the test with the reason."""
    torch()
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install 'pymoe[interop]'")


def build(case, dtype="float32", seed=0):
    """Return the model of a case with random parameters and buffers, biases included."""
    t = torch()
    transformers()
    stem, described = FAMILIES[case.family]
    module = importlib.import_module(f"transformers.models.{case.family.removesuffix('_text')}")
    described = WIDTHS | described | case.config
    t.manual_seed(seed)
    if case.family == "llama4":
        config = module.Llama4Config(text_config=described, vision_config=VISION)
        model = module.Llama4ForConditionalGeneration(config)
    else:
        config = getattr(module, f"{stem}TextConfig" if case.family == "llama4_text" else f"{stem}Config")(**described)
        model = getattr(module, f"{stem}ForCausalLM")(config)
    generator = t.Generator().manual_seed(seed)
    state = [*model.named_parameters(), *model.named_buffers()]
    with t.no_grad():
        for name, values in state:
            if ("mlp" in name or "feed_forward" in name) and "inv_freq" not in name:
                # Logits and hidden values of order 1, biases of the same size.
                scale = 1 / np.sqrt(described["hidden_size"]) if values.ndim > 1 else 0.3
                values.copy_(t.randn(values.shape, generator=generator) * scale)
    return model.eval().to(getattr(t, dtype))


def block_of(model, case):
    """Return the MoE block of the case's layer."""
    text = model.language_model.model if case.family == "llama4" else model.model
    layer = text.layers[case.layer]
    return layer.feed_forward if "llama4" in case.family else layer.mlp


def run(block, x):
    """Return the block's output (M, K) of tokens (M, K)."""
    t = torch()
    with t.no_grad():
        y = block(x[None])
    return (y[0] if isinstance(y, tuple) else y).reshape(x.shape)


def route(block, case, x):
    """Return (ids, weights) that the block chooses for tokens (M, K), in its own dtype."""
    t = torch()
    with t.no_grad():
        if "llama4" in case.family:
            scores, logits = block.router(x)
            ids = t.topk(logits, block.top_k, dim=1).indices
            return ids, scores.gather(1, ids)
        gate = block.router if case.family == "gpt_oss" else block.gate
        _, weights, ids = gate(x)
    return ids, weights


def run_in_float64(block, case, x, ids, weights):
    """Return the block's output in float64, from its own code, for given ids and weights.

    Llama 4 alone keeps a rounding: tokens times the router's weight, which both libraries round to the tokens' dtype.
    """
    t = torch()
    dtype, double, x, weights = x.dtype, copy.deepcopy(block).double(), x.double(), weights.double()
    with t.no_grad():
        if "llama4" in case.family:
            scores = t.zeros((len(x), block.num_experts), dtype=t.float64).scatter_(1, ids, weights)
            double.router.forward = lambda hidden: (scores, None)
            plain = double.experts.forward
            double.experts.forward = lambda routed: plain(routed.to(dtype).double())
            return double(x[None])[0].reshape(x.shape)
        y = double.experts(x, ids, weights)
        if case.family == "deepseek_v3":
            y = y + double.shared_experts(x)
        if case.family == "qwen2_moe":
            y = y + t.sigmoid(double.shared_expert_gate(x)) * double.shared_expert(x)
    return y


def clear_tokens(block, case, count, seed=1, gap=1e-3):
    """Return `count` random tokens, float32, whose experts no rounding of the router could change."""
    t = torch()
    x = t.randn((4 * count, block_width(block)), generator=t.Generator().manual_seed(seed))
    gate = block.router if hasattr(block, "router") else block.gate
    with t.no_grad():
        logits = t.nn.functional.linear(x.double(), gate.weight.double())
        logits = logits + gate.bias.double() if getattr(gate, "bias", None) is not None else logits
    logits, clear = logits.numpy(), np.ones(len(x), bool)
    if case.family == "deepseek_v3":
        scores = 1 / (1 + np.exp(-logits)) + gate.e_score_correction_bias.double().numpy()
        groups = scores.reshape(len(x), gate.num_group, -1)
        best = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
        clear &= margin(best, gate.topk_group) > gap
        kept = np.argsort(np.argsort(-best, axis=1), axis=1) < gate.topk_group
        logits = np.where(kept[:, :, None], groups, -1e9).reshape(scores.shape)
    clear &= margin(logits, gate.top_k) > gap
    assert clear.sum() >= count
    return x[t.from_numpy(np.flatnonzero(clear)[:count])]


def block_width(block):
    gate = block.router if hasattr(block, "router") else block.gate
    return gate.weight.shape[1]


def margin(values, count):
    """Return by how much the last of the `count` largest values of each row stands above the next."""
    ordered = -np.sort(-values, axis=1)
    return ordered[:, count - 1] - ordered[:, count] if values.shape[1] > count else np.full(len(values), np.inf)


def as_numpy(tensor):
    """Return a CPU tensor as a NumPy array, bfloat16 included."""
    t = torch()
    tensor = tensor.detach().contiguous()
    if tensor.dtype == t.bfloat16:
        return tensor.view(t.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
