"""experts= touches the bytes of the asked experts and no others: the pages of the others are made unreadable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.families import CASES, FUSED, LAYER, make

ROOT = Path(__file__).parents[2]
SIZE = (6, 256, 512)
"""One expert's matrices are 128 KiB at least, so that whole pages lie inside them."""

# Maps the files as ever, then forbids the pages that hold nothing but bytes of other experts; touching one is SIGSEGV.
PROGRAM = """
import ctypes, json, mmap, sys
import numpy as np
from pymoe.checkpoint import safetensors, load_layer
folder, layer, asked, scheme, forbidden = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
plain, page, count = safetensors.SafetensorsFile._mapped, mmap.PAGESIZE, 0
def mapped(self):
    global count
    fresh = self._map is None
    memory = plain(self)
    if fresh:
        start = np.frombuffer(memory, np.uint8).ctypes.data
        for name, low, high in forbidden:
            if name in self:
                base = self._data_start + self._entries[name].start
                low, high = -(-(base + low) // page) * page, (base + high) // page * page
                if low < high:
                    assert libc.mprotect(ctypes.c_void_p(start + low), ctypes.c_size_t(high - low), 0) == 0
                    count += high - low
    return memory
safetensors.SafetensorsFile._mapped = mapped
weights = load_layer(folder, layer, experts=asked, scheme=scheme)
print(count, weights.w1.shape[0])
"""


def others(made, asked):
    """Return (tensor, first byte, last) of what belongs to experts that are not asked for, and all such bytes."""
    ranges = []
    for name, array in made.tensors.items():
        tail = name.split(".experts.")[-1].split(".")[0]
        if ".experts." not in name:
            continue
        if tail.isdigit():
            ranges += [(name, 0, array.nbytes)] if int(tail) not in asked else []
        else:
            each = array.nbytes // SIZE[0]
            ranges += [(name, e * each, (e + 1) * each) for e in range(SIZE[0]) if e not in asked]
    return ranges, sum(high - low for _, low, high in ranges)


def child(folder, asked, scheme, forbidden):
    argument = json.dumps([str(folder), LAYER, asked, scheme, forbidden])
    return subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, cwd=ROOT)


def checkpoint(folder, family, form, fused=False):
    count = {"qwen3_moe": "num_experts", "qwen2_moe": "num_experts", "deepseek_v3": "n_routed_experts"}
    field = {count.get(family, "num_local_experts"): SIZE[0]}
    made = make(family, form, size=SIZE, **({"fused": True} if fused else {}))
    (made.config["text_config"] if family == "llama4" else made.config).update(field)
    return made, made.write(folder)


@pytest.mark.parametrize("scheme", [None, "int8_w8a16"])
@pytest.mark.parametrize(
    "family, form, fused", [(*case, False) for case in CASES] + [(family, "bfloat16", True) for family in FUSED]
)
def test_only_the_asked_experts_bytes_are_touched(tmp_path, family, form, fused, scheme):
    made, folder = checkpoint(tmp_path / "ck", family, form, fused)
    asked = [4, 1]
    forbidden, nbytes = others(made, asked)
    done = child(folder, asked, scheme, forbidden)
    assert done.returncode == 0, done.stderr
    protected, loaded = map(int, done.stdout.split())
    assert loaded == len(asked) and protected > 0.75 * nbytes


@pytest.mark.parametrize(
    "family, form, fused",
    [
        ("mixtral", "float32", False),
        ("gpt_oss", "mxfp4", False),
        ("llama4", "bfloat16", False),
        ("qwen3_moe", "bfloat16", True),
    ],
)
def test_the_check_can_fail(tmp_path, family, form, fused):
    """An expert more than the pages allow ends the child."""
    made, folder = checkpoint(tmp_path / "ck", family, form, fused)
    forbidden, _ = others(made, [4])
    assert child(folder, [4, 1], None, forbidden).returncode == -signal.SIGSEGV
