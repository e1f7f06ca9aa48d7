"""A reader of safetensors files that trusts nothing in them: memory-mapped, read-only, never unpickled or executed.

Format: 8 bytes little-endian header length, a JSON header of ``name -> {dtype, shape, data_offsets}``, then the data.
Every number is checked in Python integers, which do not wrap, before a byte of the data is touched.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pymoe.errors import CheckpointError, complaint

__all__ = ["SafetensorsFile", "SafetensorsFolder"]

Array = Any

MAX_HEADER_BYTES = 100_000_000
"""Cap of the format's own reference implementation."""
MAX_INDEX_BYTES = 100_000_000

_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U64": np.dtype("uint64"),
    "U32": np.dtype("uint32"),
    "U16": np.dtype("uint16"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def fail(file: Path, rule: str, value: object, remedy: str = "") -> CheckpointError:
    """Return the error that names the file, the rule and what was found."""
    return CheckpointError(complaint("checkpoint", str(file), rule, value, remedy))


class SafetensorsFile:
    """One file: names, shapes and dtypes at once, the numbers when they are asked for.

    Parameters
    ----------
    path : path
        A regular file.

    Raises
    ------
    CheckpointError
        Anything about the header that the format forbids; names the file and the tensor.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix != ".safetensors":
            remedy = "Convert it first; pymoe unpickles nothing"
            raise fail(self.path, "be a .safetensors file", self.path.suffix or "no suffix", remedy)
        try:
            with open(self.path, "rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(0)
                header, self._data_start = self._read_header(stream, size)
        except OSError as error:
            raise fail(self.path, "be a readable file", error.strerror or error) from None
        self._entries = self._check(header, size - self._data_start)
        self._map: mmap.mmap | None = None

    def _read_header(self, stream: Any, size: int) -> tuple[dict[str, Any], int]:
        if size < 8:
            raise fail(self.path, "hold the 8 bytes of the header's length", f"{size} bytes")
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES or length > size - 8:
            rule = f"have a header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes"
            raise fail(self.path, rule, length)
        text = stream.read(length)
        if not text.startswith(b"{"):
            raise fail(self.path, "have a header that starts with '{'", repr(text[:1]))
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=self._no_duplicates, parse_constant=_refuse)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise fail(self.path, "have a header of JSON in UTF-8", error) from None
        return header, 8 + length

    def _no_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise fail(self.path, "name every key once", repr(twice))
        return dict(pairs)

    def _check(self, header: dict[str, Any], data_bytes: int) -> dict[str, _Entry]:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise fail(self.path, "have string metadata", repr(metadata)[:80])
        entries = {name: self._entry(name, fields, data_bytes) for name, fields in header.items()}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                rule = f"store tensors without holes or overlaps: {name} must start at {at}"
                raise fail(self.path, rule, entry.start)
            at = entry.stop
        if at != data_bytes:
            raise fail(self.path, f"hold {at} bytes of tensors", data_bytes)
        return entries

    def _entry(self, name: str, fields: Any, data_bytes: int) -> _Entry:
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            rule = f"give {name} a dtype, a shape and data_offsets, no more"
            raise fail(self.path, rule, repr(fields)[:80])
        dtype = _DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
        if dtype is None:
            raise fail(self.path, f"give {name} a dtype among {', '.join(_DTYPES)}", repr(fields["dtype"])[:80])
        shape, offsets = fields["shape"], fields["data_offsets"]
        if not _naturals(shape) or len(shape) > 8:
            raise fail(self.path, f"give {name} a shape of at most 8 whole numbers", repr(shape)[:80])
        if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
            rule = f"give {name} two rising offsets within the {data_bytes} bytes of data"
            raise fail(self.path, rule, repr(offsets)[:80])
        needed = math.prod(shape) * dtype.itemsize
        if offsets[1] - offsets[0] != needed:
            rule = f"give {name} the {needed} bytes of its shape and dtype"
            raise fail(self.path, rule, offsets[1] - offsets[0])
        return _Entry(dtype, tuple(shape), offsets[0], offsets[1])

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor."""
        return self._entries[name].dtype

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        entry = self._entries[name]
        return entry.stop - entry.start

    def __getitem__(self, name: str) -> Array:
        """Return a tensor as a read-only view of the mapped file; its pages are read when they are used."""
        entry = self._entries.get(name)
        if entry is None:
            raise fail(self.path, f"hold the tensor {name}", "no such tensor")
        if entry.start == entry.stop:
            empty = np.empty(entry.shape, entry.dtype)
            empty.flags.writeable = False
            return empty
        if self._map is None:
            try:
                with open(self.path, "rb") as stream:
                    self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise fail(self.path, "stay a readable file", error) from None
        if len(self._map) < self._data_start + entry.stop:
            raise fail(self.path, "keep its length while it is read", f"{len(self._map)} bytes")
        count = math.prod(entry.shape)
        start = self._data_start + entry.start
        if start % entry.dtype.itemsize:
            raw = np.frombuffer(self._map, np.uint8, count * entry.dtype.itemsize, start)
            aligned = raw.copy().view(entry.dtype).reshape(entry.shape)
            aligned.flags.writeable = False
            return aligned
        return np.frombuffer(self._map, entry.dtype, count, start).reshape(entry.shape)


class SafetensorsFolder:
    """All tensors of a checkpoint folder: one ``model.safetensors``, or shards under an index.

    Parameters
    ----------
    folder : path

    Raises
    ------
    CheckpointError
        No such files, a malformed index, or an index that names anything but a file directly in the folder.
    """

    INDEX = "model.safetensors.index.json"
    SINGLE = "model.safetensors"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, SafetensorsFile] = {}
        index = self.folder / self.INDEX
        if index.is_file():
            self._where = self._read_index(index)
        elif (self.folder / self.SINGLE).is_file():
            self._where = {name: self.SINGLE for name in self._file(self.SINGLE)}
        else:
            rule = f"hold {self.SINGLE} or {self.INDEX}"
            found = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else "no folder"
            raise fail(self.folder, rule, str(found)[:200], "Files of pickles (.bin, .pt) are never read")

    def _read_index(self, index: Path) -> dict[str, str]:
        parsed = read_json(index)
        where = parsed.get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise fail(index, "hold a weight_map of file names", type(where).__name__)
        for name, file in where.items():
            if not file or Path(file).name != file or file == ".." or "\\" in file or "\0" in file:
                raise fail(index, f"place {name} in a file directly in its folder", repr(file))
        return where

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            path = self.folder / name
            if path.is_symlink() and not _stays_inside(path, self.folder):
                raise fail(path, "lie in its folder", f"a link to {path.resolve()}")
            self._files[name] = SafetensorsFile(path)
        return self._files[name]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def _owner(self, name: str) -> SafetensorsFile:
        if name not in self._where:
            raise fail(self.folder, f"hold the tensor {name}", "no such tensor")
        file = self._file(self._where[name])
        if name not in file:
            raise fail(file.path, f"hold the tensor {name} that the index places there", "no such tensor")
        return file

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._owner(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor."""
        return self._owner(name).dtype(name)

    def nbytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return self._owner(name).nbytes(name)

    def __getitem__(self, name: str) -> Array:
        """Return a tensor as a read-only view of its mapped file."""
        return self._owner(name)[name]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of reasonable size."""
    try:
        size = path.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise fail(path, f"have at most {MAX_INDEX_BYTES} bytes", size)
        parsed = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise fail(path, "be a readable file", error.strerror or error) from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise fail(path, "be JSON in UTF-8", error) from None
    if not isinstance(parsed, dict):
        raise fail(path, "hold a JSON object", type(parsed).__name__)
    return parsed


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a link ends in the folder, or in the blob store that download caches keep beside their snapshots."""
    target = path.resolve()
    snapshots = folder.resolve().parent
    blobs = snapshots.parent / "blobs" if snapshots.name == "snapshots" else None
    return target.parent == folder.resolve() or target.parent == blobs
