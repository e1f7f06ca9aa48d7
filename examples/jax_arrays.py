"""JAX arrays through a pymoe layer and back, eagerly and from inside jax.jit: python examples/jax_arrays.py

Needs: pip install pymoe jax.  Where JAX has a GPU, and CuPy is installed, the layer runs there.
"""

import jax
import jax.numpy as jnp
import numpy as np

import pymoe

E, K, I, TOPK = 8, 64, 128, 2  # experts, hidden size, expert width, experts a token
keys = jax.random.split(jax.random.key(0), 4)
w1 = jax.random.normal(keys[0], (E, 2 * I, K), jnp.bfloat16) / K**0.5  # I gate rows, then I up rows
w2 = jax.random.normal(keys[1], (E, K, I), jnp.bfloat16) / I**0.5
gate = jax.random.normal(keys[2], (E, K), jnp.bfloat16)
x = jax.random.normal(keys[3], (5, K), jnp.bfloat16)

layer = pymoe.MoELayer(w1, w2, topk=TOPK, gate=gate)
y = layer(x)  # a jax.Array of x's dtype; pymoe borrowed x and the weights
on_host = pymoe.MoELayer(*map(np.asarray, (w1, w2)), topk=TOPK, gate=np.asarray(gate))


@jax.jit
def model(x):
    """A compiled function that calls out to a layer: XLA hands over host buffers and takes the answer back."""
    inner = jax.pure_callback(lambda a: on_host(np.asarray(a)), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    return x + inner


# The same in JAX's own operations.
weights, ids = jax.lax.top_k(jax.nn.softmax(x.astype(jnp.float32) @ gate.astype(jnp.float32).T), TOPK)
weights = weights / weights.sum(-1, keepdims=True)
gate_up = jnp.einsum("mk,mjnk->mjn", x.astype(jnp.float32), w1[ids].astype(jnp.float32))
h = (jax.nn.silu(gate_up[..., :I]) * gate_up[..., I:]).astype(jnp.bfloat16).astype(jnp.float32)
expected = jnp.einsum("mj,mjki,mji->mk", weights, w2[ids].astype(jnp.float32), h)

error = jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
print(f"{type(y).__name__} {y.dtype} {y.shape} on {y.device}; relative difference from JAX {error:.1e}")
assert error < 5e-3, error
assert (model(x) == x + y).all() or jax.default_backend() != "cpu"  # on a GPU y is the GPU's

# The same layer with fp8 weights: codes are uint8 arrays, or float8_e4m3fn ones of the same bits.
w1_codes, w2_codes, config = pymoe.quantize_experts(w1, w2, "fp8_w8a8")
as_fp8 = [jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn) for codes in (w1_codes, w2_codes)]
y8 = pymoe.MoELayer(*as_fp8, topk=TOPK, gate=gate, quant_config=config)(x)
error = jnp.linalg.norm(y8.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
print(f"{as_fp8[0].dtype} weights: {y8.dtype} on {y8.device}; relative difference {error:.1e}")
assert y8.dtype == x.dtype and error < 0.1, error
