"""Compiled kernels on disk: one sealed file each, in a private folder, or nothing where there can be none.

The store itself, with its atomic files, is cuda.core's.  An entry is sealed with a digest over all of it, and names the
key that it was made for: a truncated, altered or misplaced file is a miss, never a kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import MutableMapping
from functools import lru_cache
from typing import NamedTuple

from pymoe import environment
from pymoe._version import __version__
from pymoe.device.private import private_folder

__all__ = ["FOLDER", "CompiledKernel", "read", "seal", "unseal", "write"]

FOLDER = f"cubins-{__version__}"
"""The store's folder in the cache folder; those of earlier versions may be deleted."""

_MAGIC = b"pymoe cubin 1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size


class CompiledKernel(NamedTuple):
    """A kernel as machine code: the cubin, its entry point's mangled name, and what the assembler said of it."""

    cubin: bytes
    symbol: str
    log: str


def read(key: str) -> CompiledKernel | None:
    """Return the kernel kept under `key`, or None."""
    store = _open()
    if store is None:
        return None
    try:
        entry = store[key.encode()]
    except KeyError:
        return None
    except OSError as error:
        environment.logger.debug("kernel cache not read: %s", error)
        return None
    compiled = unseal(key, entry)
    if compiled is None:
        environment.logger.warning("kernel cache: an entry is damaged or foreign and is made anew")
    return compiled


def write(key: str, compiled: CompiledKernel) -> None:
    """Keep a kernel under `key`; where that cannot be done the log says so."""
    store = _open()
    if store is None:
        return
    try:
        store[key.encode()] = seal(key, compiled)
    except OSError as error:
        environment.logger.debug("kernel cache not written: %s", error)


def seal(key: str, compiled: CompiledKernel) -> bytes:
    """Return an entry: format, SHA-256 of the rest, one line of JSON, the cubin."""
    head = json.dumps({"key": key, "symbol": compiled.symbol, "log": compiled.log}).encode() + b"\n"
    body = head + compiled.cubin
    return _MAGIC + hashlib.sha256(body).digest() + body


def unseal(key: str, entry: bytes) -> CompiledKernel | None:
    """Return the kernel of an entry, or None unless the entry is whole and was made for `key`."""
    start = len(_MAGIC) + _DIGEST_BYTES
    body = entry[start:]
    if not entry.startswith(_MAGIC) or hashlib.sha256(body).digest() != entry[len(_MAGIC) : start]:
        return None
    head, _, cubin = body.partition(b"\n")
    said = json.loads(head)
    return CompiledKernel(cubin, said["symbol"], said["log"]) if said["key"] == key else None


def _open() -> MutableMapping[bytes, bytes] | None:
    """Return the store, or None where there is no folder that is safe to use."""
    try:
        return _store(str(private_folder(FOLDER)))
    except OSError as error:
        _say_once(str(error))
        return None


@lru_cache(maxsize=8)
def _store(folder: str) -> MutableMapping[bytes, bytes]:
    from cuda.core.utils import FileStreamProgramCache

    return FileStreamProgramCache(folder)


@lru_cache(maxsize=64)
def _say_once(reason: str) -> None:
    environment.logger.warning("kernel cache off: %s", reason)
