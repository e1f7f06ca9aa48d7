"""Which kernel is chosen, without a GPU: by formats, K and scales, never by rows; within what a block may have."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from pymoe.device.arch import ARCHS
from pymoe.ops.grouped_gemm._cuda_instances import TILE_ROWS, Operands, all_instances, choose, choose_tile_rows

PAIRS = {
    Operands("BF16", "BF16", 2880): "BF16, BF16, None, 32",
    Operands("FP16", "FP16", 8): "FP16, FP16, None, 32",
    Operands("BF16", "E4M3", 2048): "BF16, E4M3, None, 32",
    Operands("FP16", "E4M3", 2048, 32, scale="E8M0"): "FP16, E4M3, Sums, 32",
    Operands("BF16", "E4M3", 2048, 32, scale="E8M0"): "BF16, E4M3, Fold, 32",
    Operands("BF16", "E4M3", 2048, 128): "BF16, E4M3, Sums, 32",
    Operands("E4M3", "E4M3", 2048): "E4M3, E4M3, None, 32",
    Operands("E4M3", "E4M3", 2048, 128, True, uniform=True): "E4M3, E4M3, Blocks, 128",
    Operands("E4M3", "E4M3", 2048, 128, True, uniform=False): "E4M3, E4M3, Blocks, 32",
    Operands("E4M3", "E4M3", 2048, 32, True, "E8M0"): "E4M3, E4M3, Blocks, 32",
    Operands("S8", "S8", 2048): "S8, S8, None, 32",
    Operands("S8", "S8", 2048, 128, True): "S8, S8, Blocks, 128",
    Operands("S8", "S8", 2048, 64, True): "S8, S8, Blocks, 32",
    Operands("BF16", "U8", 2048, 2048): "BF16, U8, Sums, 32",
    Operands("FP16", "U4", 2048, 128): "FP16, U4, Sums, 32",
    Operands("BF16", "U4", 2016, 2016): "BF16, U4, Sums, 32",
    Operands("BF16", "E2M1", 2880, 32, scale="E8M0"): "BF16, E2M1, Fold, 32",
    Operands("FP16", "E2M1", 2880, 32, scale="E8M0"): "FP16, E2M1, Sums, 32",
    Operands("FP16", "E2M1", 2880, 16, scale="E4M3"): "FP16, E2M1, Fold, 16",
    Operands("E4M3", "E2M1", 2880, 32, True, "E8M0"): "E4M3, E2M1, Blocks, 32",
    Operands("E2M1", "E2M1", 2880, 16, True, "E4M3"): "E2M1, E2M1, Blocks, 16",
}
ELSEWHERE = [
    Operands("F32", "F32", 2048),
    Operands("F32", "BF16", 2048),
    Operands("BF16", "FP16", 2048),
    Operands("F32", "U4", 2048, 128),
    Operands("BF16", "BF16", 2052),  # rows of 4,104 bytes are no whole pieces of 16
    Operands("BF16", "U4", 2064, 2064),
    Operands("S8", "S8", 2056),
    Operands("BF16", "U4", 2048, 100),
    Operands("E4M3", "E4M3", 2048, 100, True),
    Operands("BF16", "BF16", 1 << 23),
]


def formats(instance):
    return instance.kernel.expression.replace("pymoe::Format::k", "").replace("pymoe::Scaling::k", "")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_pair_has_its_kernel_in_every_tile(arch):
    known = all_instances(arch)
    for operands, expected in PAIRS.items():
        for rows in TILE_ROWS:
            instance = choose(operands, rows, arch)
            assert rows % instance.rows == 0 and rows <= 2 * instance.rows
            assert f"<{expected}, {instance.rows}, " in formats(instance) and instance in known


@pytest.mark.parametrize("a", ["BF16", "FP16"])
@pytest.mark.parametrize("rows", [64, 128])
def test_sm90a_multiplies_16_bit_floats_in_one_piece_its_own_way(a, rows):
    """Long sums in wider tiles; rows that lie apart, and lists for few rows, go the portable way."""
    for K, activated, direct in itertools.product((8, 2048, 8184, 8192, 14336), (False, True), (False, True)):
        instance = choose(Operands(a, a, K, scattered=False, activated=activated, direct=direct), rows, "sm_90a")
        turns = direct and K < 8192
        flags = ", ".join(str(flag).lower() for flag in (turns, turns and activated))
        assert formats(instance) == f"pymoe::grouped_gemm_sm90_kernel<{a}, {flags}>"
        assert instance.mapped and instance in all_instances("sm_90a")
    known = Operands(a, a, 2048, scattered=False)
    others = [choose(known, rows, arch) for arch in ARCHS if arch != "sm_90a"]
    others += [choose(known, 16, "sm_90a"), choose(known._replace(scattered=True), rows, "sm_90a")]
    others += [choose(known._replace(K=K), rows, "sm_90a") for K in (0, 2052)]
    assert not any(instance.mapped for instance in others)


@pytest.mark.parametrize("a", ["BF16", "FP16"])
@pytest.mark.parametrize("rows", [96, 192])
def test_lists_of_even_tiles_are_for_swapped_operands(a, rows):
    """Where answers are direct; other answers, architectures and rows that lie apart take the list all the same."""
    known = Operands(a, a, 2048, scattered=False)
    for K, activated in itertools.product((8, 8192, 14336), (False, True)):
        instance = choose(known._replace(K=K, activated=activated), rows, "sm_90a")
        flags = f"{str(activated).lower()}, {rows}"
        assert formats(instance) == f"pymoe::grouped_gemm_sm90_swapped_kernel<{a}, {flags}>"
        assert instance.mapped and instance.swapped and instance in all_instances("sm_90a")
    others = [choose(known, rows, arch) for arch in ARCHS if arch != "sm_90a"]
    others += [
        choose(known._replace(**other), rows, "sm_90a") for other in ({"scattered": True}, {"K": 0}, {"a": "F32"})
    ]
    assert not any(instance.mapped for instance in others)
    others.append(choose(known._replace(direct=False), rows, "sm_90a"))
    assert others[-1].mapped == (rows <= 128)
    for instance in others:
        assert not instance.swapped and instance.rows * 2 >= rows and instance.rows in TILE_ROWS


def test_which_rows_are_copied_together(monkeypatch):
    from pymoe.codec.weights import WeightOperand
    from pymoe.ops.grouped_gemm import _cuda

    def asked(arch, dtype, weights, expert_rows, K=64, direct=True):
        monkeypatch.setattr(_cuda.archs, "current_arch", lambda: arch)
        operand = WeightOperand.unquantized(np.zeros((1, 8, K), weights))
        return _cuda.tiles_together(np.zeros((1, K), dtype), operand, expert_rows, direct)

    bf16 = ml_dtypes.bfloat16
    few, many = (96, True), (192, True)
    expected = {0: None, 24: None, 25: few, 64: few, 78: few, 79: many, 128: many, 346: many, 347: (128, False)}
    assert {rows: asked("sm_90a", bf16, bf16, rows) for rows in expected} == expected
    assert [asked("sm_90a", bf16, bf16, rows, direct=False) for rows in (24, 25, 128)] == [None, *[(128, False)] * 2]
    assert asked("sm_90a", np.float16, np.float16, 1000) == (128, False)
    assert asked("sm_90a", np.float16, bf16, 128) is asked("sm_90a", np.float32, np.float32, 128) is None
    assert asked("sm_90a", bf16, bf16, 128, K=60) is asked("sm_100a", bf16, bf16, 128) is None
    assert asked("sm_90a", np.uint8, bf16, 128) is None  # codes


@pytest.mark.parametrize("operands", ELSEWHERE)
def test_everything_else_is_multiplied_without_tensor_cores(operands):
    for rows in TILE_ROWS:
        instance = choose(operands, rows, "sm_90a")
        plain = str(operands.a == operands.b == "F32").lower()
        opposite = {"true": "false", "false": "true"}[plain]
        assert instance.kernel.expression == f"pymoe::grouped_gemm_simt_kernel<{opposite}, {rows}>"
        assert instance in all_instances("sm_90a")


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_fit_their_architecture(arch):
    for instance in all_instances(arch):
        assert instance.shared_bytes <= ARCHS[arch].shared_bytes
        own = instance.mapped
        assert instance.threads == 384 if own else instance.threads <= 256
        assert instance.rows in ((96, 192) if instance.swapped else TILE_ROWS)
        assert instance.columns in ((192, 256) if own and not instance.swapped else (64, 128))


def test_native_is_what_tensor_cores_multiply_as_it_is():
    fp8 = Operands("E4M3", "E4M3", 2048)
    assert [arch for arch in ARCHS if choose(fp8, 64, arch).native] == ["sm_89", "sm_120"]
    assert choose(Operands("S8", "S8", 2048), 64, "sm_80").native
    assert not choose(Operands("BF16", "U4", 2048, 128), 64, "sm_90a").native
    assert choose(Operands("F32", "F32", 7), 64, "sm_80").native


def test_tiles_grow_with_the_rows_of_an_expert():
    found = [choose_tile_rows(M, 8, 128) for M in (0, 1, 128, 256, 512, 1024, 4096, 100_000)]
    assert found == sorted(found) and set(found) == set(TILE_ROWS)
    assert choose_tile_rows(1024, 8, 16, 128) == choose_tile_rows(1024, 8, 128)  # slots of other ranks have no rows
    assert choose_tile_rows(1, 1, 1) == 16 and choose_tile_rows(5, 2, 0) in TILE_ROWS
