"""Tokens in, outputs out: nothing is unpickled, and an output appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pymoe.checkpoint import SafetensorsFile
from pymoe.errors import ArgumentError, DTypeError, complaint

Array = Any

_BF16_VOID = np.dtype("V2")  # how NumPy writes bfloat16 into a .npy


def read_tokens(path: str) -> Array:
    """Return the array of a ``.npy`` (two-byte void is read as bfloat16) or of a safetensors file with one tensor."""
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        file = SafetensorsFile(path)
        names = list(file)
        if len(names) != 1:
            raise ArgumentError(complaint("pymoe run", "--input", "hold one tensor", f"{len(names)} in {path}"))
        x = file[names[0]]
    elif suffix == ".npy":
        try:
            x = np.lib.format.open_memmap(path, mode="r")
        except (OSError, MemoryError):
            raise
        except Exception as error:  # NumPy's parser of a malformed header raises six kinds and promises none
            remedy = f"It says {type(error).__name__}: {str(error)[:200].rstrip('.')}"
            raise ArgumentError(complaint("pymoe run", "--input", "be a .npy without pickles", path, remedy)) from None
        x = x.view(ml_dtypes.bfloat16) if x.dtype == _BF16_VOID else x
    else:
        raise ArgumentError(complaint("pymoe run", "--input", "be a .npy or .safetensors file", path))
    if x.dtype.name not in ("float32", "float16", "bfloat16") or not x.dtype.isnative:
        raise DTypeError(complaint("pymoe run", "--input", "hold float32, float16 or bfloat16", x.dtype))
    return x


def output_path(call: str, path: str, suffixes: tuple[str, ...] = (".npy",)) -> Path:
    """Return `path`, or refuse one that could not be written, before any work."""
    target = Path(path)
    if target.suffix not in suffixes:
        raise ArgumentError(complaint(call, "the output", f"end in {' or '.join(suffixes)}", path))
    if target.is_dir() or not target.parent.is_dir():
        raise ArgumentError(complaint(call, "the output", "lie in an existing folder", path))
    if not os.access(target.parent, os.W_OK):
        raise ArgumentError(complaint(call, "the output", "lie in a folder that can be written", path))
    return target


def write_npy(target: Path, array: Array) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, array, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
