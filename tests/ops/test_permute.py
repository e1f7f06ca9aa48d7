"""permute, permute_rows, count_expert_num_tokens and the block alignments against plain loops over the slots."""

from __future__ import annotations

import doctest
import importlib
import itertools
import tempfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymoe.environment import checked
from pymoe.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from pymoe.ops.permute import batched_moe_align_block_size
from pymoe.ops.permute import count_expert_num_tokens as count_stage
from pymoe.ops.permute import moe_align_block_size as align_stage
from pymoe.ops.permute import permute as permute_stage
from pymoe.ops.permute import permute_rows as rows_stage
from tests.ops.devices import DEVICES, HOST, ON_DEVICE, PORTABLE, staged

permute, count_expert_num_tokens, moe_align_block_size = map(staged, (permute_stage, count_stage, align_stage))
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def permute_rows(x, row_map, backend=None):
    """On a device the rows have room for all slots; those of the map are compared."""
    return staged(rows_stage)(x, row_map, backend=backend)[: row_map.P]


@pytest.fixture(params=PORTABLE)
def backend(request):
    return request.param


@pytest.fixture
def sparse():
    """Return a maker of float32 zeros in a sparse file, of which only the pages that are touched exist."""
    with tempfile.TemporaryFile() as file:
        yield lambda shape: np.memmap(file, np.float32, "w+", shape=shape)


def local_expert(value, E_local, expert_map):
    """Return where a slot goes, in Python integers."""
    value = int(value)
    if expert_map is None:
        return value if 0 <= value < E_local else -1
    return int(expert_map[value]) if 0 <= value < len(expert_map) else -1


def plain_permute(topk_ids, E_local, expert_map=None):
    slots = [local_expert(v, E_local, expert_map) for row in topk_ids for v in row]
    offsets, row_to_slot, slot_to_row = [0], [], [-1] * len(slots)
    for e in range(E_local):
        for s, local in enumerate(slots):
            if local == e:
                slot_to_row[s] = len(row_to_slot)
                row_to_slot.append(s)
        offsets.append(len(row_to_slot))
    return offsets, row_to_slot, np.reshape(np.array(slot_to_row, np.int64), topk_ids.shape)


def assert_same_map(row_map, expected):
    offsets, row_to_slot, slot_to_row = expected
    for got, want in ((row_map.expert_offsets, offsets), (row_map.row_to_slot, row_to_slot)):
        assert got.dtype == np.int64
        assert got.tolist() == list(want)
    assert row_map.slot_to_row.dtype == np.int64
    assert np.array_equal(row_map.slot_to_row, slot_to_row)
    assert row_map.P == len(row_to_slot)


def check(topk_ids, E_local, expert_map=None, backend=None):
    row_map = permute(topk_ids, E_local, expert_map=expert_map, backend=backend)
    expected = plain_permute(topk_ids, E_local, expert_map)
    assert_same_map(row_map, expected)
    counts = count_expert_num_tokens(topk_ids, E_local, expert_map, backend=backend)
    assert counts.dtype == np.int32
    assert counts.tolist() == np.diff(expected[0]).tolist()


@pytest.mark.parametrize("M", [0, 1, 2, 31, 32, 33, 257])
@pytest.mark.parametrize("E, topk", [(1, 1), (5, 3), (8, 2), (6, 6)])
def test_against_plain_loop(M, E, topk, backend):
    rng = np.random.default_rng([M, E, topk])
    check(rng.integers(-2, E + 2, (M, topk)).astype(np.int32), E, None, backend)


@pytest.mark.parametrize("E", [1, 127, 128, 129, 511, 512, 1023, 1024, 1025, 2048])
def test_B14_any_number_of_experts(E, backend):
    rng = np.random.default_rng(E)
    ids = rng.integers(0, E, (13, 4))
    ids[-1, -1] = E - 1
    row_map = permute(ids, E, backend=backend)
    assert_same_map(row_map, plain_permute(ids, E))
    assert row_map.P == ids.size


