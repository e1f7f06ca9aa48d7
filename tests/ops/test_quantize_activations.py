"""quantize_activations, and what all quantizers promise: rows apart, NaN in its row, no warning, any strides."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe import environment
from pymoe.ops.quantize import _matrices
from pymoe.ops.quantize import dequantize_activations as dequantize_stage
from pymoe.ops.quantize import quantize_activations as quantize_stage
from pymoe.quantization import QUANT_KEYS, FusedMoEQuantConfig
from tests.codec import definitions
from tests.codec.keys import SEED, special_rows
from tests.ops import devices

quantize, dequantize, quantize_activations, dequantize_activations = map(
    devices.staged, (pymoe.quantize, pymoe.dequantize, quantize_stage, dequantize_stage)
)

BF16 = ml_dtypes.bfloat16


@pytest.fixture(params=devices.BACKENDS)
def backend(request, monkeypatch):
    """Every call of the test takes this backend."""
    if request.param in devices.ON_DEVICE:
        monkeypatch.setattr(devices, "current", request.param)
    else:
        kernels = _matrices.kernels
        monkeypatch.setattr(_matrices, "kernels", lambda _: kernels(request.param))
    return request.param


# -- activations of a config --


def config_of(scheme, **kwargs):
    w1, w2 = np.ones((1, 32, 64), np.float32), np.ones((1, 64, 32), np.float32)
    return pymoe.quantize_experts(w1, w2, scheme, **kwargs)[2]


ACTIVATIONS = {
    "fp8_w8a8": ("kFp8DynamicTokenSym", (7, 1)),
    "fp8_w8a8_tensor": ("kFp8DynamicTensorSym", (1,)),
    "fp8_w8a8_block": ("kFp8Dynamic128Sym", (7, 2)),
    "fp8_w8a8_block_ue8m0": ("kFp8Dynamic128E8M0Sym", (7, 2)),
    "int8_w8a8": ("kInt8DynamicTokenSym", (7, 1)),
    "int8_w8a8_tensor": ("kInt8DynamicTensorSym", (1,)),
    "int8_w8a8_block": ("kInt8Dynamic128Sym", (7, 2)),
    "mxfp8": ("kMxfp8Dynamic", (7, 5)),
    "mxfp4": ("kMxfp4Dynamic", (7, 5)),
    "nvfp4": ("kNvfp4Dynamic", (7, 10)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("scheme", ACTIVATIONS)
def test_activations_are_those_of_the_key(scheme, dtype, backend):
    name, shape = ACTIVATIONS[scheme]
    x = np.random.default_rng(SEED).standard_normal((7, 160)).astype(dtype)
    codes, scale = quantize_activations(x, config_of(scheme))
    want, want_scale = quantize(x, name)
    want_scale = want_scale[0] if isinstance(want_scale, tuple) else want_scale
    np.testing.assert_array_equal(codes, want)
    np.testing.assert_array_equal(scale, want_scale)
    assert scale.shape == shape and scale.dtype == want_scale.dtype
    np.testing.assert_array_equal(
        dequantize_activations(codes, scale, config_of(scheme)), dequantize(codes, scale, name)
    )


@pytest.mark.parametrize("scheme", ["fp8_w8a8_tensor", "int8_w8a8_tensor"])
def test_only_live_rows_enter_a_shared_scale(scheme, backend):
    x = np.random.default_rng(SEED).standard_normal((6, 64)).astype(np.float32)
    x[2] *= 1e6
    x[4, 3] = np.nan
    live = np.array([True, True, False, True, False, True])
    config = config_of(scheme)
    codes, scale = quantize_activations(x, config, live=live)
    want, want_scale = quantize_activations(x[live], config)
    np.testing.assert_array_equal(codes[live], want)
    np.testing.assert_array_equal(scale, want_scale)
    codes, scale = quantize_activations(x, config, live=np.zeros(6, bool))
    assert np.isfinite(scale).all() and scale > 0
    assert codes.shape == x.shape


def test_static_scale_of_the_call_wins_over_that_of_the_config(backend):
    ones = np.ones(1, np.float32)
    config = FusedMoEQuantConfig.fp8_w8a8(w1_scale=ones, w2_scale=ones, a1_scale=ones, a2_scale=2 * ones)
    x = np.full((1, 4), 4, np.float32)
    for which, given, scale in (("a1", None, 1), ("a2", None, 2), ("a2", 4 * ones, 4)):
        codes, back = quantize_activations(x, config, which, scale=given)
        assert back.tolist() == [scale] and dequantize_activations(codes, back, config).tolist() == x.tolist()
        assert codes[0, 0] == definitions.e4m3(4 / scale)


# -- promises --


@pytest.mark.parametrize("scheme", [s for s in ACTIVATIONS if "tensor" not in s])
def test_rows_do_not_depend_on_other_rows_or_threads(scheme, backend, monkeypatch):
    x = np.random.default_rng(SEED).standard_normal((2500, 160)).astype(BF16)  # several blocks of a thread's size
    config = config_of(scheme)
    codes, scale = quantize_activations(x, config)
    for threads in (1, 3):
        monkeypatch.setattr(environment, "num_threads", lambda threads=threads: threads)
        again, again_scale = quantize_activations(x, config)
        np.testing.assert_array_equal(again, codes)
        np.testing.assert_array_equal(again_scale, scale)
    for row in (0, 1237, 2499):
        one, one_scale = quantize_activations(x[row : row + 1], config)
        np.testing.assert_array_equal(one[0], codes[row])
        np.testing.assert_array_equal(one_scale[0], scale[row])


@pytest.mark.parametrize("name", [name for name in QUANT_KEYS if "Block" not in name])
def test_nan_stays_in_its_row(name, backend):
    x = np.random.default_rng(SEED).standard_normal((4, 64)).astype(np.float32)
    bad = x.copy()
    bad[1, 5] = np.nan
    bad[1, 6] = np.abs(x).max()  # so that a scale shared by all rows is unchanged
    x[1, 6] = bad[1, 6]
    good, dirty = dequantize(*quantize(x, name), name), dequantize(*quantize(bad, name), name)
    rows = [0, 2, 3]
    np.testing.assert_array_equal(dirty[rows], good[rows])
    if "Int8" in name and "Tensor" in name:
        assert dirty[1, 5] == 0
    else:
        assert np.isnan(dirty[1, 5])


@pytest.mark.parametrize("name", QUANT_KEYS)
def test_no_warning_whatever_the_error_state_and_inputs_stay(name, backend):
    x = special_rows()
    x.setflags(write=False)
    kept = x.copy()
    with np.errstate(all="raise"):
        codes, scale = quantize(x, name)
        values = dequantize(codes, scale, name, dtype=np.float16)
        assert np.geterr()["over"] == "raise"
    np.testing.assert_array_equal(x, kept)
    assert values.dtype == np.float16
    for array in (codes, *(scale if isinstance(scale, tuple) else (scale,))):
        assert not np.shares_memory(array, x)


@pytest.mark.parametrize("view", ["transposed", "strided", "broadcast", "float64"])
@pytest.mark.parametrize("name", ["kFp8DynamicTokenSym", "kInt4Static", "kNvfp4Dynamic"])
def test_any_strides_and_float64(name, view, backend):
    rng = np.random.default_rng(SEED)
    x = {
        "transposed": lambda: rng.standard_normal((64, 6)).astype(np.float32).T,
        "strided": lambda: rng.standard_normal((12, 192)).astype(np.float32)[::-2, ::3],
        "broadcast": lambda: np.broadcast_to(rng.standard_normal(64).astype(np.float32), (6, 64)),
        "float64": lambda: rng.standard_normal((6, 64)),
    }[view]()
    plain = np.ascontiguousarray(x, np.float32)
    np.testing.assert_array_equal(quantize(x, name)[0], quantize(plain, name)[0])


@pytest.mark.parametrize("name", QUANT_KEYS)
def test_A3_no_rows_and_no_matrices(name, backend):
    for shape in ((0, 64), (0, 4, 64), (2, 0, 64)):
        codes, scale = quantize(np.empty(shape, np.float32), name)
        assert codes.shape[:-1] == shape[:-1]
        assert dequantize(codes, scale, name).shape == shape


# -- rows of which only the device knows how many are live --


@pytest.fixture(params=devices.DEVICES)
def counted(request):
    """Return a caller of `quantize_activations` whose arrays all begin as bytes 0x55."""

    def call(x, config, live_rows):
        if request.param == "cuda":
            import cupy

            return devices.staged(quantize_stage)(
                x, config, live_rows=live_rows, empty=lambda s, d: cupy.full(s, 0x55, np.uint8).view(d)
                if np.dtype(d).itemsize == 1 else cupy.full(s, 0x55555555, np.uint32).view(d), backend="cuda",
            )  # fmt: skip
        return devices.staged(quantize_stage)(
            x, config, live_rows=live_rows, empty=lambda s, d: np.frombuffer(
                bytearray(b"\x55" * (int(np.prod(s)) * np.dtype(d).itemsize)), d).reshape(s), backend="emulated",
        )  # fmt: skip

    return call


@pytest.mark.parametrize("counts", [[5], [0], [12], [2, 0, 4], [4, 1, 3]])
@pytest.mark.parametrize("scheme", ACTIVATIONS)
def test_rows_beyond_the_counts_are_neither_read_nor_written(scheme, counts, counted):
    x = np.random.default_rng(SEED).standard_normal((12, 160)).astype(np.float32)
    slab = 12 // len(counts)
    live = np.concatenate([np.arange(slab) < n for n in counts])
    x[~live] = np.nan
    config = config_of(scheme)
    codes, scale = counted(x, config, np.array(counts, np.int32))
    want, want_scale = quantize_stage(x[live], config)
    np.testing.assert_array_equal(codes[live], want)
    assert (codes[~live].view(np.uint8) == 0x55).all()
    if scale.shape == (1,):
        np.testing.assert_array_equal(scale, want_scale)
    else:
        np.testing.assert_array_equal(scale[live], want_scale)
        assert (np.ascontiguousarray(scale[~live]).view(np.uint8) == 0x55).all()


def test_counts_belong_to_a_device():
    with pytest.raises(pymoe.ArgumentError, match="live_rows must be None for arrays in host memory"):
        quantize_stage(np.ones((2, 64), np.float32), config_of("mxfp8"), live_rows=np.ones(1, np.int32))
