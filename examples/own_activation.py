"""An activation of your own in a layer, on the CPU and, where there is one, a GPU: python examples/own_activation.py

Needs: pip install pymoe
"""

import math

import numpy as np

import pymoe

SLOPE = 0.1  # taken as it is when the function is registered


def leaky_gate(gate, up):
    """A gate that still passes a little of what it closes to, with a smooth bend."""
    bend = math.log1p(math.exp(-abs(gate)))
    open_part = max(gate, 0.0) + bend
    return (open_part + SLOPE * min(gate, 0.0)) * up


pymoe.register_activation("leaky_gate", leaky_gate)

E, K, I, TOPK = 8, 64, 96, 2  # experts, hidden size, expert width, experts a token
rng = np.random.default_rng(0)
w1 = rng.standard_normal((E, 2 * I, K), dtype=np.float32) / 8  # I gate rows, then I up rows
w2 = rng.standard_normal((E, K, I), dtype=np.float32) / 10
gate = rng.standard_normal((E, K), dtype=np.float32)
x = rng.standard_normal((5, K), dtype=np.float32)

y = pymoe.MoELayer(w1, w2, topk=TOPK, gate=gate, activation="leaky_gate")(x)

# The same in plain Python, scalar by scalar, in float64.
logits = x @ gate.T
expected = np.zeros(x.shape)
for m, row in enumerate(x):
    ids = np.argsort(-logits[m])[:TOPK]
    weights = np.exp(logits[m, ids] - logits[m, ids].max())
    for weight, e in zip(weights / weights.sum(), ids, strict=True):
        rows = w1[e].astype(float) @ row
        expected[m] += weight * (w2[e] @ [leaky_gate(g, u) for g, u in zip(rows[:I], rows[I:], strict=True)])
error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
print(f"relative difference from plain Python {error:.1e}")
assert error < 1e-5, error

try:
    import cupy

    has_gpu = cupy.is_available()
except ImportError:
    has_gpu = False
if has_gpu:
    arrays = map(cupy.asarray, (w1, w2, gate, x))
    w1, w2, gate, x = arrays
    on_gpu = pymoe.MoELayer(w1, w2, topk=TOPK, gate=gate, activation="leaky_gate")(x).get()
    difference = np.linalg.norm(on_gpu - y) / np.linalg.norm(y)
    print(f"relative difference of the GPU {difference:.1e}")
    assert difference < 1e-5, difference
