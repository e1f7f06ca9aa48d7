"""Calls of a layer on a device that repeat an earlier one's shapes: their launches are queued from a tape."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from pymoe.device import stream
from pymoe.device.arrays import is_cuda
from pymoe.device.tape import Recorder, Tape
from pymoe.environment import is_checked
from pymoe.layer.cpu_tapes import CpuTapes
from pymoe.layer.recordable import overlaps, runs_kernels_only

__all__ = ["Tapes", "tapes_for"]

Array = Any

_MOST = 64
"""Tapes that a layer keeps; each holds a few small arrays, and the parameters of its launches."""
_UNSEEN: Any = object()
_BYTES = 16
"""Kernels choose their loads and stores by this alignment, and tapes only know what they chose."""


class _Entry(NamedTuple):
    tape: Tape | None
    memory: Any
    """The workspace that its launches use; another one, or a larger one, makes the tape void."""
    ids: Array


class Tapes:
    """The tapes of one layer, by what its calls' arrays are, and the stream.

    Recorded are calls that launch nothing but the kernels of the stages: one chunk, nothing shared, no weights on the
    input.  All others, and the first two of each kind, take the ordinary path, whose checks a tape's kind stands for.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._entries: OrderedDict[Any, _Entry | None] = OrderedDict()

    @staticmethod
    def suit(layer: Any) -> bool:
        """Return whether calls of `layer` can be recorded."""
        return (
            layer.device == "cuda"
            and runs_kernels_only(layer)
            # A bias in host memory may be changed by its owner; the ordinary path looks at it in every call.
            and (layer.routing.e_score_correction_bias is None or is_cuda(layer.routing.e_score_correction_bias))
        )

    def call(self, arrays: tuple[Array | None, ...], out: Array | None) -> Array | None:
        """Return the answer of a call with (tokens, logits, weights, ids), or None where no tape knows it."""
        key = self._key(arrays, out)
        if key is None or is_checked():
            return None
        entry = self._entries.get(key, _UNSEEN)
        if entry is _UNSEEN:
            self._remember(key, None)
            return None
        x: Any = arrays[0]
        target = _empty_like(x) if out is None else out
        given = [array for array in (*arrays, target) if array is not None]
        if out is not None and self._overlaps(given):
            return None
        if entry is None:
            return self._record(key, arrays, given, target)
        if entry.tape is None:
            return None
        with self._layer._kernel(x.dtype)[0].impl.workspaces.current() as workspace:
            if workspace.memory is not entry.memory:
                self._remember(key, None)
                return None
            entry.tape.play([array.data.ptr for array in given], *key[0][:2])
            if arrays[3] is not None:
                entry.ids.data.copy_from_device_async(arrays[3].data, arrays[3].nbytes)
        self._layer._routed, self._layer._last_load = entry.ids, None
        return target

    def _record(self, key: Any, arrays: tuple[Array | None, ...], given: list[Array], target: Array) -> Array:
        """Run the ordinary path and keep its launches; the answer is right either way."""
        recorder, layer = Recorder(given), self._layer
        workspaces = layer._kernel(target.dtype)[0].impl.workspaces
        with workspaces.current() as workspace:
            before = workspace.memory
        with recorder.active():
            _, ids = layer._compute(*arrays, out=target)
        layer._routed, layer._last_load = ids, None
        with workspaces.current() as workspace:
            # Another thread may have made the workspace grow on the way: then nobody knows which one was recorded.
            if workspace.memory is before:
                self._remember(key, _Entry(recorder.tape(), before, ids))
        return target

    def _remember(self, key: Any, entry: _Entry | None) -> None:
        self._entries[key] = entry
        while len(self._entries) > _MOST:
            self._entries.popitem(last=False)

    def _key(self, arrays: tuple[Array | None, ...], out: Array | None) -> Any:
        """Return what decides the launches of a call, or None where a tape would not do."""
        where, _ = stream.current_stream()
        key: list[Any] = [where]
        for x in (*arrays, out):
            if x is None:
                key.append(None)
                continue
            if not is_cuda(x) or x.ndim != 2 or not x.flags.c_contiguous or x.data.ptr % _BYTES or x.size == 0:
                return None
            key.append((x.shape, x.dtype, x.data.device_id))
        M = arrays[0].shape[0]  # type: ignore[union-attr]
        layer = self._layer
        if key[1][2] != where[0] or M > layer._kernel(key[1][1])[0].impl.chunk_size:
            return None
        weights = arrays[2]
        return None if weights is not None and weights.dtype != np.float32 else tuple(key)

    def _overlaps(self, given: list[Array]) -> bool:
        """Return whether the last array shares memory with another or a weight; the ordinary path says which."""
        *inputs, out = [
            (x.data.ptr, x.data.ptr + x.nbytes) for x in (*given[:-1], self._layer._w1, self._layer._w2, given[-1])
        ]
        return overlaps(inputs, out)


def _empty_like(x: Array) -> Array:
    import cupy

    return cupy.empty(x.shape, x.dtype)


def tapes_for(layer: Any) -> Tapes | CpuTapes | None:
    """Return the tapes of a layer, None where its calls cannot be recorded."""
    for kind in (Tapes, CpuTapes):
        if kind.suit(layer):
            return kind(layer)
    return None
