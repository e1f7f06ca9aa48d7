"""Times of the stages around the GEMMs on a GPU, in CUDA graphs.

One graph holds `CALLS` calls over `ROUTINGS` inputs; a time is a replay divided by its calls, the median of 15 after 3.

    python benchmarks/bench_stages.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics

import checkout  # noqa: F401  before pymoe
import cupy
import ml_dtypes
import numpy as np

from pymoe.config import RoutingConfig
from pymoe.device.jit import PROBE
from pymoe.device.launch import LaunchPlan
from pymoe.ops.permute import _cuda as sort
from pymoe.ops.quantize import _cuda as quantize
from pymoe.ops.quantize._matrices import block_of
from pymoe.ops.route import _cuda as router
from pymoe.ops.route._cuda_gate import gate
from pymoe.ops.unpermute import _cuda as gather
from pymoe.quantization import QUANT_KEYS

CALLS, ROUTINGS = 24, 4
BF16 = np.dtype(ml_dtypes.bfloat16)


class Arrays:
    """`empty` that gives the arrays of the first round again in later ones, as a captured call needs."""

    def __init__(self):
        self.made, self.next = [], None

    def __call__(self, shape, dtype):
        if self.next is None:
            self.made.append(cupy.empty(shape, dtype))
            return self.made[-1]
        self.next += 1
        return self.made[self.next - 1]


def time_us(call):
    """Return the microseconds of ``call(i, empty)``."""
    arrays, stream = Arrays(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()  # the inputs were made on another stream
    with stream:
        for i in range(CALLS):
            call(i % ROUTINGS, arrays)
        stream.synchronize()
        arrays.next = 0
        stream.begin_capture()
        for i in range(CALLS):
            call(i % ROUTINGS, arrays)
        graph = stream.end_capture()
        times = []
        for _ in range(18):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(1000 * cupy.cuda.get_elapsed_time(start, end) / CALLS)
    return round(statistics.median(times[3:]), 2)


def random(shape, dtype=np.float32, seed=0):
    values = cupy.random.default_rng(seed).standard_normal(shape, dtype=cupy.float32)
    return values if dtype == np.float32 else values.astype(dtype)


ROUTERS = {
    "qwen3 E 128 top 8": (128, 2048, RoutingConfig(8)),
    "deepseek E 256 groups top 8": (
        256, 7168,
        RoutingConfig(8, scoring_func="sigmoid", num_expert_group=8, topk_group=4, routed_scaling_factor=2.5,
                      e_score_correction_bias=np.random.default_rng(1).normal(0, 0.1, 256).astype(np.float32)),
    ),
}  # fmt: skip


def floor():
    """What one launch costs in a graph, whatever it does."""
    out = cupy.empty(1, np.float32)
    plan = LaunchPlan(PROBE, (1, 1, 1), (32, 1, 1))
    yield "an empty kernel", lambda i, empty: plan(out, np.float32(0), np.int64(0))


def routing():
    for name, (E, _, config) in ROUTERS.items():
        for M in (1, 16, 128, 1024, 4096, 100000):
            logits = [random((M, E), seed=i) for i in range(ROUTINGS)]
            rule = router.device_rule("bench", config, logits[0])

            def both(i, empty, logits=logits, rule=rule, E=E):
                _, ids = router.route_rows(logits[i], rule, empty=empty)
                sort.permute(ids, E, None, 64, empty=empty)

            yield f"route + permute, {name}, M {M}", both
            yield (
                f"route, {name}, M {M}",
                lambda i, empty, logits=logits, rule=rule: router.route_rows(logits[i], rule, empty=empty),
            )


def gates():
    for name, (E, K, _) in ROUTERS.items():
        for dtype in (BF16, np.dtype("float32")):
            weight = [random((E, K), dtype, i) for i in range(ROUTINGS)]
            for M in (1, 16, 128, 4096, 16384):
                x = random((M, K), BF16)
                label = f"gate, {name}, bf16 x {dtype.name}, M {M}"
                yield label, lambda i, empty, x=x, weight=weight: gate(x, weight[i], empty=empty)


def quantizers():
    for name in ("kFp8Dynamic128Sym", "kFp8DynamicTokenSym", "kFp8DynamicTensorSym", "kMxfp4Dynamic", "kNvfp4Dynamic"):
        for M, K in ((16, 7168), (4096, 7168)):
            key = QUANT_KEYS[name]
            x = [random((1, M, K), BF16, i) for i in range(ROUTINGS)]
            block = block_of("bench", key, M, K)
            yield (
                f"quantize {name}, M {M} K {K}",
                lambda i, empty, x=x, key=key, block=block: quantize.quantize_matrices(x[i], key, block, empty=empty),
            )


def unpermutes():
    for M, K, topk, E in ((16, 2048, 8, 128), (16, 7168, 8, 256), (4096, 2048, 8, 128), (4096, 7168, 8, 256)):
        ids = cupy.argsort(cupy.random.default_rng(0).random((M, E)), axis=1)[:, :topk].astype(np.int32).copy()
        row_map = sort.permute(ids, E, None, 64)
        rows, out = random((M * topk, K), BF16), cupy.empty((M, K), BF16)
        yield (
            f"unpermute bf16, M {M} K {K} top {topk}",
            lambda i, empty, r=rows, m=row_map, out=out: gather.unpermute(r, m.slot_to_row, None, out),
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    chosen = parser.parse_args()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(device, flush=True)
    results = {"device": device}
    for cases in (floor, routing, gates, quantizers, unpermutes):
        for label, call in cases():
            results[label] = time_us(call)
            print(f"{label}: {results[label]} us", flush=True)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
