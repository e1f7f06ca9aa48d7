"""Tapes without a GPU: which words of the parameters are the caller's, and what cannot be played."""

from __future__ import annotations

import types

import numpy as np
import pytest

from pymoe.codec.weights import WeightOperand
from pymoe.device.launch import LaunchPlan
from pymoe.device.tape import Recorder
from pymoe.ops.grouped_gemm import _cuda
from tests.ops.devices import emulation

pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)


class Array:
    """What a recorder reads of a CuPy array."""

    def __init__(self, address, nbytes=64):
        self.data, self.nbytes = types.SimpleNamespace(ptr=address), nbytes


FUNCTION = types.SimpleNamespace(ptr=7)
X, OUT, SCRATCH = Array(0x7F0000001000), Array(0x7F0000002000), Array(0x7F0000003000)


def note(recorder, *args, leading_pointers=0):
    recorder.note(FUNCTION, (1, 1, 1), (32, 1, 1), 0, args, leading_pointers)


def structure(*words, tail=b"\x05\0\0\0"):
    content = np.array(words, np.uint64).tobytes() + tail
    return np.frombuffer(content, f"V{len(content)}")[0]


def test_the_callers_addresses_are_patched_and_no_others():
    recorder = Recorder([X, OUT])
    note(recorder, OUT, SCRATCH, np.int32(5), X, 0, np.float32(1.5))
    tape = recorder.tape()
    (launch,) = tape._held[0]
    assert launch.fixed == (7, 1, 1, 1, 32, 1, 1, 0)
    assert launch.words.tolist()[:5] == [0x7F0000002000, 0x7F0000003000, 5, 0x7F0000001000, 0]
    assert [(at, role) for _, at, role in tape._patches] == [(0, 1), (3, 0)]
    assert launch.addresses.tolist() == [launch.words.ctypes.data + 8 * i for i in range(6)]


def test_a_structure_is_copied_whole_and_only_its_pointers_are_looked_at():
    recorder = Recorder([X, OUT])
    given = structure(X.data.ptr, SCRATCH.data.ptr, OUT.data.ptr)  # the third is a number that looks like an address
    note(recorder, given, np.int64(9), leading_pointers=2)
    tape = recorder.tape()
    (launch,) = tape._held[0]
    assert launch.words[:4].tobytes()[:28] == given.tobytes() and int(launch.words[4]) == 9
    assert [(at, role) for _, at, role in tape._patches] == [(0, 0)]
    assert launch.addresses.tolist() == [launch.words.ctypes.data, launch.words.ctypes.data + 32]


@pytest.mark.parametrize(
    "record",
    [
        lambda r: note(r, Array(X.data.ptr + 16)),
        lambda r: (note(r, X), r.refuse()),
        lambda r: None,
    ],
)
def test_what_cannot_be_played_makes_no_tape(record):
    recorder = Recorder([X, OUT])
    record(recorder)
    assert recorder.tape() is None


def test_two_arguments_at_one_address_make_no_tape():
    recorder = Recorder([X, Array(X.data.ptr), OUT])
    note(recorder, X)
    assert recorder.tape() is None


def test_playing_writes_addresses_and_launches_in_order(monkeypatch):
    recorder = Recorder([X, OUT])
    note(recorder, X, SCRATCH)
    note(recorder, SCRATCH, OUT)
    tape = recorder.tape()
    calls = []

    monkeypatch.setattr(tape, "_launch", lambda *args: calls.append(args))
    monkeypatch.setattr("pymoe.device.tape._enter_context", lambda device: None)
    tape.play([0x1000, 0x2000], 0, 3)
    launches = tape._held[0]
    assert [args[8] for args in calls] == [3, 3] and [args[9] for args in calls] == [
        x.addresses.ctypes.data for x in launches
    ]
    assert launches[0].words.tolist() == [0x1000, SCRATCH.data.ptr]
    assert launches[1].words.tolist() == [SCRATCH.data.ptr, 0x2000]


def test_which_addresses_are_the_callers():
    recorder = Recorder([X, OUT])
    held = [recorder.holds(array.data.ptr + offset) for array in (X, OUT, SCRATCH) for offset in (-1, 0, 63, 64)]
    assert held == [False, True, True, False] * 2 + [False] * 4


def test_the_router_weights_of_a_grouped_gemm_are_patched(monkeypatch):
    """They stand in the middle of the structure that the kernel takes by value; another call brings others."""
    slots, weights, out = np.zeros(4, np.int32), np.ones((4, 1), np.float32), np.zeros((4, 8), np.float32)
    recorder, calls = Recorder([Array(weights.ctypes.data, weights.nbytes)]), []
    with emulation():
        monkeypatch.setattr(
            LaunchPlan, "__call__", lambda plan, *args: note(recorder, *args, leading_pointers=plan.leading_pointers)
        )
        tiles = _cuda.TileList(np.zeros((1, 4), np.int32), np.ones(1, np.int32), 16)
        operand = WeightOperand.unquantized(np.zeros((1, 8, 8), np.float32))
        _cuda.grouped_gemm(np.zeros((4, 8), np.float32), operand, tiles, routed=_cuda.Routed(slots, weights), out=out)
    tape = recorder.tape()
    monkeypatch.setattr(tape, "_launch", lambda *args: calls.append(args))
    monkeypatch.setattr("pymoe.device.tape._enter_context", lambda device: None)
    (launch,) = tape._held[0]
    count = len(_cuda.arguments.Pointers._fields)
    before = _cuda.arguments.Pointers(*launch.words[:count].tolist())
    tape.play([0x7F0000005000], 0, 3)
    after = _cuda.arguments.Pointers(*launch.words[:count].tolist())
    assert before.topk_weights == weights.ctypes.data and before.row_to_slot == slots.ctypes.data and len(calls) == 1
    assert after == before._replace(topk_weights=0x7F0000005000)
