"""Train the digits model from scratch in NumPy and write its checkpoint in Mixtral's layout.

    python examples/digits/train.py [--output FOLDER]

Needs only NumPy and `digits.npz`.  The seed is fixed and BLAS is held to one thread, so that the same machine writes
the same bytes again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

# BLAS reads it when NumPy is imported; the number of its threads changes the order of its sums.
os.environ.update(OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_NUM_THREADS="1")

import numpy as np  # noqa: E402
from model import CHECKPOINT, EPSILON, LAYER, DigitsModel, load_digits, read_float32  # noqa: E402

PIXELS, CLASSES = 64, 10
K, I, E, TOPK = 64, 64, 8, 2
SEED = 0
EPOCHS, BATCH = 60, 64
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
BETA1, BETA2 = 0.9, 0.99
BALANCE = 0.02

Tensors = dict[str, np.ndarray]


def initial_parameters(rng: np.random.Generator) -> Tensors:
    """Normal weights of variance 1 / inputs; experts are stacked along axis 0."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(shape[-1]))

    return {
        "embed": normal(K, PIXELS),
        "embed_bias": np.zeros(K, np.float32),
        "norm": np.ones(K, np.float32),
        "gate": normal(E, K),
        "w1": normal(E, I, K),
        "w3": normal(E, I, K),
        "w2": normal(E, K, I),
        "head": normal(CLASSES, K),
        "head_bias": np.zeros(CLASSES, np.float32),
    }


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax of each row."""
    shifted = np.exp(x - x.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function without overflow."""
    return np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + np.float32(1))