@pytest.mark.parametrize("dtype", INTEGERS)
def test_E3_every_integer_dtype(dtype, backend):
    rng = np.random.default_rng(3)
    check(rng.integers(0, 7, (9, 3)).astype(dtype), 5, None, backend)
    expert_map = np.array([2, -1, 0, 1, -1, -1, 3], np.int8).astype(dtype if dtype.startswith("i") else "int32")
    check(rng.integers(0, 9, (9, 3)).astype(dtype), 4, expert_map, backend)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_B4_no_id_wraps_into_the_range(dtype, backend):
    limits = np.iinfo(dtype)
    candidates = [limits.min, limits.max, limits.max - 1, 123456789, 2071690107, 2**31 - 1, 2**31, 2**32, 2**32 + 1,
                  256, 65536, 65537, 2**63, 2**64 - 1, -(2**32), -(2**31), -5, -1, 4, 3, 0]  # fmt: skip
    ids = np.array([[v] for v in candidates if limits.min <= v <= limits.max], dtype)
    check(ids, 4, None, backend)
    check(ids, 2, np.array([1, -1, 0, -1], np.int32), backend)


@pytest.mark.parametrize("slot", range(3))
def test_B1_minus_one_in_each_slot(slot, backend):
    ids = np.array([[0, 1, 2], [2, 1, 0], [1, 1, 1]], np.int32)
    ids[:, slot] = -1
    guarded = np.full((5, 3), 1, np.int32)
    guarded[1:4] = ids
    check(guarded[1:4], 3, None, backend)
    assert np.array_equal(guarded[[0, 4]], np.ones((2, 3)))
    assert np.array_equal(guarded[1:4], ids)


def test_B3_leading_minus_one_of_a_block(backend):
    ids = np.zeros((64, 1), np.int32)
    ids[::16] = -1
    check(ids, 1, None, backend)


def test_B15_experts_are_not_reprocessed(backend):
    ids = np.arange(5 * 7, dtype=np.int32).reshape(7, 5) % 5
    row_map = permute(ids, 5, backend=backend)
    assert sorted(row_map.row_to_slot.tolist()) == list(range(35))


@pytest.mark.parametrize("E", [0, 1, 4])
@pytest.mark.parametrize("shape", [(0, 1), (0, 8), (3, 0)])
def test_A1_A13_nothing_to_do(shape, E, backend):
    check(np.empty(shape, np.int32), E, None, backend)


def test_A9_idle_experts_at_every_place(backend):
    for live in itertools.product([False, True], repeat=4):
        ids = np.array([[e] for e in range(4) if live[e]] or np.empty((0, 1)), np.int32)
        check(ids, 4, None, backend)


def test_A15_map_without_local_experts(backend):
    ids = np.arange(12, dtype=np.int32).reshape(4, 3) % 6
    row_map = permute(ids, 2, expert_map=np.full(6, -1, np.int32), backend=backend)
    assert row_map.P == 0
    assert row_map.expert_offsets.tolist() == [0, 0, 0]
    assert (row_map.slot_to_row == -1).all()
    check(ids, 0, np.full(6, -1, np.int32), backend)
    check(np.full((4, 3), 2), 0, np.empty(0, np.int32), backend)


def test_B20_ids_are_global_where_a_map_is_given(backend):
    row_map = permute(np.array([[0], [4], [5]]), 2, expert_map=np.array([-1, -1, -1, -1, 0, 1]), backend=backend)
    assert row_map.slot_to_row.tolist() == [[-1], [0], [1]]


def test_E1_strides(backend):
    base = np.random.default_rng(1).integers(-1, 6, (24, 8)).astype(np.int32)
    for view in (base[:, ::2], base.T, base[5:], base[::-1], base[:, ::-3], np.asfortranarray(base)):
        assert_same_map(permute(view, 5, backend=backend), plain_permute(view.copy(), 5))
    expert_map = np.array([0, 9, 1, 9, -1, 9, 2, 9], np.int32)[::2]
    check(base, 3, expert_map, backend)


def test_E2_broadcast_ids(backend):
    check(np.broadcast_to(np.array([3, 1], np.int32), (17, 2)), 4, None, backend)


