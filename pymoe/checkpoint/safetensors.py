"""A reader of safetensors files that trusts nothing in them: memory-mapped, read-only, never unpickled or executed.

Format: 8 bytes little-endian header length, a JSON header of ``name -> {dtype, shape, data_offsets}``, then the data.
Every number is checked in Python integers, which do not wrap, before a byte of the data is touched.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from pymoe.errors import CheckpointError, complaint

__all__ = ["SafetensorsFile", "SafetensorsFolder"]

Array = Any

MAX_HEADER_BYTES = 100_000_000
"""Cap of the format's own reference implementation."""
MAX_JSON_BYTES = 100_000_000
MAX_JSON_MEMORY = 200_000_000
"""Cap of what parsing may take beyond the file: some 80,000 tensors in one file, 400,000 in an index."""
MAX_ELEMENTS = 2**59
"""Product of the lengths above 0 of a shape, so that NumPy can hold it whatever its dtype, also with a 0 in it."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]{0,199}")
_DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype("complex64"),
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


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def fail(file: Path, rule: str, value: object, remedy: str = "") -> CheckpointError:
    """Return the error that names the file, the rule and what was found."""
    return CheckpointError(complaint("checkpoint", str(file), rule, value, remedy))


def shown(name: str) -> str:
    """Return a name out of a file as text for a message: short, and without control characters."""
    return name if name.isprintable() and 0 < len(name) <= 100 else reprlib.repr(name.encode("ascii", "replace"))


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
        with _open(self.path) as stream:
            self._stamp = _stamp(stream)
            header, self._data_start = self._read_header(stream, self._stamp.size)
        self._entries = self._check(header, self._stamp.size - self._data_start)
        self._map: mmap.mmap | None = None

    def _read_header(self, stream: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
        if size < 8:
            raise fail(self.path, "hold the 8 bytes of the header's length", f"{size} bytes")
        length = int.from_bytes(stream.read(8), "little")
        if length > MAX_HEADER_BYTES or length > size - 8:
            rule = f"have a header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes"
            raise fail(self.path, rule, length)
        text = stream.read(length)
        if not text.startswith(b"{"):
            raise fail(self.path, "have a header that starts with '{'", repr(text[:1]))
        return _parse(self.path, "have a header", text), 8 + length

    def _check(self, header: dict[str, Any], data_bytes: int) -> dict[str, _Entry]:
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise fail(self.path, "have string metadata", reprlib.repr(metadata))
        entries = {name: self._entry(name, fields, data_bytes) for name, fields in header.items()}
        at = 0
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            if entry.start != at:
                rule = f"store tensors without holes or overlaps: {shown(name)} must start at {at}"
                raise fail(self.path, rule, entry.start)
            at = entry.stop
        if at != data_bytes:
            raise fail(self.path, f"hold {at} bytes of tensors", data_bytes)
        return entries

    def _entry(self, name: str, fields: Any, data_bytes: int) -> _Entry:
        label = shown(name)
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise fail(self.path, f"give {label} a dtype, a shape and data_offsets, no more", reprlib.repr(fields))
        code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        dtype = _DTYPES.get(code) if isinstance(code, str) else None
        if dtype is None:
            raise fail(self.path, f"give {label} a dtype among {', '.join(_DTYPES)}", reprlib.repr(code))
        if not _naturals(shape) or len(shape) > 8 or math.prod(filter(None, shape)) > MAX_ELEMENTS:
            rule = f"give {label} a shape of at most 8 whole numbers with a product of at most 2**59"
            raise fail(self.path, rule, reprlib.repr(shape))
        if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
            rule = f"give {label} two rising offsets within the {data_bytes} bytes of data"
            raise fail(self.path, rule, reprlib.repr(offsets))
        needed = math.prod(shape) * dtype.itemsize
        if offsets[1] - offsets[0] != needed:
            rule = f"give {label} the {needed} bytes of its shape and dtype"
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
        """Return a tensor as a read-only view of the mapped file; its pages are read when they are used.

        A tensor that starts off its dtype's alignment comes as a read-only copy.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise fail(self.path, f"hold the tensor {shown(name)}", "no such tensor")
        start, count = self._data_start + entry.start, entry.stop - entry.start
        raw = np.frombuffer(self._mapped(), np.uint8, count, start) if count else np.empty(0, np.uint8)
        raw = raw.copy() if start % entry.dtype.itemsize else raw
        array = raw.view(entry.dtype).reshape(entry.shape)
        array.flags.writeable = False
        return array

    def _mapped(self) -> mmap.mmap:
        """Return the mapped file, or refuse one that is no longer the one whose header was checked."""
        if self._map is None:
            with _open(self.path) as stream:
                now = _stamp(stream)
                if now != self._stamp:
                    raise fail(self.path, "stay unchanged while it is read", f"{now.size} bytes written since")
                try:
                    self._map = mmap.mmap(stream.fileno(), self._stamp.size, access=mmap.ACCESS_READ)
                except (OSError, ValueError) as error:
                    raise fail(self.path, "be a file that can be mapped", error) from None
        return self._map


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
        if (self.folder / self.INDEX).exists():
            self._where = self._read_index()
        elif (self.folder / self.SINGLE).exists():
            self._where = {name: self.SINGLE for name in self._file(self.SINGLE)}
        else:
            rule = f"hold {self.SINGLE} or {self.INDEX}"
            found = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else "no folder"
            raise fail(self.folder, rule, shown(str(found)), "Files of pickles (.bin, .pt) are never read")

    def _read_index(self) -> dict[str, str]:
        index = self.folder / self.INDEX
        where = read_json(self.folder, self.INDEX).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
            raise fail(index, "hold a weight_map of file names", type(where).__name__)
        for name, file in where.items():
            if not _FILE_NAME.fullmatch(file):
                rule = f"place {shown(name)} in a file directly in its folder, under a plain ASCII name"
                raise fail(index, rule, reprlib.repr(file))
        return where

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            self._files[name] = SafetensorsFile(_inside(self.folder, name))
        return self._files[name]

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def _owner(self, name: str) -> SafetensorsFile:
        if name not in self._where:
            raise fail(self.folder, f"hold the tensor {shown(name)}", "no such tensor")
        file = self._file(self._where[name])
        if name not in file:
            raise fail(file.path, f"hold the tensor {shown(name)} that the index places there", "no such tensor")
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


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint folder."""
    path = _inside(folder, name)
    with _open(path) as stream:
        size = _stamp(stream).size
        if size > MAX_JSON_BYTES:
            raise fail(path, f"have at most {MAX_JSON_BYTES} bytes", size)
        return _parse(path, "be a file", stream.read(size))


def _parse(path: Path, rule: str, text: bytes) -> dict[str, Any]:
    """Return the JSON object in `text`; a key that stands twice is refused, wherever it is."""
    # What Python takes at most for a value with its key, a bracket, a character: 11 bytes of text may take 280.
    memory = 300 * text.count(b",") + 100 * (text.count(b"[") + text.count(b"{"))
    memory += (2 if text.isascii() else 12) * len(text)
    if memory > MAX_JSON_MEMORY:
        raise fail(path, f"{rule} of JSON that can be parsed in {MAX_JSON_MEMORY} bytes", f"up to {memory}")
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise fail(path, f"{rule} of JSON in UTF-8", error) from None
    if not isinstance(parsed, dict):
        raise fail(path, f"{rule} with a JSON object", type(parsed).__name__)
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {shown(names.most_common(1)[0][0])} twice")
    return seen


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


@dataclass(frozen=True)
class _Stamp:
    """What tells a file from another one that took its place."""

    device: int
    inode: int
    size: int
    changed: int


def _stamp(stream: BinaryIO) -> _Stamp:
    status = os.fstat(stream.fileno())
    return _Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _open(path: Path) -> BinaryIO:
    """Open a regular file; a pipe in its place would block for ever, a device feed without end."""
    try:
        stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except (OSError, ValueError) as error:
        raise fail(path, "be a readable file", getattr(error, "strerror", None) or error) from None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise fail(path, "be a regular file", "a pipe or a device")
    return stream


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file in the folder, or refuse a link that leaves it.

    Links into the blob store that download caches keep beside their snapshots are followed.
    """
    path, home = folder / name, folder.resolve()
    if path.is_symlink():
        target = path.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        if target.parent not in (home, blobs):
            raise fail(path, "lie in its folder", f"a link to {target}")
    return path
