"""Short calls of a layer on the CPU that repeat an earlier one's shapes: their kernels run from a tape."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from pymoe.device.cpu_tape import CpuRecorder, CpuTape
from pymoe.environment import cpu_kernels, is_checked
from pymoe.layer.recordable import overlaps, runs_kernels_only

__all__ = ["CpuTapes"]

Array = Any

_MOST = 64
"""Kinds of calls that a layer remembers."""
_WORKSPACE_BYTES = 1 << 24
"""Of the tapes of a layer together: each has its own."""
_MOST_BYTES = 1 << 28
"""Of weights that a taped call reads: some 10 ms, in which Python does not see an interrupt."""
_UNSEEN: Any = object()


class _Entry(NamedTuple):
    tape: CpuTape | None
    """None where calls of this kind take the ordinary path for good."""
    ids: Array | None = None
    is_proved: bool = False
    nbytes: int = 0


def _is_plain(x: Any) -> bool:
    """Return whether `x` is a matrix that kernels take as it lies in memory."""
    return type(x) is np.ndarray and x.ndim == 2 and x.size > 0 and x.flags.c_contiguous and x.flags.aligned


class CpuTapes:
    """The tapes of one layer, by what its calls' arrays are.

    Recorded are calls in which every slot has a row and nothing but the stages' own kernels computes.  The first call
    of each kind takes the ordinary path, whose checks a tape's kind stands for; the second records; the third plays
    the tape beside the ordinary path, and a tape whose bits differ is dropped.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._entries: OrderedDict[Any, _Entry | None] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def suit(layer: Any) -> bool:
        """Return whether calls of `layer` can be recorded."""
        return (
            layer.device == "cpu"
            and runs_kernels_only(layer)
            and layer._expert_map is None
            # Its owner may change a bias; the ordinary path looks at it in every call.
            and layer.routing.e_score_correction_bias is None
        )

    def call(self, arrays: tuple[Array | None, ...], out: Array | None) -> Array | None:
        """Return the answer of a call with (tokens, logits, weights, ids), or None where no tape knows it."""
        key = self._key(arrays, out)
        if key is None:
            return None
        entry = self._entries.get(key, _UNSEEN)
        if entry is _UNSEEN:
            self._remember(key, None)
            return None
        if entry is not None and entry.tape is None:
            return None
        target = np.empty_like(arrays[0]) if out is None else out
        given = [array for array in (*arrays, target) if array is not None]
        if out is not None and self._overlaps(given):
            return None
        if entry is None:
            return self._record(key, arrays, given, target)
        if not entry.is_proved:
            return self._prove(key, entry, arrays, given, target)
        ids = entry.tape.play([array.ctypes.data for array in given], entry.ids)
        if ids is None:
            return None
        self._layer._routed, self._layer._last_load = ids, None
        return target

    def _record(self, key: Any, arrays: tuple[Array | None, ...], given: list[Array], target: Array) -> Array:
        """Run the ordinary path and keep its kernels; the answer is right either way."""
        recorder = CpuRecorder(given)
        with recorder.active():
            ids = self._compute(arrays, target)
        tape = recorder.tape()
        known = _Entry(None) if tape is None else _Entry(tape, ids, nbytes=self._workspace_bytes(len(target)))
        self._remember(key, known)
        return target

    def _prove(self, key: Any, entry: _Entry, arrays: Any, given: list[Array], target: Array) -> Array:
        """Run both; the tape's answer must be the ordinary path's."""
        played = np.empty_like(target)
        assert entry.tape is not None
        ids = entry.tape.play([array.ctypes.data for array in (*given[:-1], played)], entry.ids)
        expected_ids = self._compute(arrays, target)
        if ids is None:
            return target
        is_right = played.tobytes() == target.tobytes() and np.array_equal(ids, expected_ids)
        self._remember(key, entry._replace(is_proved=True) if is_right else _Entry(None))
        return target

    def _compute(self, arrays: Any, target: Array) -> Array:
        layer = self._layer
        _, ids = layer._compute(*arrays, out=target)
        layer._routed, layer._last_load = ids, None
        return ids

    def _remember(self, key: Any, entry: _Entry | None) -> None:
        with self._lock:
            self._entries[key] = entry
            self._entries.move_to_end(key)
            used = sum(entry.nbytes for entry in self._entries.values() if entry is not None)
            while len(self._entries) > _MOST or used > _WORKSPACE_BYTES:
                _, dropped = self._entries.popitem(last=False)
                used -= 0 if dropped is None else dropped.nbytes

    def _workspace_bytes(self, M: int) -> int:
        """Return what a tape for M tokens keeps: the rows of both GEMMs and of the intermediate, in float32."""
        layer = self._layer
        return int(4 * M * layer.topk * (layer._w1.shape[1] + layer.K + layer.I))

    def _key(self, arrays: tuple[Array | None, ...], out: Array | None) -> Any:
        """Return what decides the kernels of a call, or None where a tape would not do."""
        x: Any = arrays[0]
        _, logits, _, ids = arrays
        layer = self._layer
        if ids is not None or is_checked():
            return None
        if not all(array is None or _is_plain(array) for array in (x, logits, out)):
            return None
        if (logits is not None and logits.dtype != np.float32) or (out is not None and not out.flags.writeable):
            return None
        experts, slots = layer.num_experts, x.shape[0] * layer.topk
        if min(experts, slots) * ((layer._w1.nbytes + layer._w2.nbytes) // experts) > _MOST_BYTES:
            return None
        if self._workspace_bytes(x.shape[0]) > _WORKSPACE_BYTES // 2:
            return None
        given = logits if logits is None else logits.shape
        return x.shape, x.dtype, given, None if out is None else (out.shape, out.dtype), cpu_kernels()

    def _overlaps(self, given: list[Array]) -> bool:
        """Return whether the last array shares memory with another or a weight; the ordinary path says which."""
        *inputs, out = [
            (x.ctypes.data, x.ctypes.data + x.nbytes)
            for x in (*given[:-1], self._layer._w1, self._layer._w2, given[-1])
        ]
        return overlaps(inputs, out)
