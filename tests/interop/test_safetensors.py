"""Our reader against the safetensors library: its files bit for bit, and the same judgement of damaged ones."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pymoe import CheckpointError
from pymoe.checkpoint import SafetensorsFile
from tests.checkpoint.files import NAMES
from tests.fuzz.inputs import FILE, Workplace, mutate
from tests.interop import models

pytestmark = pytest.mark.interop

STRICTER = ("a dtype, a shape and data_offsets, no more", "have string metadata; got None")
"""What we alone refuse: fields that the format does not have, and metadata of null."""


def library():
    models.torch()
    return pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install 'pymoe[interop]'")


@pytest.mark.parametrize("name", NAMES)
def test_files_of_the_library(tmp_path, name):
    """Every dtype, several shapes, metadata."""
    save = library().save_file
    t, dtype = models.torch(), getattr(models.torch(), name)
    generator = np.random.default_rng(0)
    tensors = {}
    for shape in ((), (1,), (3, 5), (0, 4), (2, 3, 4), (7,)):
        raw = generator.integers(0, 2 if name == "bool" else 256, (*shape, dtype.itemsize), np.uint8)
        tensors[f"t{shape}"] = t.from_numpy(raw).reshape(-1).view(dtype).reshape(shape)
    save(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file) == set(tensors)
    for key, tensor in tensors.items():
        assert file.dtype(key).name == name and file.shape(key) == tuple(tensor.shape)
        assert file[key].tobytes() == tensor.reshape(-1).view(t.uint8).numpy().tobytes()


def test_the_same_judgement_of_damaged_files(tmp_path):
    """What one accepts the other does, but for `STRICTER`, and names that are no Unicode, which the library refuses."""
    library()
    from safetensors import safe_open

    place = Workplace(tmp_path)
    seeds = [seed for seed in place.seeds() if seed[0] == FILE]
    agreed = set()
    for number in range(4000):
        rng = random.Random(number)
        data = rng.choice(seeds)
        for _ in range(rng.randint(1, 3)):
            data = mutate(data, rng)
        if data[:1] != bytes([FILE]):
            continue
        place.file.write_bytes(data[1:])
        ours = theirs = ""
        try:
            SafetensorsFile(place.file)
        except CheckpointError as error:
            ours = str(error)
        try:
            with safe_open(place.file, "pt") as opened:
                opened.keys()
        except Exception as error:  # it raises kinds of its own and Python's
            theirs = str(error) or "refused"
        if bool(ours) == bool(theirs):
            agreed.add(bool(ours))
        elif ours:
            assert any(reason in ours for reason in STRICTER), (ours, data)
        else:
            assert b"\\ud8" in data, (theirs, data)
    assert agreed == {True, False}
