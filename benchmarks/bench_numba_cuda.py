"""Time of a layer by the readable experts, NumbaCudaExperts, beside CudaGroupedExperts, on one GPU.

First both must give the same answer to a relative error (Frobenius norm) of 1e-2, or nothing is timed.  Then calls over
routings whose distinct weights exceed the second-level cache twice are captured into a graph for each, and the graphs
replayed by turns; a figure is the median of the replays.

    python benchmarks/bench_numba_cuda.py --output benchmarks/results/numba_cuda_h200.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  before pymoe
import cupy
import ml_dtypes
import numpy as np

import pymoe
from pymoe import CudaGroupedExperts, FusedMoEConfig, FusedMoEKernel, FusedMoEQuantConfig, NumbaCudaExperts
from pymoe import SingleProcessPrepareAndFinalize as PrepareAndFinalize

BF16 = np.dtype(ml_dtypes.bfloat16)
E, TOPK, K, I = 128, 8, 2048, 768
LIMIT = 1e-2
L2_BYTES = 60e6
BYTES = {"bf16": 2}
"""Of a weight; 1 for all other schemes."""
KINDS = {"numba_cuda": NumbaCudaExperts, "grouped": CudaGroupedExperts}


def make_weights(scheme: str) -> tuple[Any, Any, FusedMoEQuantConfig]:
    rng = cupy.random.default_rng(0)
    weights = []
    for shape in ((E, 2 * I, K), (E, K, I)):
        w = cupy.empty(shape, BF16)
        for part in w:
            part[...] = rng.standard_normal(part.shape, dtype=np.float32) * np.float32(shape[2] ** -0.5)
        weights.append(w)
    if scheme == "bf16":
        return *weights, FusedMoEQuantConfig.make()
    return pymoe.quantize_experts(*weights, scheme)


def draw(M: int, count: int) -> list[tuple[Any, Any]]:
    """Return ids and weights of `count` calls; no token has an expert twice."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(count):
        ids = np.argsort(rng.random((M, E)), axis=1)[:, :TOPK].astype(np.int32)
        scale = rng.random((M, TOPK), dtype=np.float32)
        found.append((cupy.asarray(ids), cupy.asarray(scale / scale.sum(axis=1, keepdims=True))))
    return found


def measure(scheme: str, M: int, weights: tuple[Any, Any, FusedMoEQuantConfig], seconds: float) -> dict[str, Any]:
    """Return the record of one scheme and number of tokens."""
    w1, w2, quant_config = weights
    touched = E * (1 - (1 - TOPK / E) ** M) * 3 * K * I * BYTES.get(scheme, 1)
    x = cupy.random.default_rng(1).standard_normal((M, K), dtype=np.float32).astype(BF16)
    routings = draw(M, max(1, math.ceil(2 * L2_BYTES / touched)))
    config = FusedMoEConfig(E, TOPK, K, I, E, in_dtype=BF16, device="cuda")
    graphs, outputs, stream = {}, {}, cupy.cuda.Stream(non_blocking=True)
    for name, kind in KINDS.items():
        kernel = FusedMoEKernel(PrepareAndFinalize(), kind(config, quant_config))
        outputs[name] = [cupy.full_like(x, np.nan) for _ in routings]
        cupy.cuda.Device().synchronize()  # what the stream reads was made on another
        graphs[name] = captured(kernel, (x, w1, w2), routings, outputs[name], stream)
        graphs[name].launch(stream)
    stream.synchronize()
    error = max(difference(a, b) for a, b in zip(*outputs.values(), strict=True))
    if not error <= LIMIT:
        raise SystemExit(f"{scheme}, M {M}: the two differ by {error:.2e}, more than {LIMIT}: nothing is timed")
    times = replay_us(graphs, stream, seconds, len(routings))
    us = {name: round(statistics.median(found), 1) for name, found in times.items()}
    ratio = round(us["numba_cuda"] / us["grouped"], 2)
    return {"scheme": scheme, "M": M, "routings": len(routings), "replays": len(times["grouped"]), "us": us,
            "numba_cuda_over_grouped": ratio, "relative_error": float(f"{error:.1e}")}  # fmt: skip


def captured(kernel: FusedMoEKernel, arrays: Any, routings: Any, outputs: Any, stream: Any) -> Any:
    """Return a graph of a call for each routing."""

    def call(i: int) -> None:
        ids, scale = routings[i]
        kernel.apply(*arrays, topk_weights=scale, topk_ids=ids, out=outputs[i])

    with stream:
        call(0)  # compiles
        stream.synchronize()
        stream.begin_capture()
        for i in range(len(routings)):
            call(i)
        return stream.end_capture()


def difference(a: Any, b: Any) -> float:
    """Return the Frobenius norm of ``a - b`` beside that of `b`; NaN anywhere gives NaN."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return float(cupy.sqrt(((a - b) ** 2).sum() / (b**2).sum()))


def replay_us(graphs: dict[str, Any], stream: Any, seconds: float, calls: int) -> dict[str, list[float]]:
    """Return microseconds of a call from replays of each graph, by turns so that clocks treat them alike."""
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    found: dict[str, list[float]] = {name: [] for name in graphs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["grouped"]) < 5:
        for name, graph in graphs.items():
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            found[name].append(1e3 * cupy.cuda.get_elapsed_time(start, stop) / calls)
    return found


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    schemes = ["bf16", "fp8_w8a8", "fp8_w8a8_block", "int8_w8a8"]
    parser.add_argument("--schemes", nargs="+", default=schemes)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024])
    parser.add_argument("--seconds", type=float, default=1.0, help="of replays for each row, five of them at least")
    parser.add_argument("--commit", default=None, help="default: git's")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = []
    for scheme in options.schemes:
        weights = make_weights(scheme)
        for M in options.tokens:
            rows.append(measure(scheme, M, weights, options.seconds))
            print(json.dumps(rows[-1]), flush=True)
        del weights
        cupy.get_default_memory_pool().free_all_blocks()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    result = {
        "device": device, "python": sys.version.split()[0], "numpy": np.__version__, "cupy": cupy.__version__,
        "numba_cuda": importlib.metadata.version("numba-cuda"), "commit": options.commit or commit(),
        "command": " ".join(sys.argv), "started": time.strftime("%Y-%m-%d %H:%M"),
        "shape": {"E": E, "topk": TOPK, "K": K, "I": I}, "limit": LIMIT, "rows": rows,
    }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
