"""The blueprint's promises on the CPU: threads, processes, chunks, fork, interrupts, failures, soak."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import pymoe
from pymoe import MoELayer
from tests.selection import BF16, selection

ROOT = Path(__file__).parents[1]
SCHEMES = ["fp32", "fp8_w8a8", "fp8_w8a8_tensor", "fp8_w8a8_block", "int8_w8a8", "int4_w4a16", "mxfp4", "nvfp4"]
E, K, WIDTH, TOPK = 5, 128, 64, 3


def random_layer(scheme="fp32", seed=0, **options):
    rng = np.random.default_rng(seed)
    w1 = (rng.standard_normal((E, 2 * WIDTH, K)) / 8).astype(np.float32)
    w2 = (rng.standard_normal((E, K, WIDTH)) / 6).astype(np.float32)
    w1, w2, config = pymoe.quantize_experts(w1, w2, scheme)
    gate = rng.standard_normal((E, K)).astype(np.float32)
    return MoELayer(w1, w2, topk=TOPK, gate=gate, quant_config=config, **options)


def tokens(M, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((M, K)).astype(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_1_inputs_are_never_written(scheme):
    rng = np.random.default_rng(0)
    w1, w2, config = pymoe.quantize_experts(
        rng.standard_normal((E, 2 * WIDTH, K)).astype("f4"), rng.standard_normal((E, K, WIDTH)).astype("f4"), scheme
    )
    desc = [getattr(config, part).scale for part in ("w1", "w2")] if config is not None else []
    arrays = [w1, w2, tokens(9), rng.standard_normal((E, K)).astype("f4"), *(a for a in desc if a is not None)]
    for array in arrays:
        array.flags.writeable = False  # a write would raise; a cast copy is seen by the digest
    digest = [hashlib.sha256(array.tobytes()).digest() for array in arrays]
    layer = MoELayer(w1, w2, topk=TOPK, gate=arrays[3], quant_config=config, shared_experts=lambda x: x)
    layer(arrays[2])
    layer.warm_up(3)
    assert [hashlib.sha256(array.tobytes()).digest() for array in arrays] == digest


@pytest.mark.parametrize("scheme", SCHEMES)
def test_G15_a_hundred_calls_have_the_same_bits(scheme):
    layer, x = random_layer(scheme), tokens(33)
    assert len({layer(x).tobytes() for _ in range(100)}) == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_2_the_number_of_threads_does_not_change_bits(threads, monkeypatch):
    expected = {scheme: random_layer(scheme)(tokens(70)).tobytes() for scheme in SCHEMES}
    monkeypatch.setenv("PYMOE_NUM_THREADS", str(threads))
    for scheme in SCHEMES:
        assert random_layer(scheme)(tokens(70)).tobytes() == expected[scheme], scheme


def test_2_another_process_has_the_same_bits():
    code = (
        "import hashlib; from tests.test_promises import *;"
        "print(hashlib.sha256(b''.join(random_layer(s)(tokens(33)).tobytes() for s in SCHEMES)).hexdigest())"
    )
    here = hashlib.sha256(b"".join(random_layer(s)(tokens(33)).tobytes() for s in SCHEMES)).hexdigest()
    env = os.environ | {"PYMOE_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=280)
    assert done.stdout.strip() == here, done.stderr


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "fp8_w8a8_tensor"])
def test_batch_invariance_a_rows_bits_depend_on_no_other_row(scheme):
    """Alone, among others, in another order, with other neighbours, in chunks: the same bits."""
    layer, x = random_layer(scheme), tokens(40)
    alone = np.concatenate([layer(x[m : m + 1]) for m in range(40)])
    np.testing.assert_array_equal(layer(x), alone)
    for M in (2, 3, 5, 8, 17, 31):
        np.testing.assert_array_equal(layer(x[:M]), alone[:M])
    order = np.random.default_rng(3).permutation(40)
    np.testing.assert_array_equal(layer(x[order]), alone[order])
    for chunk in (1, 3, 16, 39):
        np.testing.assert_array_equal(random_layer(scheme, chunk_size=chunk)(x), alone)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_3_a_nan_stays_in_its_row(scheme):
    layer, x = random_layer(scheme), tokens(12)
    scale, ids = pymoe.select_experts(layer.gate(x), TOPK)
    clean = layer(x, topk_weights=scale, topk_ids=ids)
    x[5] = np.nan
    y = layer(x, topk_weights=scale, topk_ids=ids)
    others = np.arange(12) != 5
    np.testing.assert_array_equal(y[others], clean[others])
    assert np.isnan(y[5]).any()


def test_4_bad_arguments_raise_before_work_and_leave_the_layer_right():
    layer, x = random_layer(), tokens(9)
    expected = layer(x)
    out = np.full_like(x, 7)
    for bad in ({"topk_ids": np.zeros((9, TOPK), int)}, {"router_logits": np.zeros((9, E + 1))}, {"out": out[:3]}):
        with pytest.raises(pymoe.PymoeError):
            layer(x, **bad)
        assert (out == 7).all()
        np.testing.assert_array_equal(layer(x), expected)


def test_8_numpy_error_state_is_unchanged():
    before = np.geterr()
    layer, x = random_layer("fp8_w8a8"), tokens(9)
    x[0, :4] = np.inf, np.nan, 3e38, 1e-45
    with np.errstate(all="raise"):
        during = np.geterr()
        layer(x)
        assert np.geterr() == during
    assert np.geterr() == before


def test_G12_outputs_alias_neither_inputs_nor_earlier_outputs():
    """G12: the first answer is held while two more calls run."""
    layer, x = random_layer(), tokens(20)
    first = layer(x)
    copy = first.copy()
    second, third = layer(x * 2), layer(x * 3)
    np.testing.assert_array_equal(first, copy)
    for a, b in ((first, second), (second, third), (first, x), (first, third)):
        assert not np.shares_memory(a, b)


def test_two_python_threads_on_one_layer_and_on_two():
    shared, x = random_layer("fp8_w8a8"), tokens(50)
    own = [random_layer("fp8_w8a8"), random_layer("mxfp4")]
    expected = shared(x), own[1](x)
    wrong = []

    def work(index):
        for _ in range(30):
            if not np.array_equal(shared(x), expected[0]):
                wrong.append("shared")
            if not np.array_equal(own[index](x), expected[index]):
                wrong.append("own")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert wrong == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_the_same_bits():
    layer, x = random_layer(), tokens(60)
    expected = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(layer(x), expected) else 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            assert os.waitstatus_to_exitcode(status) == 0
            np.testing.assert_array_equal(layer(x), expected)
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child hangs")


def test_keyboard_interrupt_leaves_the_layer_usable(interrupts):
    layer, x = random_layer("fp8_w8a8"), tokens(6000)
    expected = layer(x[:50])
    main = threading.current_thread().ident
    interrupted = 0
    for delay in (0.001, 0.004, 0.01, 0.02, 0.03):
        timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            for _ in range(200):
                layer(x)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        np.testing.assert_array_equal(layer(x[:50]), expected)
    assert interrupted == 5


@pytest.mark.parametrize("taped", [False, True])
def test_J7_every_failed_allocation_is_a_memory_error_and_the_next_call_is_right(monkeypatch, taped):
    layer, x = random_layer("fp8_w8a8"), tokens(20)
    if not taped:
        layer._tapes = None
    expected = layer(x)
    real = np.empty
    for n in range(1, 60):
        count = 0

        def failing(*args, n=n, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                raise MemoryError(f"allocation {n}")
            return real(*args, **kwargs)

        monkeypatch.setattr(np, "empty", failing)
        try:
            layer(x)
        except MemoryError as error:
            assert str(error) == f"allocation {n}"
        else:
            monkeypatch.setattr(np, "empty", real)
            break
        monkeypatch.setattr(np, "empty", real)
        np.testing.assert_array_equal(layer(x), expected)
    else:
        pytest.fail("more than 60 allocations a call")
    assert taped or n > 3  # a tape that plays allocates next to nothing


def test_G17_memory_is_flat_over_many_calls():
    layer = random_layer("fp8_w8a8")

    def calls(count):
        for i in range(count):
            layer(tokens(1 + i % 40))
            if i % 50 == 0:
                with pytest.raises(pymoe.PymoeError):
                    layer(tokens(3), router_logits=np.zeros((2, E)))

    calls(300)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    threads = threading.active_count()
    calls(2000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= 4096  # KiB
    assert threading.active_count() == threads


def test_G17_building_and_closing_layers_leaks_nothing():
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        random_layer().close()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files


def test_the_whole_layer_is_exact_in_bf16():
    problem = selection(50, 33, 17, 4, 2, dtype=BF16)
    layer = MoELayer(problem.w1, problem.w2, topk=2)
    y = layer(problem.x, topk_weights=problem.topk_weights, topk_ids=problem.topk_ids)
    np.testing.assert_array_equal(y, problem.expected())
