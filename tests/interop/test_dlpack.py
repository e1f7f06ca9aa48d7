"""PyTorch and JAX arrays in and out on the CPU: same bits as NumPy's, the caller's package and dtype, no copies."""

from __future__ import annotations

import gc

import ml_dtypes
import numpy as np
import pytest

import pymoe

pytestmark = pytest.mark.interop

E, N, K, I, TOPK, M = 4, 32, 16, 16, 2, 7  # noqa: E741
RNG = np.random.default_rng(0)
X = RNG.standard_normal((M, K), dtype=np.float32)
W1 = RNG.standard_normal((E, N, K), dtype=np.float32)
W2 = RNG.standard_normal((E, K, I), dtype=np.float32)
LOGITS = RNG.standard_normal((M, E), dtype=np.float32)
GATE = RNG.standard_normal((E, K), dtype=np.float32)
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.fixture(params=["torch", "jax"])
def package(request):
    module = pytest.importorskip(request.param, reason=f"{request.param} is not installed", exc_type=ImportError)
    return Torch(module) if request.param == "torch" else Jax(module)


class Torch:
    def __init__(self, torch):
        self.torch, self.kind = torch, torch.Tensor

    def make(self, array):
        if array.dtype.kind == "V" or array.dtype.name.startswith("float8"):
            bits = {2: self.torch.int16, 1: self.torch.uint8}[array.dtype.itemsize]
            raw = self.torch.from_numpy(array.view(f"int{8 * array.dtype.itemsize}").copy()).view(bits)
            return raw.view(getattr(self.torch, array.dtype.name))
        return self.torch.from_numpy(array.copy())

    def bits(self, tensor):
        return tensor.contiguous().view(self.torch.uint8).numpy().tobytes()

    def dtype(self, tensor):
        return str(tensor.dtype).removeprefix("torch.")


class Jax:
    def __init__(self, jax):
        self.jax, self.kind = jax, jax.Array

    def make(self, array):
        return self.jax.numpy.asarray(array)

    def bits(self, array):
        return np.asarray(array).tobytes()

    def dtype(self, array):
        return array.dtype.name


