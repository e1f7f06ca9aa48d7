"""DLPack for the dtypes that NumPy and CuPy do not exchange: bfloat16, fp8 and e8m0 cross as integers of their width.

Both libraries refuse a capsule whose type code they do not know.  So the code in the capsule is rewritten to the
unsigned integer of the same width on the way in, and back on the way out; the bytes are shared, never copied, and the
producer's own ordering between streams stays in force.

Source: DLPack 1.1, ``dlpack.h`` (``DLManagedTensor``, ``DLManagedTensorVersioned``, ``DLDataTypeCode``).
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["Lent", "Renamed", "dtype_name"]

_UNSIGNED = 1
_CODES = {
    "bfloat16": 4, "float8_e3m4": 7, "float8_e4m3": 8, "float8_e4m3b11fnuz": 9, "float8_e4m3fn": 10,
    "float8_e4m3fnuz": 11, "float8_e5m2": 12, "float8_e5m2fnuz": 13, "float8_e8m0fnu": 14, "float6_e2m3fn": 15,
    "float6_e3m2fn": 16, "float4_e2m1fn": 17,
}  # fmt: skip
_NAMES = {code: name for name, code in _CODES.items()}


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32 * 2),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


def _tensor_of(capsule: Any) -> _Tensor:
    """Return the tensor inside a capsule that nobody has consumed yet, as memory that can be edited."""
    api = ctypes.pythonapi
    api.PyCapsule_IsValid.argtypes = api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    if api.PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        return _Versioned.from_address(api.PyCapsule_GetPointer(capsule, b"dltensor_versioned")).tensor
    return _Tensor.from_address(api.PyCapsule_GetPointer(capsule, b"dltensor"))


def dtype_name(producer: Any) -> str | None:
    """Return the ml_dtypes name of the dtype that `producer` exports, or None where NumPy has it too."""
    # Type codes from float4 on pack several numbers a byte; the name alone says enough to refuse them.
    name = str(getattr(producer, "dtype", "")).rpartition(".")[2].removesuffix("_x2")
    return name if name in _CODES else None


class Renamed:
    """A producer whose capsule says "unsigned integer" where its dtype is one of those above.

    `renamed` is the dtype's name once a consumer has taken the capsule, None where nothing had to be rewritten.
    """

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.renamed: str | None = None

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._producer.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._producer.__dlpack__(**options)
        dtype = _tensor_of(capsule).dtype
        if dtype.code in _NAMES:
            self.renamed = _NAMES[dtype.code]
            dtype.code = _UNSIGNED
        return capsule


class Lent:
    """An array of ours for a consumer that knows bfloat16 and fp8: exported as integers, then renamed.

    Parameters
    ----------
    array : numpy.ndarray or cupy.ndarray
        Kept alive until the consumer lets go of the capsule.
    """

    def __init__(self, array: Any) -> None:
        self._name = array.dtype.name if array.dtype.name in _CODES else None
        self._raw = array if self._name is None else array.view(f"uint{8 * array.dtype.itemsize}")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._raw.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._raw.__dlpack__(**options)
        if self._name is not None:
            _tensor_of(capsule).dtype.code = _CODES[self._name]
        return capsule


def from_unsigned(raw: Any, name: str | None) -> Any:
    """Return a NumPy array under the dtype that its integers stand for."""
    return raw if name is None else raw.view(np.dtype(getattr(ml_dtypes, name)))
