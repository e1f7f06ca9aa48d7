"""What a sort leaves on the device beside the row map: tiles, slabs, live tokens and rows moved to their places."""

from __future__ import annotations

import numpy as np
import pytest

from pymoe.ops.grouped_gemm import _cuda as gemm
from pymoe.ops.permute import _cuda, _numpy
from tests.ops import devices
from tests.ops.devices import DEVICES


@pytest.fixture(params=DEVICES)
def on_device(request):
    """Return a caller of functions with NumPy arguments: arrays go to the device, and come back as NumPy arrays."""
    if request.param == "cuda":
        import cupy

        def call(function, *args, **options):
            found = function(*(devices.to_cupy(x) if isinstance(x, np.ndarray) else x for x in args), **options)
            return fetched(found, cupy.asnumpy)

        yield call
    else:
        with devices.emulation():
            yield lambda function, *args, **options: function(*args, **options)


def fetched(found, fetch):
    if isinstance(found, tuple):
        return tuple(map(fetch, found))
    if not hasattr(found, "__dict__"):
        return found
    changed = {name: fetch(x) if hasattr(x, "shape") else x for name, x in vars(found).items()}
    return type(found)(**changed)


def tiles_of(counts, starts, tile_rows):
    return [
        [e, starts[e] + done, min(tile_rows, n - done), 0]
        for e, n in enumerate(counts)
        for done in range(0, n, tile_rows)
    ]


SHAPES = [(0, 4, 2), (3, 4, 0), (1, 1, 1), (1, 128, 8), (31, 8, 2), (257, 6, 6), (128, 256, 8), (13, 2048, 4),
          (40, 3000, 3), (1100, 8, 8), (700, 300, 13)]  # fmt: skip


