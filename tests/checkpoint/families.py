"""One small checkpoint of every family in every form that is read, under the names of the published models."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

import pymoe
from tests.checkpoint.files import write

E, K, I, SHARED = 4, 160, 96, 64
LAYER = 3
FLOATS = ("float32", "float16", "bfloat16")
FP8 = "fp8 blocks"
FORMS = {
    "mixtral": (*FLOATS, FP8),
    "qwen3_moe": (*FLOATS, FP8),
    "qwen2_moe": (*FLOATS, FP8),
    "deepseek_v3": (*FLOATS, FP8),
    "gpt_oss": (*FLOATS, "mxfp4"),
    "llama4": FLOATS,
    "llama4_text": FLOATS,
}
"""What each family's experts may be stored in."""
CASES = [(family, form) for family, forms in FORMS.items() for form in forms]
FUSED = ("mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3")
"""Families of which transformers 5 can also write all experts of a projection as one tensor."""
PER_EXPERT = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
CONFIG = {
    "mixtral": {"num_local_experts": E, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": E, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": E, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "deepseek_v3": {"n_routed_experts": E, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                    "n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": E, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": E, "num_experts_per_tok": 1},
    "llama4": {"text_config": {"num_local_experts": E, "num_experts_per_tok": 1}},
}  # fmt: skip


@dataclass
class Made:
    """A checkpoint's tensors by name, and w1 (E, 2 I, K), w2 (E, K, I) in float32 as `load_layer` orders them."""

    family: str
    form: str
    w1: np.ndarray
    w2: np.ndarray
    config: dict
    tensors: dict = field(default_factory=dict)

    def write(self, folder, shards=1, order=None):
        """Write it; tensors go round the shards, so that a weight and its scale lie apart."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        names = list(self.tensors) if order is None else [list(self.tensors)[i] for i in order]
        if shards == 1:
            write(folder / "model.safetensors", {name: self.tensors[name] for name in names})
            return folder
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        for i, file in enumerate(files):
            write(folder / file, {name: self.tensors[name] for name in names[i::shards]})
        where = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return folder


def make(family, form, *, fused=False, size=(E, K, I), shared=SHARED, scale_dtype=np.float32, **config):
    """Return a checkpoint with random weights of `size` (E, K, I) and shared experts of the width `shared`."""
    rng = np.random.default_rng(0)
    experts, k, width = size
    float_dtype = np.dtype(getattr(ml_dtypes, form, form)) if form in FLOATS else np.dtype(ml_dtypes.bfloat16)
    described = {"model_type": family, "num_hidden_layers": LAYER + 1, "hidden_act": "silu"} | copy.deepcopy(
        CONFIG[family]
    )
    if form == FP8:
        described["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    if form == "mxfp4":
        described["quantization_config"] = {"quant_method": "mxfp4"}
    w1, w2 = (
        rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((experts, 2 * width, k), (experts, k, width))
    )
    made = Made(family, form, w1, w2, described | config)
    writer = per_expert if family in PER_EXPERT else gpt_oss if family == "gpt_oss" else llama4
    layout = {"fused": fused, "scale_dtype": scale_dtype} if family in PER_EXPERT else {}
    writer(made, rng, float_dtype, shared, **layout)
    return made


def matrix(made, name, w, dtype, scale_dtype):
    """Store a matrix in floats or fp8 blocks; return its numbers."""
    if made.form != FP8:
        made.tensors[name] = w.astype(dtype)
        return made.tensors[name].astype(np.float32)
    codes, scale = pymoe.quantize(w, "kFp8Static128BlockSym")
    if scale_dtype == ml_dtypes.float8_e8m0fnu:
        scale = np.exp2(np.ceil(np.log2(scale))).astype(np.float32)
    stored = scale.astype(scale_dtype)
    made.tensors[name] = codes.view(ml_dtypes.float8_e4m3fn)
    made.tensors[f"{name}_scale_inv"] = stored
    spread = np.repeat(np.repeat(stored.astype(np.float32), 128, axis=0), 128, axis=1)[: w.shape[0], : w.shape[1]]
    return made.tensors[name].astype(np.float32) * spread


def per_expert(made, rng, dtype, shared, fused, scale_dtype):
    """Add the tensors of a family that names its experts one by one."""
    block, parts = PER_EXPERT[made.family]
    prefix = f"model.layers.{LAYER}.{'mlp' if fused else block}"
    experts, n, k = made.w1.shape
    made.tensors[f"{prefix}.gate.weight"] = rng.standard_normal((experts, k)).astype(dtype)
    if made.family == "deepseek_v3":
        bias = rng.standard_normal(experts).astype(np.float32) / 4
        made.tensors[f"{prefix}.gate.e_score_correction_bias"] = bias
    if fused:
        made.tensors |= {f"{prefix}.experts.{part}": w.astype(dtype)
                         for part, w in (("gate_up_proj", made.w1), ("down_proj", made.w2))}  # fmt: skip
        made.w1, made.w2 = (w.astype(dtype).astype(np.float32) for w in (made.w1, made.w2))
    else:
        for e in range(experts):
            stored = (made.w1[e, : n // 2], made.w1[e, n // 2 :], made.w2[e])
            for part, w in zip(parts, stored, strict=True):
                w[...] = matrix(made, f"{prefix}.experts.{e}.{part}.weight", w, dtype, scale_dtype)
    name = {"qwen2_moe": "shared_expert", "deepseek_v3": "shared_experts"}.get(made.family)
    if name:
        for part, shape in zip(parts, ((shared, k), (shared, k), (k, shared)), strict=True):
            w = rng.standard_normal(shape).astype(np.float32) / 8
            matrix(made, f"{prefix}.{name}.{part}.weight", w, dtype, scale_dtype)
    if made.family == "qwen2_moe":
        made.tensors[f"{prefix}.shared_expert_gate.weight"] = rng.standard_normal((1, k)).astype(dtype)


def gpt_oss(made, rng, dtype, shared):
    """Add interleaved gate and up, biases, transposed floats or packed codes."""
    prefix = f"model.layers.{LAYER}.mlp"
    experts, n, k = made.w1.shape
    shapes = {"router.weight": (experts, k), "router.bias": (experts,), "experts.gate_up_proj_bias": (experts, n),
              "experts.down_proj_bias": (experts, k)}  # fmt: skip
    made.tensors |= {f"{prefix}.{name}": rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    for part, w in (("gate_up_proj", made.w1), ("down_proj", made.w2)):
        name = f"{prefix}.experts.{part}"
        if made.form == "mxfp4":
            codes, scales = pymoe.quantize(w, "kMxfp4Static")
            made.tensors[f"{name}_blocks"] = codes.reshape(*scales.shape, 16)
            made.tensors[f"{name}_scales"] = scales
            w[...] = pymoe.dequantize(codes, scales, "kMxfp4Static")
        else:
            made.tensors[name] = np.ascontiguousarray(w.swapaxes(1, 2)).astype(dtype)
            w[...] = w.astype(dtype).astype(np.float32)


def llama4(made, rng, dtype, shared):
    """Add transposed experts and the shared one."""
    prefix = f"{'language_model.' if made.family == 'llama4' else ''}model.layers.{LAYER}.feed_forward"
    experts, _, k = made.w1.shape
    shapes = {"router.weight": (experts, k), "shared_expert.gate_proj.weight": (shared, k),
              "shared_expert.up_proj.weight": (shared, k), "shared_expert.down_proj.weight": (k, shared)}  # fmt: skip
    made.tensors |= {f"{prefix}.{n}": (rng.standard_normal(s) / 8).astype(dtype) for n, s in shapes.items()}
    for part, w in (("gate_up_proj", made.w1), ("down_proj", made.w2)):
        made.tensors[f"{prefix}.experts.{part}"] = np.ascontiguousarray(w.swapaxes(1, 2)).astype(dtype)
        w[...] = w.astype(dtype).astype(np.float32)
