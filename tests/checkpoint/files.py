"""Hand-made safetensors files and checkpoint folders, honest and hostile."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np

NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "complex64": "C64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def header_of(tensors):
    header, at = {}, 0
    for name, array in tensors.items():
        stop = at + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [at, stop]}
        at = stop
    return header


def write(path, tensors, header=None, text=None, length=None, tail=b"", pad=True):
    """Write a file; `header`, `text` (raw bytes), `length` and `tail` replace the honest parts."""
    if text is None:
        text = json.dumps(header_of(tensors) if header is None else header).encode()
        text += b" " * (-len(text) % 8) if pad else b""
    size = len(text) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + text + b"".join(array.tobytes() for array in tensors.values()) + tail)
    return path


def mixtral(folder, E=4, K=16, width=8, layers=(0,), dtype=np.float32, topk=2, seed=0, shards=1, **config):
    """Write a small Mixtral checkpoint; return its tensors."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in layers:
        prefix = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{prefix}.gate.weight"] = rng.standard_normal((E, K)).astype(dtype)
        for e in range(E):
            for part, shape in (("w1", (width, K)), ("w3", (width, K)), ("w2", (K, width))):
                tensors[f"{prefix}.experts.{e}.{part}.weight"] = (rng.standard_normal(shape) / 4).astype(dtype)
    tensors["model.norm.weight"] = np.ones(3, ml_dtypes.bfloat16)
    described = {"model_type": "mixtral", "num_local_experts": E, "num_experts_per_tok": topk, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(described | config))
    if shards == 1:
        write(folder / "model.safetensors", tensors)
        return tensors
    names = list(tensors)
    where = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]
        write(folder / file, {name: tensors[name] for name in mine})
        where |= {name: file for name in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return tensors


def qwen(folder, E=4, K=16, width=8, shared=0, dtype=np.float32, topk=2, seed=0, layer=0, **config):
    """Write a small Qwen2-MoE (with a shared expert) or Qwen3-MoE checkpoint; return its tensors."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    prefix = f"model.layers.{layer}.mlp"
    tensors = {f"{prefix}.gate.weight": rng.standard_normal((E, K)).astype(dtype)}

    def dense(name, rows):
        for part, shape in (("gate_proj", (rows, K)), ("up_proj", (rows, K)), ("down_proj", (K, rows))):
            tensors[f"{name}.{part}.weight"] = (rng.standard_normal(shape) / 4).astype(dtype)

    for e in range(E):
        dense(f"{prefix}.experts.{e}", width)
    if shared:
        dense(f"{prefix}.shared_expert", shared)
        tensors[f"{prefix}.shared_expert_gate.weight"] = rng.standard_normal((1, K)).astype(dtype)
    dense("model.layers.9.mlp", 5)  # a dense layer, which has no router
    described = {"model_type": "qwen2_moe" if shared else "qwen3_moe", "num_experts": E, "num_experts_per_tok": topk,
                 "hidden_act": "silu"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described | config))
    write(folder / "model.safetensors", tensors)
    return tensors