def cast(dtype, *arrays):
    return tuple(a.astype(getattr(ml_dtypes, dtype, dtype)) for a in arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_call_answers_in_kind_with_the_bits_of_numpy(package, dtype):
    x, w1, w2, gate = cast(dtype, X, W1, W2, GATE)
    tx, tw1, tw2, tgate, tlogits = (package.make(a) for a in (x, w1, w2, gate, LOGITS))
    weights, ids = pymoe.select_experts(LOGITS, TOPK)
    tweights, tids = pymoe.select_experts(tlogits, TOPK)
    layer, tlayer = pymoe.MoELayer(w1, w2, topk=TOPK, gate=gate), pymoe.MoELayer(tw1, tw2, topk=TOPK, gate=tgate)
    pairs = [
        (weights, tweights),
        (ids, tids),
        (pymoe.fused_experts(x, w1, w2, weights, ids), pymoe.fused_experts(tx, tw1, tw2, tweights, tids)),
        (pymoe.fused_moe(x, w1, w2, LOGITS, TOPK), pymoe.fused_moe(tx, tw1, tw2, tlogits, TOPK)),
        (layer(x), tlayer(tx)),
        (layer(x, LOGITS), layer(tx, tlogits)),
        (layer(x), layer(hidden_states=tx)),
    ]
    for ours, theirs in pairs:
        assert isinstance(theirs, package.kind) and tuple(theirs.shape) == ours.shape
        assert package.dtype(theirs) == ours.dtype.name
        assert package.bits(theirs) == ours.tobytes()


@pytest.mark.parametrize("scheme", ["fp8_w8a8", "int8_w8a8", "mxfp4_w4a16"])
def test_quantized_weights_and_scales_of_either_package(package, scheme):
    w1, w2 = RNG.standard_normal((E, 64, 64), dtype=np.float32), RNG.standard_normal((E, 64, 32), dtype=np.float32)
    x = RNG.standard_normal((M, 64), dtype=np.float32)
    w1q, w2q, config = pymoe.quantize_experts(w1, w2, scheme)
    tw1q, tw2q, tconfig = pymoe.quantize_experts(package.make(w1), package.make(w2), scheme)
    assert package.bits(tw1q) == w1q.tobytes() and package.bits(tw2q) == w2q.tobytes()
    weights, ids = pymoe.select_experts(LOGITS, TOPK)
    y = pymoe.fused_experts(x, w1q, w2q, weights, ids, quant_config=config)
    ty = pymoe.fused_experts(package.make(x), tw1q, tw2q, weights, ids, quant_config=tconfig)
    assert package.bits(ty) == y.tobytes()


def test_fp8_tensors_are_codes(package):
    w1, w2 = RNG.standard_normal((E, N, K), dtype=np.float32), RNG.standard_normal((E, K, I), dtype=np.float32)
    w1q, w2q, config = pymoe.quantize_experts(w1, w2, "fp8_w8a8")
    e4m3 = [package.make(w.view(ml_dtypes.float8_e4m3fn)) for w in (w1q, w2q)]
    weights, ids = pymoe.select_experts(LOGITS, TOPK)
    y = pymoe.fused_experts(X, w1q, w2q, weights, ids, quant_config=config)
    assert (pymoe.fused_experts(X, *e4m3, weights, ids, quant_config=config) == y).all()


def test_quantize_and_dequantize_answer_in_kind(package):
    codes, scale = pymoe.quantize(X, "kFp8DynamicTokenSym")
    tcodes, tscale = pymoe.quantize(package.make(X), "kFp8DynamicTokenSym")
    assert package.bits(tcodes) == codes.tobytes() and package.bits(tscale) == scale.tobytes()
    values = pymoe.dequantize(tcodes, tscale, "kFp8DynamicTokenSym", dtype="bfloat16")
    assert isinstance(values, package.kind) and package.dtype(values) == "bfloat16"


def test_the_answer_outlives_everything_of_ours(package):
    layer = pymoe.MoELayer(package.make(W1), package.make(W2), topk=TOPK)
    y = layer(package.make(X), package.make(LOGITS))
    bits = package.bits(y)
    layer.close()
    del layer
    gc.collect()
    np.empty(1 << 20).fill(np.nan)
    assert package.bits(y) == bits


def test_a_function_of_the_users_gets_the_users_arrays(package):
    seen = []

    def shared(tokens):
        seen.append(type(tokens))
        return tokens * 2

    x = package.make(X)
    y = pymoe.MoELayer(W1, W2, topk=TOPK, shared_experts=shared)(x, LOGITS)
    assert all(issubclass(kind, package.kind) for kind in seen) and len(seen) == 1
    plain = pymoe.MoELayer(W1, W2, topk=TOPK, shared_experts=lambda tokens: tokens * 2)(X, LOGITS)
    assert package.bits(y) == plain.tobytes()


def test_out_of_pytorch_is_written_and_returned():
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    x, out = torch.from_numpy(X.copy()), torch.full((M, K), float("nan"))
    layer = pymoe.MoELayer(W1, W2, topk=TOPK)
    assert layer(x, LOGITS, out=out) is out
    assert (out.numpy() == layer(X, LOGITS)).all()
    with pytest.raises(pymoe.ArgumentError, match="out must not overlap hidden_states"):
        layer(x, LOGITS, out=x)
    transposed = torch.full((K, M), float("nan")).t()
    assert layer(x, LOGITS, out=transposed) is transposed
    assert (transposed.numpy() == layer(X, LOGITS)).all()


def test_out_of_jax_is_refused():
    jax = pytest.importorskip("jax", reason="jax is not installed", exc_type=ImportError)
    layer = pymoe.MoELayer(W1, W2, topk=TOPK)
    with pytest.raises(pymoe.ArgumentError, match="out must be writeable; got a read-only array"):
        layer(X, LOGITS, out=jax.numpy.zeros((M, K)))


def test_a_traced_array_is_refused_with_its_name():
    jax = pytest.importorskip("jax", reason="jax is not installed", exc_type=ImportError)
    layer = pymoe.MoELayer(W1, W2, topk=TOPK)
    with pytest.raises(pymoe.DTypeError, match="got DynamicJaxprTracer. Use jax.pure_callback"):
        jax.jit(lambda x: layer(x, LOGITS))(X)


@pytest.mark.parametrize("make", [
    lambda torch: torch.zeros(M, K, requires_grad=True),
    lambda torch: torch.nn.Parameter(torch.zeros(M, K)),
    lambda torch: torch.zeros(M, K).to_sparse(),
    lambda torch: torch.zeros(M, K, device="meta"),
    lambda torch: torch.zeros(M, K, dtype=torch.complex64),
    lambda torch: torch.zeros(M, K, dtype=torch.bool),
    lambda torch: torch.zeros(M, K, dtype=torch.float64),
    lambda torch: torch.zeros(M, K).to(torch.float8_e5m2),
])  # fmt: skip
def test_tensors_without_a_plain_view_are_refused_by_name(make):
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    layer = pymoe.MoELayer(W1, W2, topk=TOPK)
    with pytest.raises(pymoe.PymoeError, match="MoELayer: hidden_states must "):
        layer(make(torch), LOGITS)


@pytest.mark.parametrize("view", [np.s_[::2], np.s_[:, ::2], np.s_[1:, 3:]])
def test_strided_views_of_pytorch(view):
    torch = pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)
    whole = RNG.standard_normal((2 * M, 2 * K), dtype=np.float32)
    strided = whole[view][:M, :K]
    tensor = torch.from_numpy(whole)[view][:M, :K]
    layer = pymoe.MoELayer(W1, W2, topk=TOPK)
    y = layer(tensor, LOGITS[: strided.shape[0]])
    assert (y.numpy() == layer(np.ascontiguousarray(strided), LOGITS[: strided.shape[0]])).all()
