"""Inputs of the fuzzer: honest ones to start from, mutations that know the format, and what one execution does.

The first byte of an input says what the rest is: a safetensors file, the index of a folder of shards, or the
config.json of a checkpoint of one family.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pymoe import MoELayer, PymoeError
from pymoe.checkpoint import SafetensorsFile, SafetensorsFolder, list_layers
from tests.checkpoint.families import CASES, FP8, LAYER, E, make
from tests.checkpoint.files import header_of, write

FILE, INDEX, CONFIG = 0, 1, 2
SIZE = (E, 32, 32)
FORMS = [case for case in CASES if case[1] in ("bfloat16", FP8, "mxfp4")]
"""Checkpoints whose config.json is fuzzed: input byte ``CONFIG + i`` is that of ``FORMS[i]``."""
SMALL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4, 0), np.int8), "c": np.ones(3, np.uint8)}
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 24, 27, 1.5, -0.0, 2**31, 2**53, 2**63, 2**64, 10**400, 1e300, float("nan"),
    float("inf"), "", "F32", "F8_E8M0", "U8", "a", "..", "/etc/passwd", "x.safetensors", "\ud800", "\n", "x" * 300, [],
    {}, [0, 24], [24, 0], [2, 3], [-1], [0], [[0]], {"a": 1}, "softmax", "gelu", "mixtral", "llama4", "fp8", "ue8m0",
)  # fmt: skip


class Workplace:
    """Folders that executions write into: one for files, one with a shard, one a family's checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "x.safetensors"
        self.shards = folder / "shards"
        self.shards.mkdir()
        write(self.shards / "x.safetensors", SMALL)
        self.checkpoints = []
        for family, form in FORMS:
            made = make(family, form, size=SIZE, shared=32)
            self.checkpoints.append(made.write(folder / f"{family}-{form}".replace(" ", "-")))
        # Executions write over them.
        self.configs = [(written / "config.json").read_bytes() for written in self.checkpoints]

    def seeds(self) -> Iterator[bytes]:
        """Yield honest inputs of every kind."""
        write(self.file, SMALL)
        yield bytes([FILE]) + self.file.read_bytes()
        write(self.file, SMALL, {"__metadata__": {"format": "pt"}} | header_of(SMALL))
        yield bytes([FILE]) + self.file.read_bytes()
        yield bytes([INDEX]) + json.dumps({"weight_map": {name: "x.safetensors" for name in SMALL}}).encode()
        for i, config in enumerate(self.configs):
            yield bytes([CONFIG + i]) + config

    def run(self, data: bytes) -> str:
        """Read one input; return "read" or "refused".  Anything but an error of ours comes out as it is."""
        try:
            self.read(data)
        except PymoeError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 2000, ascii(text)
            return "refused"
        return "read"

    def read(self, data: bytes) -> None:
        """Read one input, or raise what the library raises."""
        kind, payload = (data[0] if data else 0) % (CONFIG + len(FORMS)), data[1:]
        if kind == FILE:
            self.file.write_bytes(payload)
            read_all(SafetensorsFile(self.file))
        elif kind == INDEX:
            (self.shards / SafetensorsFolder.INDEX).write_bytes(payload)
            read_all(SafetensorsFolder(self.shards))
        else:
            folder = self.checkpoints[kind - CONFIG]
            (folder / "config.json").write_bytes(payload)
            list_layers(folder)
            MoELayer.from_checkpoint(folder, LAYER, experts=[1])


def read_all(tensors: SafetensorsFile | SafetensorsFolder) -> None:
    """Touch every byte of every tensor."""
    for name in tensors:
        assert tensors[name].nbytes == tensors.nbytes(name)
        tensors[name].tobytes()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return the input with one value of its JSON replaced, renamed or removed, or with a few bytes changed."""
    if len(data) < 2 or rng.random() < 0.1:
        return damaged(data, rng)
    kind, head, text, tail = data[:1], b"", data[1:], b""
    if kind[0] % (CONFIG + len(FORMS)) == FILE:
        length = int.from_bytes(text[:8], "little") if len(text) >= 8 else 0
        text, tail = text[8 : 8 + length], text[8 + length :]
    try:
        tree = json.loads(text)
        change(tree, rng)
        text = json.dumps(tree).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, UnicodeDecodeError):
        return damaged(data, rng)
    if kind[0] % (CONFIG + len(FORMS)) == FILE:
        head = struct.pack("<Q", len(text))
    return kind + head + text + tail


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return the input with bytes overwritten, cut out or put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(out))
        action = rng.randrange(3)
        if action == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif action == 1:
            del out[at : at + rng.randint(1, 8)]
        else:
            out[at:at] = rng.choice((b'"', b"{", b"}", b"[", b"]", b",", b":", b"\0", b"9" * 20, bytes(8), b"\xff"))
    return bytes(out)


def change(tree: object, rng: random.Random) -> None:
    """Change one place of a JSON value, in place."""
    places = list(containers(tree))
    if not places:
        raise ValueError("no container")
    place = rng.choice(places)
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    action = rng.randrange(4)
    if not keys or action == 0:
        if isinstance(place, dict):
            place[rng.choice(("a", "z", "dtype", "__metadata__", "n_group", "\ud800", ""))] = rng.choice(VALUES)
        else:
            place.append(rng.choice(VALUES))
        return
    key = rng.choice(keys)
    if action == 1:
        del place[key]
    elif action == 2 and isinstance(place, dict):
        place[rng.choice(("a", "b", "__metadata__", "x" * 200, "\n"))] = place.pop(key)
    elif action == 2:
        place[key] = place[rng.choice(keys)]
    elif isinstance(place[key], int) and rng.random() < 0.5:
        place[key] += rng.choice((-1, 1, 2, 2**32, 2**64))
    else:
        place[key] = rng.choice(VALUES)


def containers(tree: object, depth: int = 0) -> Iterator[dict | list]:
    """Yield every object and array of a JSON value."""
    if isinstance(tree, dict | list) and depth < 20:
        yield tree
        for child in tree.values() if isinstance(tree, dict) else tree:
            yield from containers(child, depth + 1)
