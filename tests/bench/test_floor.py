"""The floor: least work against numbers computed by hand, and which rate bounds it."""

from __future__ import annotations

import numpy as np
import pytest

from pymoe.bench import rates
from pymoe.bench.cases import Shape, draw_weights
from pymoe.bench.floor import Rates, Work, floor, work
from pymoe.bench.reference import Quantized


def test_least_work_of_a_call():
    # Two GEMMs: 3 tokens * 2 experts * (2*6 + 6) rows * 8 columns * 2 = 1728; router: 3 * 4 * 8 * 2 = 192.
    # Read: 3 experts of 100 bytes, a router of 4 * 8 numbers; tokens 3 * 8 read and 3 * 8 written, 2 bytes each.
    assert work(Shape(4, 2, 8, 6), 3, 3, 100, 2) == Work(flops=1920, bytes=300 + 64 + 96)


def test_the_slower_of_the_two_bounds():
    assert floor(Work(flops=1000, bytes=50), Rates(read=10, gemm=500)) == (5.0, "bytes")
    assert floor(Work(flops=1000, bytes=50), Rates(read=100, gemm=500)) == (2.0, "flops")


@pytest.mark.parametrize(
    "scheme, expected",
    [
        ("fp32", 3 * 128 * 128 * 4),
        ("bf16", 3 * 128 * 128 * 2),
        ("int8", 3 * 128 * 128 + (256 + 128) * 4),  # a float32 scale a row
        ("fp8", 3 * 128 * 128 + (256 + 128) * 4),
        ("int4", 3 * 128 * 128 / 2 + (256 + 128) * 4),  # and for each group of 128: one a row
        ("int4_w4a16_zp", 3 * 128 * 128 / 2 + (256 + 128) * 4 + (256 + 128) / 2),
        ("mxfp4", 3 * 128 * 128 / 2 + (256 + 128) * 4),  # four e8m0 bytes a row
        ("nvfp4", 3 * 128 * 128 / 2 + (256 + 128) * 8 + 8),  # eight bytes a row, two float32 an expert
    ],
)
def test_bytes_of_an_expert(scheme, expected):
    assert Quantized.of(draw_weights(Shape(2, 1, 128, 128), 0)[0], scheme).expert_bytes == expected


def test_the_floor_takes_the_fastest_gemm_that_holds_the_numbers():
    measured = {"fp32": {"numpy": 2.0, "torch": 3.0}, "bf16": {"torch": 9.0}, "int8": {"torch": 10.0}}
    expected = {"fp32": (3.0, "torch fp32"), "bf16": (9.0, "torch bf16"), "fp8": (9.0, "torch bf16"),
                "int8": (10.0, "torch int8"), "int8_w8a8_block": (10.0, "torch int8"),
                "int8_w8a16": (9.0, "torch bf16"), "mxfp4": (10.0, "torch int8"),
                "mxfp4_w4a16": (9.0, "torch bf16")}  # fmt: skip
    assert {scheme: rates.best_gemm(measured, scheme) for scheme in expected} == expected
    assert rates.best_gemm({"fp32": {"numpy": 2.0}}, "int8") == (2.0, "numpy fp32")


def test_rates_are_measured():
    for nbytes in (1, 1 << 15, 1 << 22):
        assert 1e8 < rates.measure_read(nbytes, 0.01) < 1e13
    assert 1e8 < rates.measure_gemm(64, 0.01, 1)["fp32"]["numpy"] < 1e14


def test_every_word_is_read():
    from pymoe.bench import _numba

    words = np.arange(3 * _numba.LINE, dtype=np.int64) ** 2
    results = np.empty(3, np.int64)
    _numba.read_all(words, results)
    assert results.tolist() == [int(np.bitwise_xor.reduce(part)) for part in np.split(words, 3)]