@pytest.mark.parametrize("M", [65535, 65536, 65537, 131073])
def test_D1_many_tokens(M, backend):
    ids = np.random.default_rng(M).integers(-1, 64, (M, 2)).astype(np.int32)
    row_map = permute(ids, 64, backend=backend)
    flat = ids.reshape(-1)
    assert np.array_equal(np.diff(row_map.expert_offsets), np.bincount(flat[flat >= 0], minlength=64))
    experts = flat[row_map.row_to_slot]
    same = experts[1:] == experts[:-1]
    assert (experts[1:] >= experts[:-1]).all()
    assert (row_map.row_to_slot[1:] > row_map.row_to_slot[:-1])[same].all()
    live = flat >= 0
    assert np.array_equal(row_map.row_to_slot[row_map.slot_to_row.reshape(-1)[live]], np.flatnonzero(live))
    assert (row_map.slot_to_row.reshape(-1)[~live] == -1).all()


def test_B21_counts_equal_a_bincount():
    ids = np.random.default_rng(21).integers(0, 40, (5000, 6))
    assert np.array_equal(count_expert_num_tokens(ids, 40), np.bincount(ids.reshape(-1), minlength=40))


@pytest.mark.parametrize("backend", HOST)
def test_D3_rows_beyond_2_to_the_31_elements(sparse, backend):
    M = 2**31 // 4096 + 3
    x = sparse((M, 4096))
    x[-1], x[-2] = 7, 5
    ids = np.full((M, 1), -1, np.int8)
    ids[-2:] = [[1], [0]]
    rows = permute_rows(x, permute(ids, 2), backend=backend)
    assert rows.shape == (2, 4096)
    assert (rows[0] == 7).all()
    assert (rows[1] == 5).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_do_not_depend_on_threads(threads, monkeypatch, backend):
    monkeypatch.setenv("PYMOE_NUM_THREADS", str(threads))
    rng = np.random.default_rng(1)
    x, ids = rng.standard_normal((3000, 701)).astype(np.float32), rng.integers(0, 5, (3000, 2))
    row_map = permute(ids, 5)
    assert np.array_equal(permute_rows(x, row_map, backend=backend), x[row_map.row_to_token])


def test_D15_sizes_as_numpy_integers(backend):
    check(np.array([[2], [0]]), np.int32(3), None, backend)


def test_B18_repeats_are_equal(backend):
    ids = np.random.default_rng(18).integers(0, 3, (400, 4))
    first = permute(ids, 3, backend=backend)
    for _ in range(20):
        again = permute(ids, 3, backend=backend)
        assert np.array_equal(first.row_to_slot, again.row_to_slot)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_property_backends_agree_with_the_loop(data):
    E, M, topk = (data.draw(st.integers(lo, hi)) for lo, hi in ((0, 6), (0, 9), (1, 4)))
    ids = np.array(data.draw(st.lists(st.integers(-3, 9), min_size=M * topk, max_size=M * topk)), np.int64)
    mapping = data.draw(st.none() | st.lists(st.integers(-1, E - 1), max_size=8).map(lambda m: np.array(m, np.int32)))
    for backend in HOST:
        check(ids.reshape(M, topk), E, mapping, backend)


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, "uint8", "int8", "float64"])
def test_permute_rows_gathers_any_dtype(dtype, backend):
    ids = np.array([[1, 0], [-1, 1], [0, 0]])
    x = np.arange(15).reshape(3, 5).astype(dtype)
    rows = permute_rows(x, permute(ids, 2), backend=backend)
    assert rows.dtype == x.dtype
    assert rows.tolist() == [x[t].tolist() for t in (0, 2, 2, 0, 1)]
    rows[...] = 0
    assert x.any()


def test_permute_rows_keeps_nan_payload_bits(backend):
    x = np.array([[0x7FC00001, 0xFFC12345], [0x7F800001, 0]], np.uint32).view(np.float32)
    rows = permute_rows(x, permute(np.array([[1], [0]]), 2), backend=backend)
    assert np.array_equal(rows.view(np.uint32), x[::-1].view(np.uint32))


