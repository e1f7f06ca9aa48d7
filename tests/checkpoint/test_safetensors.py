"""The reader against honest files of every dtype and against hostile ones (reliability K3 to K6)."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import struct
import time
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pymoe.checkpoint
from pymoe import CheckpointError
from pymoe.checkpoint import SafetensorsFile, SafetensorsFolder
from tests.checkpoint.files import NAMES, header_of, write

DTYPES = [np.dtype(getattr(ml_dtypes, name, None) or name) for name in NAMES]
ONE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
ENTRY = header_of(ONE)["a"]

ran = []


class Payload:
    """Notes in `ran` that it was unpickled."""

    def __reduce__(self):
        return ran.append, (1,)


PICKLE = pickle.dumps(Payload())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bit_for_bit(tmp_path, dtype):
    raw = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, 12 * dtype.itemsize, np.uint8)
    array = raw.view(dtype).reshape(3, 4)
    file = SafetensorsFile(write(tmp_path / "x.safetensors", {"a": array, "empty": np.empty((0, 5), dtype)}))
    assert list(file) == ["a", "empty"] and file.shape("a") == (3, 4) and file.dtype("a") == dtype
    assert file["a"].tobytes() == array.tobytes() and file["a"].dtype == dtype
    assert file["empty"].shape == (0, 5) and file.nbytes("empty") == 0


def test_tensors_are_read_only_views_of_the_file(tmp_path):
    file = SafetensorsFile(write(tmp_path / "x.safetensors", ONE))
    with pytest.raises(ValueError, match="read-only"):
        file["a"][0, 0] = 1
    assert np.shares_memory(file["a"], file["a"])


def test_scalars_metadata_and_unaligned_data(tmp_path):
    header = {"__metadata__": {"format": "pt"}} | header_of({"b": np.uint8(7).reshape(()), **ONE})
    tensors = {"b": np.array(7, np.uint8), **ONE}
    for pad in (True, False):
        file = SafetensorsFile(write(tmp_path / "x.safetensors", tensors, header, pad=pad))
        assert file["b"] == 7 and file["b"].shape == ()
        np.testing.assert_array_equal(file["a"], ONE["a"])


def test_no_tensors(tmp_path):
    assert list(SafetensorsFile(write(tmp_path / "x.safetensors", {}))) == []


HOSTILE = {
    "K3_length_wraps_64_bits": {"length": 2**64 - 1},
    "K3_length_beyond_the_file": {"length": 10_000},
    "K3_length_above_the_cap": {"length": 100_000_001},
    "K3_length_zero": {"length": 0},
    "K3_duplicate_keys": {"text": b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2)},
    "K3_duplicate_fields": {"text": b'{"a":{"dtype":"F32","dtype":"F32","shape":[6],"data_offsets":[0,24]}}'},
    "K3_not_json": {"text": b"{not json}"},
    "K3_not_utf8": {"text": b'{"\xff":1}'},
    "K3_not_an_object": {"text": b"[1, 2]  "},
    "K3_leading_space": {"text": b" {}"},
    "K3_nested_deeply": {"text": b'{"a":' * 50_000 + b"1" + b"}" * 50_000},
    "K3_nan_constant": {"text": b'{"a":NaN}'},
    "K3_integer_of_5000_digits": {"text": b'{"a":%s}' % (b"9" * 5000)},
    "K3_duplicate_keys_deep_inside": {"text": b'{"__metadata__":{"x":"1","x":"2"}}'},
    "K4_dtype_unknown": {"header": {"a": ENTRY | {"dtype": "F4"}}},
    "K4_dtype_no_string": {"header": {"a": ENTRY | {"dtype": ["F32"]}}},
    "K4_offsets_outside": {"header": {"a": ENTRY | {"data_offsets": [0, 28]}}},
    "K4_offsets_reversed": {"header": {"a": ENTRY | {"data_offsets": [24, 0]}}},
    "K4_offsets_negative": {"header": {"a": ENTRY | {"data_offsets": [-4, 20]}}},
    "K4_offsets_float": {"header": {"a": ENTRY | {"data_offsets": [0.0, 24.0]}}},
    "K4_offsets_bool": {"header": {"a": ENTRY | {"data_offsets": [False, 24]}}},
    "K4_offsets_three": {"header": {"a": ENTRY | {"data_offsets": [0, 24, 24]}}},
    "K4_shape_too_large_for_bytes": {"header": {"a": ENTRY | {"shape": [2, 4]}}},
    "K4_shape_product_wraps": {"header": {"a": ENTRY | {"shape": [2**32, 2**32, 6]}}},
    "K4_shape_product_too_long_to_print": {"header": {"a": ENTRY | {"shape": [10**4299, 10**4299]}}},
    "K4_shape_hides_its_size_behind_a_zero": {
        "header": {"a": ENTRY, "b": {"dtype": "F32", "shape": [2**62, 0, 2**62], "data_offsets": [24, 24]}}
    },
    "K4_offsets_wrap_64_bits": {"header": {"a": ENTRY | {"data_offsets": [2**64, 2**64 + 24]}}},
    "K4_name_of_a_megabyte": {"header": {"a" * 2**20: 3}},
    "K4_name_that_writes_to_the_terminal": {"header": {"a\n\x1b[31m": 3}},
    "K4_name_that_is_no_unicode": {"text": b'{"\\ud800":3}'},
    "K4_fields_nested_deeply": {"text": b'{"a":' + b"[" * 400 + b"]" * 400 + b"}"},
    "K4_shape_negative": {"header": {"a": ENTRY | {"shape": [-2, -3]}}},
    "K4_shape_many_axes": {"header": {"a": ENTRY | {"shape": [1] * 100 + [6]}}},
    "K4_extra_field": {"header": {"a": ENTRY | {"strides": [1]}}},
    "K4_missing_field": {"header": {"a": {"dtype": "F32", "shape": [6]}}},
    "K4_entry_no_object": {"header": {"a": 3}},
    "K4_hole_before": {"header": {"a": {"dtype": "F32", "shape": [5], "data_offsets": [4, 24]}}},
    "K4_hole_after": {"header": {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}},
    "K4_overlap": {"header": {"a": ENTRY, "b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}},
    "K4_bytes_after_the_last": {"tail": b"x"},
    "K4_metadata_no_strings": {"header": {"__metadata__": {"a": 1}, "a": ENTRY}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_name(tmp_path, case):
    path = write(tmp_path / "x.safetensors", ONE, **HOSTILE[case])
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    text = str(caught.value)
    assert str(path) in text and len(text) < 500 and text.isprintable()


@pytest.mark.parametrize("size", [0, 3, 7])
def test_files_shorter_than_their_length(tmp_path, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2)[:size])
    with pytest.raises(CheckpointError, match="must hold the 8 bytes"):
        SafetensorsFile(path)


def test_every_truncation_is_refused_or_whole(tmp_path):
    whole = write(tmp_path / "x.safetensors", ONE).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / "cut.safetensors")


def test_random_damage_of_the_header_never_escapes(tmp_path):
    """A flipped byte is an error of ours or another valid header; nothing else is raised, nothing is read outside."""
    whole = bytearray(write(tmp_path / "x.safetensors", ONE).read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole) - ONE["a"].nbytes, rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        (tmp_path / "y.safetensors").write_bytes(damaged)
        try:
            file = SafetensorsFile(tmp_path / "y.safetensors")
            for name in file:
                file[name].tobytes()
        except CheckpointError:
            pass


def test_K3_many_keys_of_which_the_last_stands_twice(tmp_path):
    """Found in one pass: a search of all earlier names for each takes minutes here, and hours in a header of 100 MB."""
    text = b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b',"199999":0}'
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="the key 199999 twice"):
        SafetensorsFile(write(tmp_path / "x.safetensors", {}, text=text))
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("change", ["shrinks", "is_replaced", "is_removed"])
def test_K4_a_file_that_changes_after_its_header_was_checked(tmp_path, change):
    path = write(tmp_path / "x.safetensors", ONE)
    file = SafetensorsFile(path)
    if change == "shrinks":
        os.truncate(path, path.stat().st_size - 4)
    elif change == "is_removed":
        path.unlink()
    else:
        write(tmp_path / "y.safetensors", ONE)
        os.replace(tmp_path / "y.safetensors", path)
    with pytest.raises(CheckpointError, match="be a readable file" if change == "is_removed" else "stay unchanged"):
        file["a"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_K5_only_regular_files_are_read(tmp_path, kind):
    """A pipe would block the reader for ever."""
    path = tmp_path / "x.safetensors"
    {"pipe": os.mkfifo, "folder": os.mkdir, "loop": lambda name: os.symlink(name, name)}[kind](path)
    with pytest.raises(CheckpointError, match="must be a (regular|readable) file"):
        SafetensorsFile(path)


def test_the_zeros_of_a_shape_and_its_largest_size_are_legal(tmp_path):
    header = {"b": {"dtype": "F64", "shape": [2**59, 0], "data_offsets": [0, 0]}}
    assert SafetensorsFile(write(tmp_path / "x.safetensors", {}, header))["b"].shape == (2**59, 0)


@pytest.mark.parametrize(
    "name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "model.npz", "model"]
)
def test_K6_pickles_are_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(PICKLE)
    with pytest.raises(CheckpointError, match="unpickles nothing"):
        SafetensorsFile(tmp_path / name)
    assert not ran


def folder_with(tmp_path, weight_map):
    folder = tmp_path / "ck"
    folder.mkdir()
    (folder / SafetensorsFolder.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    "target",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors",
     "..", ".", "", "..\\x.safetensors", "x\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors",
     "x\n.safetensors", ".hidden.safetensors", "C:x.safetensors", "sub/../../x.safetensors", "./x.safetensors"],
)  # fmt: skip
def test_K5_the_index_stays_in_its_folder(tmp_path, target):
    write(tmp_path / "x.safetensors", ONE)
    with pytest.raises(CheckpointError, match="in a file directly in its folder"):
        SafetensorsFolder(folder_with(tmp_path, {"a": target}))


@pytest.mark.parametrize("name", ["y.safetensors", "model.safetensors", "model.safetensors.index.json"])
def test_K5_links_out_of_the_folder(tmp_path, name):
    write(tmp_path / "x.safetensors", ONE)
    folder = folder_with(tmp_path, {"a": "y.safetensors"})
    if name != "y.safetensors":
        (folder / SafetensorsFolder.INDEX).unlink()
    (folder / name).symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="lie in its folder"):
        SafetensorsFolder(folder)["a"]


def test_K5_links_within_the_folder_are_followed(tmp_path):
    folder = folder_with(tmp_path, {"a": "y.safetensors"})
    write(folder / "x.safetensors", ONE)
    (folder / "y.safetensors").symlink_to("x.safetensors")
    np.testing.assert_array_equal(SafetensorsFolder(folder)["a"], ONE["a"])


def test_K5_links_into_a_download_caches_blobs_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(blobs / "deadbeef.safetensors", ONE)
    (snapshot / "model.safetensors").symlink_to(blobs / "deadbeef.safetensors")
    np.testing.assert_array_equal(SafetensorsFolder(snapshot)["a"], ONE["a"])


def test_K6_an_index_of_pickles_opens_none(tmp_path):
    folder = folder_with(tmp_path, {"a": "pytorch_model.bin"})
    (folder / "pytorch_model.bin").write_bytes(PICKLE)
    with pytest.raises(CheckpointError, match="unpickles nothing"):
        SafetensorsFolder(folder)["a"]


def test_K6_a_pickle_under_the_right_name_is_not_run(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(PICKLE)
    with pytest.raises(CheckpointError, match="header"):
        SafetensorsFolder(tmp_path)
    assert not ran


def test_K6_the_reader_knows_no_module_that_could_run_a_file():
    source = "".join(path.read_text() for path in Path(pymoe.checkpoint.__file__).parent.glob("*.py"))
    for word in ("pickle", "eval(", "exec(", "marshal", "np.load", "torch"):
        assert not re.search(rf"^[^#\"]*\b{re.escape(word)}", source.replace("unpickle", ""), re.MULTILINE)


def test_K3_an_index_that_places_a_tensor_twice(tmp_path):
    folder = folder_with(tmp_path, {})
    (folder / SafetensorsFolder.INDEX).write_text('{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}')
    with pytest.raises(CheckpointError, match="the key a twice"):
        SafetensorsFolder(folder)


COUNT = 20_000
SWELLING = {
    "strings": b'{"__metadata__":{' + b",".join(b'"%x":"%x"' % (i, i) for i in range(COUNT)) + b"}}",
    "numbers": b"{" + b",".join(b'"%x":0' % i for i in range(COUNT)) + b"}",
    "objects": b'{"a":[' + b",".join([b"{}"] * COUNT) + b"]}",
    "arrays": b'{"a":[' + b",".join([b"[]"] * COUNT) + b"]}",
    "small objects": b'{"a":[' + b",".join([b'{"a":{"a":[1]}}'] * COUNT) + b"]}",
    "long integers": b'{"a":[' + b",".join([b"9" * 4000] * (COUNT // 100)) + b"]}",
    "wide characters": b'{"__metadata__":{"a":"' + "\N{GRINNING FACE}".encode() + b"a" * 2**20 + b'"}}',
    "wide names": b"{"
    + b",".join(f'"{i:x}\N{GRINNING FACE}":"\N{GRINNING FACE}"'.encode() for i in range(COUNT))
    + b"}",
    "tensors": json.dumps({f"layers.{i}.weight": ENTRY for i in range(COUNT // 10)}).encode(),
}


@pytest.mark.parametrize("kind", SWELLING)
def test_K3_json_that_swells_in_memory(tmp_path, monkeypatch, kind):
    """A few bytes of JSON may take hundreds in Python: what would take more than the cap is refused before parsing."""
    text = SWELLING[kind]
    path = write(tmp_path / "x.safetensors", {}, text=text)
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            SafetensorsFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # It was parsed. With the cap at what that took beyond the bytes of the file themselves, it is not.
    monkeypatch.setattr("pymoe.checkpoint.safetensors.MAX_JSON_MEMORY", peak - len(text))
    with pytest.raises(CheckpointError, match="of JSON that can be parsed in"):
        SafetensorsFile(path)


def test_K3_the_largest_headers_of_real_models_are_parsed(tmp_path):
    """75,000 tensors of one file, and an index of 150,000."""
    name = "model.layers.60.mlp.experts.{}.down_proj.weight_scale_inv"
    entry = {"dtype": "BF16", "shape": [7168, 0], "data_offsets": [0, 0]}
    header = {name.format(i): entry for i in range(75_000)}
    assert len(list(SafetensorsFile(write(tmp_path / "x.safetensors", {}, header)))) == 75_000
    folder = folder_with(tmp_path, {name.format(i): "model-00100-of-00163.safetensors" for i in range(150_000)})
    assert len(list(SafetensorsFolder(folder))) == 150_000


def test_K3_an_index_that_is_too_long(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, {"a": "x.safetensors"})
    monkeypatch.setattr("pymoe.checkpoint.safetensors.MAX_JSON_BYTES", 10)
    with pytest.raises(CheckpointError, match="at most 10 bytes"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, "x"])
def test_malformed_indexes(tmp_path, weight_map):
    with pytest.raises(CheckpointError, match="weight_map"):
        SafetensorsFolder(folder_with(tmp_path, weight_map))


def test_an_index_that_promises_too_much(tmp_path):
    folder = folder_with(tmp_path, {"a": "x.safetensors", "b": "x.safetensors", "c": "gone.safetensors"})
    write(folder / "x.safetensors", ONE)
    tensors = SafetensorsFolder(folder)
    np.testing.assert_array_equal(tensors["a"], ONE["a"])
    for name, text in (("b", "that the index places there"), ("c", "be a readable file"), ("d", "no such tensor")):
        with pytest.raises(CheckpointError, match=text):
            tensors[name]


def test_a_folder_of_pickles_says_so(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*never read"):
        SafetensorsFolder(tmp_path)