def routing(M, E, topk, with_map):
    rng = np.random.default_rng([M, E, topk])
    ids = rng.integers(-2, E + 2, (M, topk))
    expert_map = rng.permutation(np.r_[np.arange((E + 1) // 2), np.full(E // 2, -1)]).astype(np.int32)
    return ids, ((E + 1) // 2, expert_map) if with_map else (E, None)


@pytest.mark.parametrize("tile_rows", [1, 16, 64])
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("M, E, topk", SHAPES)
def test_tiles_cover_the_rows_of_each_expert(M, E, topk, with_map, tile_rows, on_device):
    ids, (E_local, expert_map) = routing(M, E, topk, with_map)
    got = on_device(_cuda.permute, ids, E_local, expert_map, tile_rows)
    offsets = _numpy.permute(ids, E_local, expert_map).expert_offsets
    want = tiles_of(np.diff(offsets).tolist(), offsets.tolist(), tile_rows)
    assert got.tile_count.tolist() == [len(want)] and len(want) <= len(got.tiles)
    assert got.tiles[: len(want)].tolist() == want


def even_tiles_of(counts, starts, tile_rows):
    """As few tiles as hold an expert's rows, of a multiple of eight each but for the last; the longest first."""
    found = []
    for e, n in enumerate(counts):
        each = -(-n // max(-(-n // tile_rows), 1))
        each += -each % 8
        tiles = [[e, starts[e] + done, min(each, n - done), 0] for done in range(0, n, each or 1)]
        assert len(tiles) == -(-n // tile_rows) and all(0 < tile[2] <= tile_rows for tile in tiles)
        found.append((-each, tiles))
    return [tile for _, tiles in sorted(found, key=lambda pair: pair[0]) for tile in tiles]


@pytest.mark.parametrize("tile_rows", [8, 96, 192])
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("M, E, topk", [*SHAPES, (3000, 4, 2)])
def test_even_tiles_the_longest_first(M, E, topk, with_map, tile_rows, on_device):
    ids, (E_local, expert_map) = routing(M, E, topk, with_map)
    ids[: M // 2] = ids[: M // 2] // 3  # some experts have many rows
    got = on_device(_cuda.permute, ids, E_local, expert_map, tile_rows, even=True)
    offsets = _numpy.permute(ids, E_local, expert_map).expert_offsets
    want = even_tiles_of(np.diff(offsets).tolist(), offsets.tolist(), tile_rows)
    assert got.tile_count.tolist() == [len(want)] and len(want) <= len(got.tiles)
    assert got.tiles[: len(want)].tolist() == want
    tiles, count, _ = on_device(gemm.list_tiles, offsets.astype(np.int32), M * topk, tile_rows, True)
    assert count.tolist() == [len(want)] and tiles[: len(want)].tolist() == want


@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("M, E, topk", SHAPES)
def test_slabs_hold_each_token_of_an_expert_once(M, E, topk, with_map, on_device):
    ids, (E_local, expert_map) = routing(M, E, topk, with_map)
    ids[::3] = ids[::3, :1]  # tokens that name one expert in all their slots
    rows, tile_rows = max(1, M), 16
    got = on_device(_cuda.permute_slabs, ids, E_local, expert_map, rows, tile_rows)
    local = _numpy.local_experts(ids, E_local, expert_map).reshape(ids.shape)
    counts, places = [0] * E_local, {}
    for t, j in np.ndindex(ids.shape):
        e = local[t, j]
        if e >= 0 and (t, e) not in places:
            places[t, e] = e * rows + counts[e]
            counts[e] += 1
    want = [[places.get((t, local[t, j]), -1) for j in range(topk)] for t in range(M)]
    assert got.slot_to_row.tolist() == want
    assert got.expert_num_tokens.tolist() == counts
    tiles = tiles_of(counts, [e * rows for e in range(E_local)], tile_rows)
    for listed, count in (
        (got.tiles, got.tile_count), on_device(_cuda.work_list, np.array(counts, np.int32), rows, tile_rows)
    ):  # fmt: skip
        assert count.tolist() == [len(tiles)]
        assert listed[: len(tiles)].tolist() == tiles


def test_a_full_slab_takes_no_more(on_device):
    ids = np.zeros((5, 2), np.int32)
    ids[:, 1] = 1
    got = on_device(_cuda.permute_slabs, ids, 2, None, 3, 16)
    assert got.slot_to_row.tolist() == [[0, 3], [1, 4], [2, 5], [-1, -1], [-1, -1]]
    assert got.expert_num_tokens.tolist() == [3, 3]


@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("M, E, topk", SHAPES)
def test_live_tokens_have_a_row(M, E, topk, with_map, on_device):
    ids, (E_local, expert_map) = routing(M, E, topk, with_map)
    live = on_device(_cuda.live_tokens, ids, E, E_local, expert_map)
    rows = _numpy.permute(ids, E_local, expert_map).slot_to_row
    assert live.astype(bool).tolist() == (rows >= 0).any(axis=1).tolist()


@pytest.mark.parametrize("columns", [1, 2, 12, 40, 4112])
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_move_in_units_that_fit(columns, offset, on_device):
    rng = np.random.default_rng(columns)
    ids = rng.integers(-1, 6, (20, 3))
    row_map = _numpy.permute(ids, 6, None)
    x = rng.integers(0, 256, 20 * columns + offset).astype(np.uint8)

    def moved(flat, slot_to_row):
        rows = np.full if isinstance(flat, np.ndarray) else __import__("cupy").full
        out = rows((60, columns), 7, np.uint8)
        _cuda.scatter_rows(flat[offset:].reshape(20, columns), slot_to_row, out)
        return (out,)

    (out,) = on_device(moved, x, row_map.slot_to_row.astype(np.int32))
    assert np.array_equal(out[: row_map.P], x[offset:].reshape(20, columns)[row_map.row_to_token])
    assert (out[row_map.P :] == 7).all()


@pytest.mark.gpu
def test_D7_D10_rows_beyond_2_to_the_31_bytes_and_65535_tokens(cuda):
    M, columns = 600_000, 4096
    x = cuda.zeros((M, columns), cuda.uint8)
    x[-1], x[-2], x[0] = 3, 2, 1
    ids = cuda.zeros((M, 1), cuda.int64)
    ids[0] = 1
    row_map = _cuda.permute(ids, 2, None, 64)
    rows = cuda.zeros((M, columns), cuda.uint8)
    _cuda.scatter_rows(x, row_map.slot_to_row, rows)
    assert [int(rows[r].min()) for r in (-1, -2, -3, 0)] == [1, 3, 2, 0]
    assert [int(rows[r].max()) for r in (-1, -2, -3, 0)] == [1, 3, 2, 0]
    assert row_map.expert_offsets.tolist() == [0, M - 1, M]