@pytest.mark.parametrize("K", [0, 1, 65, 130])
def test_permute_rows_strides_and_widths(K, backend):
    base = np.random.default_rng(K).standard_normal((6, 2 * K + 1)).astype(np.float32)
    row_map = permute(np.array([[1], [0], [1]]), 2)
    for x in (base[::2, 1::2], base[3:, :K], np.broadcast_to(base[0], (3, 2 * K + 1)), base[2::-1]):
        assert np.array_equal(permute_rows(x, row_map, backend=backend), np.array([x[1], x[0], x[2]]))


def test_permute_rows_refuses_another_number_of_tokens():
    with pytest.raises(ShapeError, match=r"^permute_rows: x must have shape \(2, any\); got \(3, 4\)\.$"):
        permute_rows(np.zeros((3, 4)), permute(np.zeros((2, 1), int), 1))


@pytest.mark.parametrize(
    "ids, E_local, expert_map, error, text",
    [
        ([[0]], 1, None, DTypeError, "topk_ids must be a NumPy, CuPy or DLPack array; got list"),
        (np.zeros((1, 1), np.float32), 1, None, DTypeError, "topk_ids must have an integer dtype; got float32"),
        (np.zeros((1, 1), bool), 1, None, DTypeError, "topk_ids must have an integer dtype; got bool"),
        (np.zeros(3, np.int32), 1, None, ShapeError, "topk_ids must have shape"),
        (np.zeros((1, 1), np.int32), -1, None, ArgumentError, "E_local must be at least 0; got -1"),
        (np.zeros((1, 1), np.int32), True, None, DTypeError, "E_local must be an integer; got True"),
        (np.zeros((1, 1), np.int32), 1, np.array([0, 1]), ArgumentError, "expert_map must hold -1 or local ids"),
        (np.zeros((1, 1), np.int32), 1, np.array([0.0]), DTypeError, "expert_map must have an integer dtype"),
        (np.zeros((1, 1), np.int32), 1, np.zeros((1, 1), int), ShapeError, "expert_map must have shape"),
    ],
)
@pytest.mark.parametrize("call", [permute, count_expert_num_tokens])
@pytest.mark.parametrize("backend", [None, *DEVICES])
def test_bad_arguments_are_named(call, ids, E_local, expert_map, error, text, backend):
    if backend in ON_DEVICE and not isinstance(ids, np.ndarray):
        pytest.skip("a list is refused before it is known where the others are")
    checked(True)  # else a map in device memory is not looked at
    with pytest.raises(error) as caught:
        call(ids, E_local, expert_map=expert_map, backend=backend)
    assert str(caught.value).startswith(f"{call.__name__}: {text}")


def test_unknown_backend_is_refused():
    with pytest.raises(ArgumentError, match="^permute: backend must be"):
        permute(np.zeros((1, 1), int), 1, backend="fast")


def test_checked_mode_names_row_slot_and_id(backend):
    ids = np.array([[0, -1], [1, 7]])
    before = checked(True)
    try:
        permute(np.array([[0, -1]]), 2, backend=backend)
        with pytest.raises(ArgumentError, match="got 7 at row 1, slot 1"):
            permute(ids, 2, backend=backend)
    finally:
        checked(before)
    assert permute(ids, 2, backend=backend).P == 2


