"""The GPU's experts on the host: all kernels between tokens and answer, compiled by g++, against the CPU's experts."""

from __future__ import annotations

import numpy as np
import pytest

import pymoe
from pymoe import CudaBatchedExperts, CudaGroupedExperts
from pymoe.config import FusedMoEConfig
from pymoe.contracts import ExpertTokensMetadata
from pymoe.ops.quantize import quantize_activations
from pymoe.quantization import FUSED_MOE_UNQUANTIZED_CONFIG
from tests.emulator import emulator, sm90
from tests.experts.test_pairs import SCHEMES, E, problem
from tests.ops.devices import emulation
from tests.selection import BF16, selection

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not emulator.AVAILABLE, reason="g++ is not installed"),
]


def memory(nbytes, fill):
    """Return aligned memory that holds what an earlier owner left."""
    whole = np.full(nbytes + 256, fill, np.uint8)
    start = -whole.ctypes.data % 256
    return whole[start : start + nbytes]


def run(config, quant_config, x, w1, w2, weights, ids, expert_map=None, fill=0xFF, device=emulation):
    """Run `CudaGroupedExperts` as the kernel would, in workspaces of exactly the size that they ask for."""
    experts = CudaGroupedExperts(config, quant_config)
    number = w1.shape[0] if expert_map is None else len(expert_map)
    sizes = experts.workspace_shapes(
        len(x), w1.shape[1], x.shape[1], ids.shape[1], number, w1.shape[0], None, config.activation
    )
    out = np.full(x.shape, np.nan, x.dtype)
    with device():
        a, scale = x, None
        if quant_config.quant_dtype is not None:
            a, scale = quantize_activations(x, quant_config, "a1")
        experts.apply(
            out, a, w1, w2, weights, ids, config.activation, number, expert_map, scale, None,
            memory(sizes[0][0], fill), memory(sizes[1][0], fill), None, False,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_pair_agrees_with_the_cpu(scheme):
    p = problem(scheme, dtype=BF16, biases=True)
    expected = pymoe.fused_experts(
        p.x, p.w1, p.w2, p.scale, p.ids, quant_config=p.quant_config, activation=p.activation
    ).astype(np.float64)
    y = run(p.config(device="cuda"), p.quant_config, p.x, p.w1, p.w2, p.scale, p.ids)
    limit = 2e-2 if scheme == "fp32" or scheme.endswith(("a16", "a16_zp")) else 3e-2
    assert np.abs(y.astype(np.float64) - expected).max() <= limit * np.abs(expected).max()
    again = run(p.config(device="cuda"), p.quant_config, p.x, p.w1, p.w2, p.scale, p.ids, fill=0x7F)
    np.testing.assert_array_equal(y.view(np.uint16), again.view(np.uint16))


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("M, K, width, number, topk", [(1, 64, 64, 3, 2), (40, 64, 32, 5, 3), (9, 33, 17, 4, 2)])
def test_the_exact_oracle(M, K, width, number, topk, dtype):
    for mapped in (False, True):
        given = selection(M, K, width, number, topk, dtype=dtype, mapped=mapped)
        config = FusedMoEConfig(number, topk, K, width, given.w1.shape[0], in_dtype=given.x.dtype, device="cuda")
        y = run(
            config, FUSED_MOE_UNQUANTIZED_CONFIG, given.x, given.w1, given.w2, given.topk_weights, given.topk_ids,
            given.expert_map,
        )  # fmt: skip
        np.testing.assert_array_equal(y, given.expected())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("fill", [0xFF, 0x7F])
@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_sm90a_copies_rows_together_first(mapped, fill, dtype):
    """In the memory of the routed rows and a workspace of the size asked for, with the portable path's bits."""
    given = selection(60, 64, 32, 5, 3, dtype=dtype, mapped=mapped)
    config = FusedMoEConfig(5, 3, 64, 32, given.w1.shape[0], in_dtype=given.x.dtype, device="cuda")
    operands = (given.x, given.w1, given.w2, given.topk_weights, given.topk_ids, given.expert_map)
    y = run(config, FUSED_MOE_UNQUANTIZED_CONFIG, *operands, fill=fill, device=sm90.emulation)
    np.testing.assert_array_equal(y, given.expected())
    portable = run(config, FUSED_MOE_UNQUANTIZED_CONFIG, *operands, fill=fill)
    np.testing.assert_array_equal(y.view(np.uint16), portable.view(np.uint16))


@pytest.mark.parametrize("scheme", ["fp32", "fp8_w8a8_block", "int8_w8a8_tensor", "mxfp4_w4a16"])
def test_slabs_equal_rows(scheme):
    """Each expert's tokens in a slab of its own give GEMM2's rows of the standard format, and touch no other row."""
    p = problem(scheme, dtype=BF16)
    slab_rows, config = 16, p.config(device="cuda")
    tokens = [np.flatnonzero((p.ids == e).any(axis=1)) for e in range(E)]
    counts = np.array([len(t) for t in tokens], np.int32)
    a, scale = p.x, None
    if p.quant_config.quant_dtype is not None:
        a, scale = quantize_activations(p.x, p.quant_config, "a1", live=(p.ids >= 0).any(axis=1))
    slabs = np.zeros((E, slab_rows, a.shape[1]), a.dtype)
    scales = scale
    if scale is not None and scale.size > 1:
        scales = np.ones((E, slab_rows, scale.shape[1]), scale.dtype)
    for e, mine in enumerate(tokens):
        slabs[e, : len(mine)] = a[mine]
        if scales is not None and scales.ndim == 3:
            scales[e, : len(mine)] = scale[mine]
    experts = CudaBatchedExperts(config, p.quant_config, slab_rows, 1)
    sizes = experts.workspace_shapes(slab_rows, p.w1.shape[1], p.x.shape[1], 3, E, E, None, p.activation)
    out = np.full(sizes[2], np.nan, np.float32)
    with emulation():
        experts.apply(
            out, slabs, p.w1, p.w2, p.scale, p.ids, p.activation, E, None, scales, None, memory(0, 0),
            memory(sizes[1][0], 0xFF), ExpertTokensMetadata(counts), False,
        )  # fmt: skip
    y = np.zeros(p.x.shape)
    for e, mine in enumerate(tokens):
        assert np.isfinite(out[e, : len(mine)]).all() and np.isnan(out[e, len(mine) :]).all()
        weight = np.where(p.ids == e, p.scale, 0).sum(axis=1)
        y[mine] += weight[mine, None] * out[e, : len(mine)]
    expected = run(config, p.quant_config, p.x, p.w1, p.w2, p.scale, p.ids).astype(np.float64)
    assert np.abs(y - expected).max() <= 1e-2 * np.abs(expected).max()
