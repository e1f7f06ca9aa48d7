"""Cache folders that nobody else can write: whoever can write compiled code can run code here."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pymoe import environment

__all__ = ["is_private", "private_folder"]


def private_folder(name: str) -> Path:
    """Return the folder `name` of the cache folder, made where it is missing.

    It and the cache folder must be ours, 0700 and no symbolic links; they are looked at anew in every call.

    Raises
    ------
    OSError
        There is no such folder, or using it would not be safe; the text says why.
    """
    base = environment.cache_dir()
    if not base.is_absolute():
        raise FileNotFoundError("this user has no home folder; PYMOE_CACHE_DIR may name another")
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = base / name
    folder.mkdir(mode=0o700, exist_ok=True)
    for path in (base, folder):
        if not is_private(path):
            raise PermissionError(f"{path} is not a folder of this user alone (mode 0700)")
    return folder


def is_private(folder: Path) -> bool:
    """Return whether `folder` is a real folder that this user owns and nobody else may enter or write."""
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