def route(router_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mixtral's top-k: softmax over all, the TOPK largest, renormalized.

    Returns
    -------
    topk_weights : float32, (M, TOPK)
    topk_ids : int64, (M, TOPK)
    """
    topk_ids = np.argsort(-router_logits, axis=1, kind="stable")[:, :TOPK]
    # Softmax over all and renormalization cancel: this is the softmax over the chosen logits.
    return softmax(np.take_along_axis(router_logits, topk_ids, axis=1)), topk_ids


def experts_forward(
    p: Tensors, normed: np.ndarray, topk_weights: np.ndarray, topk_ids: np.ndarray
) -> tuple[np.ndarray, list]:
    """Weighted sum of each row's experts, and what the way back needs, by expert."""
    routed, tape = np.zeros_like(normed), []
    for e in range(E):
        rows, slots = np.nonzero(topk_ids == e)
        x = normed[rows]
        a, b = x @ p["w1"][e].T, x @ p["w3"][e].T
        s = sigmoid(a)
        h = a * s * b
        y = h @ p["w2"][e].T
        # A row meets an expert once, so that plain indexing adds every term.
        routed[rows] += topk_weights[rows, slots, None] * y
        tape.append((rows, slots, x, a, b, s, h, y))
    return routed, tape


def experts_backward(
    p: Tensors, grads: Tensors, d_routed: np.ndarray, topk_weights: np.ndarray, tape: list
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the normed rows and of the routing weights; those of the experts go into `grads`."""
    d_normed, d_weights = np.zeros_like(d_routed), np.zeros_like(topk_weights)
    for name in ("w1", "w3", "w2"):
        grads[name] = np.zeros_like(p[name])
    for e, (rows, slots, x, a, b, s, h, y) in enumerate(tape):
        d_out = d_routed[rows]
        d_weights[rows, slots] = (d_out * y).sum(axis=1)
        d_y = topk_weights[rows, slots, None] * d_out
        d_h = d_y @ p["w2"][e]
        d_a = d_h * b * (s + a * s * (1 - s))
        d_b = d_h * a * s
        grads["w2"][e] = d_y.T @ h
        grads["w1"][e] = d_a.T @ x
        grads["w3"][e] = d_b.T @ x
        d_normed[rows] += d_a @ p["w1"][e] + d_b @ p["w3"][e]
    return d_normed, d_weights


def router_backward(
    router_logits: np.ndarray, topk_weights: np.ndarray, topk_ids: np.ndarray, d_weights: np.ndarray
) -> np.ndarray:
    """Gradient of the router logits: of the loss through the routing weights, and of the load balance.

    The balance term is ``BALANCE * E * sum_e load[e] * mean_rows(probability[:, e])`` (Switch Transformer, equation 4;
    Mixtral's auxiliary loss), with the load taken as a constant.
    """
    M = len(router_logits)
    d_chosen = topk_weights * (d_weights - (topk_weights * d_weights).sum(axis=1, keepdims=True))
    d_logits = np.zeros_like(router_logits)
    np.put_along_axis(d_logits, topk_ids, d_chosen, axis=1)
    load = np.bincount(topk_ids.ravel(), minlength=E).astype(np.float32) / np.float32(M * TOPK)
    probability = softmax(router_logits)
    d_probability = load * np.float32(BALANCE * E / M)
    centred = d_probability - (probability * d_probability).sum(axis=1, keepdims=True)
    return d_logits + probability * centred


def gradients(p: Tensors, images: np.ndarray, labels: np.ndarray) -> tuple[float, Tensors]:
    """Mean cross-entropy of a batch, and the gradient of it and the balance term for every parameter."""
    M = len(images)
    x = images @ p["embed"].T + p["embed_bias"]
    inverse_rms = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(EPSILON))
    unit = x * inverse_rms
    normed = unit * p["norm"]
    router_logits = normed @ p["gate"].T
    topk_weights, topk_ids = route(router_logits)
    routed, tape = experts_forward(p, normed, topk_weights, topk_ids)
    y = x + routed
    probability = softmax(y @ p["head"].T + p["head_bias"])
    loss = -np.mean(np.log(probability[np.arange(M), labels] + np.float32(1e-30)))

    d_logits = probability / np.float32(M)
    d_logits[np.arange(M), labels] -= np.float32(1 / M)
    grads = {"head": d_logits.T @ y, "head_bias": d_logits.sum(axis=0)}
    d_y = d_logits @ p["head"]
    d_normed, d_weights = experts_backward(p, grads, d_y, topk_weights, tape)
    d_router = router_backward(router_logits, topk_weights, topk_ids, d_weights)
    grads["gate"] = d_router.T @ normed
    d_normed += d_router @ p["gate"]
    grads["norm"] = (d_normed * unit).sum(axis=0)
    d_unit = d_normed * p["norm"]
    d_x = d_y + inverse_rms * (d_unit - unit * np.mean(d_unit * unit, axis=1, keepdims=True))
    grads["embed"] = d_x.T @ images
    grads["embed_bias"] = d_x.sum(axis=0)
    return float(loss), grads


def train() -> Tensors:
    """Parameters after EPOCHS passes of AdamW with a cosine from LEARNING_RATE to 0."""
    images, labels = load_digits("train")
    rng = np.random.default_rng(SEED)
    p = initial_parameters(rng)
    mean = {name: np.zeros_like(value) for name, value in p.items()}
    square = {name: np.zeros_like(value) for name, value in p.items()}
    batches = len(images) // BATCH
    step, steps = 0, EPOCHS * batches
    for epoch in range(EPOCHS):
        losses = []
        for rows in np.split(rng.permutation(len(images))[: batches * BATCH], batches):
            loss, grads = gradients(p, images[rows], labels[rows])
            losses.append(loss)
            rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * step / steps))
            step += 1
            correction = np.sqrt(1 - BETA2**step) / (1 - BETA1**step)
            for name, grad in grads.items():
                mean[name] += np.float32(1 - BETA1) * (grad - mean[name])
                square[name] += np.float32(1 - BETA2) * (grad * grad - square[name])
                if p[name].ndim > 1:
                    p[name] *= np.float32(1 - rate * WEIGHT_DECAY)
                p[name] -= np.float32(rate * correction) * mean[name] / (np.sqrt(square[name]) + np.float32(1e-8))
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d}  loss {np.mean(losses):.4f}")
    return p


def named(p: Tensors) -> Tensors:
    """The parameters under the names of a Mixtral checkpoint."""
    layer = f"model.layers.{LAYER}"
    tensors = {
        "model.embed.weight": p["embed"],
        "model.embed.bias": p["embed_bias"],
        f"{layer}.post_attention_layernorm.weight": p["norm"],
        f"{layer}.block_sparse_moe.gate.weight": p["gate"],
    }
    for e in range(E):
        for name in ("w1", "w2", "w3"):
            tensors[f"{layer}.block_sparse_moe.experts.{e}.{name}.weight"] = p[name][e]
    return tensors | {"lm_head.weight": p["head"], "lm_head.bias": p["head_bias"]}


def write_checkpoint(folder: Path, tensors: Tensors) -> None:
    """Write ``config.json`` and ``model.safetensors`` (8-byte header length, JSON header, little-endian values)."""
    config = {
        "architectures": ["MixtralForSequenceClassification"],
        "model_type": "mixtral",
        "hidden_size": K,
        "intermediate_size": I,
        "num_local_experts": E,
        "num_experts_per_tok": TOPK,
        "num_hidden_layers": 1,
        "num_labels": CLASSES,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        "router_aux_loss_coef": BALANCE,
        "torch_dtype": "float32",
    }
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.size * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Spaces up to a multiple of 8 keep the values aligned.
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    values = b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values)


def evaluate(folder: Path) -> None:
    """Print the accuracy of the checkpoint in `folder` on both splits, and how its rows spread over the experts."""
    tensors = read_float32(folder / "model.safetensors")
    moe = f"model.layers.{LAYER}.block_sparse_moe"
    experts = {w: np.stack([tensors[f"{moe}.experts.{e}.{w}.weight"] for e in range(E)]) for w in ("w1", "w2", "w3")}
    load = np.zeros(E, np.int64)

    def layer(normed: np.ndarray) -> np.ndarray:
        topk_weights, topk_ids = route(normed @ tensors[f"{moe}.gate.weight"].T)
        load[:] = np.bincount(topk_ids.ravel(), minlength=E)
        return experts_forward(experts, normed, topk_weights, topk_ids)[0]

    model = DigitsModel(tensors, layer)
    for split in ("train", "test"):
        accuracy = model.accuracy(*load_digits(split))
        print(f"{split:5s} accuracy {accuracy:.4f}  expert load", " ".join(f"{x:.3f}" for x in load / load.sum()))


def main() -> None:
    """Train, write the checkpoint, read it back and evaluate it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    folder = parser.parse_args().output
    start = time.perf_counter()
    write_checkpoint(folder, named(train()))
    print(f"trained in {time.perf_counter() - start:.1f} s")
    evaluate(folder)


if __name__ == "__main__":
    main()