def plain_align(topk_ids, block, E, expert_map=None, pad=False, ignore=False):
    """Return the lists that the description promises, from Python lists only."""
    flat = [int(v) for row in topk_ids for v in row]
    S = len(flat)
    capacity = S + E * (block - 1)
    if pad:
        capacity = -(-capacity // block) * block
    if S < E:
        capacity = min(S * block, capacity)
    space = None if not ignore else expert_map
    keys = [v if 0 <= v < E else -1 for v in flat]
    keys = [int(space[v]) if v >= 0 and space is not None else v for v in keys]
    entries, experts = [], []
    for e in range(E):
        mine = [s for s in range(S) if keys[s] == e]
        while mine:
            entries += (mine[:block] + [S] * block)[:block]
            experts.append(e if expert_map is None or ignore else int(expert_map[e]))
            mine = mine[block:]
    used = len(entries)
    entries += [S] * (capacity - used)
    experts += [-1] * (-(-capacity // block) - len(experts))
    return entries, experts, [used], [[s] if keys[s] >= 0 else [-1] for s in range(S)]


@pytest.mark.parametrize("pad, ignore", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("M, topk, E", [(0, 2, 4), (1, 2, 8), (3, 2, 6), (40, 3, 5), (7, 4, 4), (5, 1, 1)])
@pytest.mark.parametrize("backend", [None, *DEVICES])
def test_align_against_plain_loop(M, topk, E, block, with_map, pad, ignore, backend):
    rng = np.random.default_rng([M, E, block])
    ids = rng.integers(-1, E + 1, (M, topk)).astype(np.int32)
    expert_map = rng.permutation(np.r_[np.arange((E + 1) // 2), np.full(E // 2, -1)]).astype(np.int32)
    expert_map = expert_map if with_map else None
    scatter = ignore or not with_map
    got = moe_align_block_size(ids, block, E, expert_map, pad, ignore, return_scatter_idx=scatter, backend=backend)
    want = plain_align(ids, block, E, expert_map, pad, ignore)
    for array, expected in zip(got, want, strict=False):
        assert array.dtype == np.int32
        assert array.tolist() == expected
    assert len(got) == (4 if scatter else 3)
    if scatter:
        assert got[3].shape == (M * topk, 1)


@pytest.mark.parametrize("E", [1023, 1024, 1025])
def test_B14_align_has_no_limit_of_experts(E):
    ids = np.array([[E - 1, 0], [E - 1, E]], np.int32)
    slots, experts, used = moe_align_block_size(ids, 2, E)
    assert slots[:4].tolist() == [1, 4, 0, 2]
    assert experts[:3].tolist() == [0, E - 1, -1]
    assert used.tolist() == [4]


def test_align_refusals():
    ids = np.zeros((2, 1), np.int32)
    with pytest.raises(ArgumentError, match="ignore_invalid_experts must be True for return_scatter_idx"):
        moe_align_block_size(ids, 2, 2, np.array([0, 1]), return_scatter_idx=True)
    with pytest.raises(ShapeError, match="expert_map must have shape"):
        moe_align_block_size(ids, 2, 2, np.array([0, 1, -1]))
    with pytest.raises(ArgumentError, match="block_size must be at least 1"):
        moe_align_block_size(ids, 0, 2)
    with pytest.raises(DTypeError, match="topk_ids must have an integer dtype"):
        moe_align_block_size(ids.astype(float), 2, 2)


def test_D8_align_capacity_beyond_int32_is_refused():
    with pytest.raises(UnsupportedError, match=r"^moe_align_block_size: capacity must fit int32; got \d+\."):
        moe_align_block_size(np.zeros((2, 1), np.int32), 2**31, 1)
    with pytest.raises(UnsupportedError, match="^batched_moe_align_block_size: capacity must fit int32"):
        batched_moe_align_block_size(2**30, 64, np.zeros(4, np.int32))


@pytest.mark.parametrize("counts", [[], [0], [3, 0, 5], [5, 5], [0, 0, 1]])
@pytest.mark.parametrize("block", [1, 2, 8])
def test_batched_align_against_plain_loop(counts, block):
    T = 5
    entries, experts = [], []
    for b, n in enumerate(counts):
        mine = [b * T + i for i in range(n)]
        while mine:
            entries += (mine[:block] + [len(counts) * T] * block)[:block]
            experts.append(b)
            mine = mine[block:]
    capacity = len(counts) * -(-T // block) * block
    got = batched_moe_align_block_size(T, block, np.array(counts, np.int32))
    assert got[0].tolist() == entries + [len(counts) * T] * (capacity - len(entries))
    assert got[1].tolist() == experts + [-1] * (capacity // block - len(experts))
    assert got[2].tolist() == [len(entries)]
    assert all(array.dtype == np.int32 for array in got)


@pytest.mark.parametrize("counts", [[6], [-1]])
def test_batched_align_refuses_impossible_counts(counts):
    with pytest.raises(ArgumentError, match=r"expert_num_tokens must be in 0\.\.5; got -?\d at 0"):
        batched_moe_align_block_size(5, 2, np.array(counts))


@pytest.mark.parametrize("module", ["pymoe.ops.permute", "pymoe.ops.permute.align"])
def test_examples_in_the_docstrings(module):
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted
    assert not found.failed
