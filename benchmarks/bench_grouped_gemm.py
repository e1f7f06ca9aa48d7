"""Time of GEMM1 with its activation and of GEMM2 on CuPy arrays, for every tile shape.

A graph holds several calls over routings whose distinct weights exceed the second-level cache four times, so that
weights come from memory; random data; the best of repeated replays.  One JSON object a line.

    python benchmarks/bench_grouped_gemm.py --shapes qwen3 --schemes bf16 fp8_block --tokens 1 16 128 --output out.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any, NamedTuple

import checkout  # noqa: F401  before pymoe
import cuda.core  # noqa: F401  before threads import it
import cupy
import ml_dtypes
import numpy as np

from pymoe import FusedMoEQuantConfig
from pymoe.activations import ActivationConfig
from pymoe.codec.fp8 import encode_e4m3
from pymoe.codec.weights import WeightOperand
from pymoe.device.jit import compile_all
from pymoe.ops.grouped_gemm import _cuda
from pymoe.ops.grouped_gemm._cuda_instances import SWAPPED_STAGES
from pymoe.ops.permute._cuda import scatter_rows

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {  # E, topk, K, I
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "dsv3": (32, 8, 7168, 2048),
    "gpt-oss": (128, 4, 2880, 2880),
    "dense": (1, 1, 8192, 8192),  # with 8192 tokens GEMM2 is 8192^3, as libraries are measured
}
SCHEMES = ("bf16", "fp8_channel", "fp8_block", "int8_channel", "int4", "mxfp4", "fp8_w8a16")
BYTES = {"bf16": 2.0, "int4": 0.5 + 4 / 128, "mxfp4": 0.5 + 1 / 32}
L2_BYTES = 60e6
SCALE = 1 / 512
"""Of activations and weights: sums are then of the order of 1.  Large ones would time the rare path of a division."""
SILU = ActivationConfig("silu")


class Layer(NamedTuple):
    """Both operands, and how activations are quantized (None: as they are)."""

    w1: WeightOperand
    w2: WeightOperand
    a_key: Any
    a_groups: int


def random_codes(shape, kind):
    """Codes of normal numbers that use the range of the format, drawn from a million of them."""
    table = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    if kind == "fp8":
        table = encode_e4m3(table * 110)
    elif kind == "int8":
        table = np.clip(np.rint(table * 31), -127, 127).astype(np.int8)
    else:
        table = np.random.default_rng(0).integers(0, 256, 1 << 20).astype(np.uint8)
    table, size = cupy.asarray(table), math.prod(shape)
    found = cupy.empty(size, table.dtype)
    for start in range(0, size, 1 << 28):
        stop = min(start + (1 << 28), size)
        found[start:stop] = table[cupy.random.randint(0, 1 << 20, stop - start, dtype=np.int32)]
    return found.reshape(shape)


def random_bf16(shape):
    found = cupy.empty(math.prod(shape), BF16)
    for start in range(0, found.size, 1 << 27):
        part = found[start : start + (1 << 27)]
        part[...] = (cupy.random.standard_normal(part.size, dtype=np.float32) / 32).astype(BF16)
    return found.reshape(shape)


def layer(scheme: str, E: int, K: int, I: int) -> Layer:
    """Return random operands of one scheme."""

    def ones(*shape):
        return cupy.full(shape, SCALE, np.float32)

    shapes = ((E, 2 * I, K), (E, K, I))
    if scheme == "bf16":
        w1, w2 = (WeightOperand.unquantized(random_bf16(shape)) for shape in shapes)
        return Layer(w1, w2, None, 0)
    make = FusedMoEQuantConfig.make
    configs = {
        "fp8_channel": (
            lambda: make("fp8", per_act_token_quant=True, per_out_ch_quant=True, **_scales(shapes, None)),
            "fp8",
        ),
        "int8_channel": (
            lambda: make("int8", per_act_token_quant=True, per_out_ch_quant=True, **_scales(shapes, None)),
            "int8",
        ),
        "fp8_block": (lambda: make("fp8", block_shape=(128, 128), **_scales(shapes, (128, 128))), "fp8"),
        "fp8_w8a16": (lambda: make(None, "fp8", per_out_ch_quant=True, **_scales(shapes, None)), "fp8"),
        "int4": (lambda: make(None, "int4", block_shape=(0, 128), **_scales(shapes, (1, 128))), "int4"),
        "mxfp4": (lambda: make(None, "mxfp4", **_scales(shapes, (1, 32))), "mxfp4"),
    }
    build, kind = configs[scheme]
    config, per_byte = build(), 2 if kind in ("int4", "mxfp4") else 1
    operands = []
    for E, N, columns in shapes:
        codes = random_codes((E, N, columns // per_byte), kind)
        rows = {"fp8_block": 128}.get(scheme, 1)
        group = {"fp8_block": 128, "int4": 128, "mxfp4": 32}.get(scheme)
        if group is None:
            operands.append(WeightOperand(codes, columns, config.weight_key, row_scale=ones(E, N)))
            continue
        scale = ones(E, -(-N // rows), -(-columns // group))
        if scheme == "mxfp4":
            scale = cupy.full(scale.shape, 121, np.uint8)
        operands.append(WeightOperand(codes, columns, config.weight_key, group_scale=scale, block=(rows, group)))
    return Layer(*operands, config.activation_key, 128 if scheme == "fp8_block" else 0)


def _scales(shapes, block):
    """Return scales of the right shapes on the host, which only the config looks at."""
    (E, N1, K1), (_, N2, K2) = shapes
    if block is None:
        return {"w1_scale": np.ones((E, N1), np.float32), "w2_scale": np.ones((E, N2), np.float32)}
    bn, bk = block
    dtype = np.uint8 if bk == 32 else np.float32
    return {
        "w1_scale": np.ones((E, -(-N1 // bn), -(-K1 // bk)), dtype),
        "w2_scale": np.ones((E, -(-N2 // bn), -(-K2 // bk)), dtype),
    }


class Routing(NamedTuple):
    """Rows sorted by expert of one drawing."""

    offsets: Any
    gather: Any
    slot_to_row: Any
    distinct: int


def draw(E, topk, M, count):
    """Return routings without replacement; at few tokens they take turns through all experts."""
    rng, found, deck = np.random.default_rng(7), [], []
    for _ in range(count):
        if M * topk <= E:
            if len(deck) < M * topk:
                deck = list(rng.permutation(E))
            ids = np.array([deck.pop() for _ in range(M * topk)]).reshape(M, topk)
            if M > 1:
                ids = np.argsort(rng.random((M, E)), axis=1)[:, :topk]
        else:
            ids = np.argsort(rng.random((M, E)), axis=1)[:, :topk]
        flat = ids.reshape(-1)
        counts = np.bincount(flat, minlength=E)
        offsets = np.r_[0, np.cumsum(counts)].astype(np.int32)
        order = np.argsort(flat, kind="stable").astype(np.int32)
        rows = np.argsort(order).astype(np.int32).reshape(M, topk)
        found.append(Routing(*(cupy.asarray(x) for x in (offsets, order, rows)), int((counts > 0).sum())))
    return found


def timed(calls, stream):
    """Return microseconds of one call: a graph of all of them, replayed; the best of several measurements."""
    for call in calls[:2]:
        call()
    cupy.cuda.get_current_stream().synchronize()
    with stream:
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    best, spent = math.inf, time.perf_counter()
    graph.launch(stream)
    for _ in range(20):
        start.record(stream)
        graph.launch(stream)
        stop.record(stream)
        stop.synchronize()
        best = min(best, cupy.cuda.get_elapsed_time(start, stop) * 1e3 / len(calls))
        if time.perf_counter() - spent > 0.4:
            break
    return best


def measure(name, scheme, ops, M, tile_rows):
    """Return the record of one shape, scheme, token count and tile shape."""
    E, topk, K, I = SHAPES[name]
    P, bytes_each = M * topk, BYTES.get(scheme, 1.0)
    experts = E * (1 - (1 - topk / E) ** M)
    traffic = experts * 3 * K * I * bytes_each
    routings = draw(E, topk, M, max(4, min(20, math.ceil(4 * L2_BYTES / traffic) + 1)))
    quantized, stream = ops.a_key is not None, cupy.cuda.Stream(non_blocking=True)
    kind = None if not quantized else ops.a_key.dtype
    x = random_codes((M, K), kind) if quantized else random_bf16((M, K))
    h_in = random_codes((P, I), kind) if quantized else random_bf16((P, I))

    def scale(rows, columns):
        if not quantized:
            return None
        return cupy.full((rows, -(-columns // ops.a_groups) if ops.a_groups else 1), SCALE, np.float32)

    x_scale, h_scale = scale(M, K), scale(P, I)
    h, y = cupy.empty((P, I), np.float32 if quantized else BF16), cupy.empty((P, K), BF16)
    weights = cupy.full((M, topk), 1 / topk, np.float32)
    even = tile_rows in SWAPPED_STAGES
    lists = [_cuda.list_tiles(routing.offsets, P, tile_rows, even) for routing in routings]
    copied = _cuda.tiles_together(x, ops.w1, tile_rows, True) is not None
    together = cupy.empty((P, K), x.dtype) if copied else None

    def first(i):
        if copied:  # as the layer does

            def call():
                scatter_rows(x, routings[i].slot_to_row, together)
                _cuda.grouped_gemm(together, ops.w1, lists[i], activation=SILU, out=h)

            return call
        return lambda: _cuda.grouped_gemm(
            x, ops.w1, lists[i], gather=routings[i].gather, gather_div=topk, a_scale=x_scale, a_key=ops.a_key,
            activation=SILU, out=h,
        )  # fmt: skip

    def second(i):
        routed = _cuda.Routed(routings[i].gather, weights)
        return lambda: _cuda.grouped_gemm(
            h_in, ops.w2, lists[i], a_scale=h_scale, a_key=ops.a_key, routed=routed, out=y
        )

    turns = range(len(routings))
    gemm1, gemm2 = timed([first(i) for i in turns], stream), timed([second(i) for i in turns], stream)
    both = timed([call(i) for i in turns for call in (first, second)], stream) * 2
    drawn = sum(routing.distinct for routing in routings) / len(routings)
    return {
        "shape": name, "scheme": scheme, "M": M, "tile_rows": tile_rows, "gemm1_us": gemm1, "gemm2_us": gemm2,
        "both_us": both, "copied": copied, "weight_GBps": drawn * 3 * K * I * bytes_each / both / 1e3,
        "TFLOPs": 6 * P * K * I / both / 1e6, "default": tile_rows == _cuda.choose_tile_rows(M, topk, E),
        "device": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3"])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["bf16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024, 4096])
    parser.add_argument("--tile-rows", nargs="+", type=int, default=None, help="default: the library's choice")
    parser.add_argument("--output", default=None)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start nothing new after this long")
    options = parser.parse_args()
    began = time.perf_counter()
    compile_all(_cuda.kernels("sm_90a"), "sm_90a")
    for name in options.shapes:
        E, topk, K, I = SHAPES[name]
        for scheme in options.schemes:
            ops = layer(scheme, E, K, I)
            for M in options.tokens:
                for tile_rows in options.tile_rows or [_cuda.choose_tile_rows(M, topk, E)]:
                    if time.perf_counter() - began > options.seconds:
                        return
                    record = measure(name, scheme, ops, M, tile_rows)
                    line = json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in record.items()})
                    print(line, flush=True)
                    if options.output:
                        with open(options.output, "a") as file:
                            file.write(line + "\n")
            del ops
            cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
