"""Arrays that come and go by DLPack, without any other library: our own exporter is the foreign producer."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest

import pymoe
from pymoe.device.arrays import as_array, as_given
from pymoe.device.dlpack import Lent, Renamed
from pymoe.errors import DTypeError, UnsupportedError


class Tensor:
    """What another library's array looks like from outside."""

    def __init__(self, array, requires_grad=False):
        self.array, self.dtype, self.requires_grad = array, f"foreign.{array.dtype.name}", requires_grad

    def __dlpack_device__(self):
        return Lent(self.array).__dlpack_device__()

    def __dlpack__(self, **options):
        return Lent(self.array).__dlpack__(**options)


NARROW = ["bfloat16", "float8_e4m3fn", "float8_e8m0fnu"]


def every_code(dtype):
    bits = 8 * np.dtype(getattr(ml_dtypes, dtype)).itemsize
    return np.arange(2**bits, dtype=f"uint{bits}").view(getattr(ml_dtypes, dtype)).reshape(16, -1)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("view", [np.s_[:], np.s_[::-3, 1::2], np.s_[:0], np.s_[3:4, 5:6]])
def test_narrow_floats_come_in_bit_for_bit_with_their_strides(dtype, view):
    array = every_code(dtype)[view]
    found = as_array("call", "x", Tensor(array))
    assert found.dtype == array.dtype and found.shape == array.shape
    assert found.tobytes() == array.tobytes()
    assert array.size == 0 or np.shares_memory(found, array)


@pytest.mark.parametrize("dtype", [*NARROW, "float8_e5m2"])
def test_narrow_floats_go_out_under_their_own_code(dtype):
    array = every_code(dtype)
    renamed = Renamed(Tensor(array))
    raw = np.from_dlpack(renamed)
    assert renamed.renamed == dtype and raw.tobytes() == array.tobytes() and np.shares_memory(raw, array)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool"])
def test_dtypes_that_numpy_exchanges_itself_are_left_alone(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    renamed = Renamed(Tensor(array))
    assert np.from_dlpack(renamed).dtype == array.dtype and renamed.renamed is None


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fnuz", "float8_e3m4", "float4_e2m1fn"])
def test_formats_that_pymoe_does_not_compute_in_are_refused_by_name(dtype):
    array = np.zeros((2, 2), getattr(ml_dtypes, dtype))
    with pytest.raises(UnsupportedError, match=f"x must be e4m3fn where it is fp8; got {dtype}"):
        as_array("call", "x", Tensor(array))


def test_a_tensor_that_needs_gradients_is_refused_with_the_remedy():
    with pytest.raises(DTypeError, match=r"x must need no gradient.*requires_grad\. Use x\.detach\(\)"):
        as_array("call", "x", Tensor(np.zeros((2, 2), np.float32), requires_grad=True))


def test_memory_lives_as_long_as_either_side_needs_it():
    owner = np.arange(64, dtype=np.uint16)
    bits, alive = owner.copy(), weakref.ref(owner)
    found = as_array("call", "x", Tensor(owner.view(ml_dtypes.bfloat16)))
    del owner
    gc.collect()
    assert alive() is not None and (found.view(np.uint16) == bits).all()
    del found
    gc.collect()
    assert alive() is None


def test_ten_thousand_exchanges_leak_nothing():
    array = np.zeros((64, 64), ml_dtypes.bfloat16)
    alive = weakref.ref(array)
    for _ in range(10_000):
        np.from_dlpack(Renamed(Tensor(as_array("call", "x", Tensor(array)))))
    del array
    gc.collect()
    assert alive() is None


def test_an_unknown_producer_gets_numpy_back():
    x = np.eye(4, dtype=np.float32)
    w1, w2 = np.ones((2, 6, 4), np.float32), np.ones((2, 4, 3), np.float32)
    weights, ids = np.ones((4, 1), np.float32), np.array([[0], [1], [-1], [1]])
    plain = pymoe.fused_experts(x, w1, w2, weights, ids)
    mixed = pymoe.fused_experts(Tensor(x), Tensor(w1), w2, Tensor(weights), Tensor(ids))
    assert type(mixed) is np.ndarray and (mixed == plain).all()
    assert as_given(plain, Tensor(x)) is plain
