"""Time whole layers on a GPU beside PyTorch, JAX and the card's floor: python benchmarks/bench_moe.py [--only qwen3]

A figure is the median replay of one CUDA graph that holds 20 layer calls, router logits to y, over four sets of tokens
and routings, divided by 20: held load, under which the clocks fall.  A burst is the median replay of a graph of one
call after 20 ms of rest each.  Every row is first checked against a float32 reference on the same operands.  Results
are cumulative: rows that a file has already, for the same device and commit, are kept with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  before pymoe
import cuda_peers
import cupy
import ml_dtypes
import numpy as np

import pymoe

BF16 = np.dtype(ml_dtypes.bfloat16)
CALLS, ROUTINGS = 20, 4
SHAPES = {
    # name: E, topk, K, I
    "qwen3": (128, 8, 2048, 768),
    "mixtral": (8, 2, 4096, 14336),
    "dsv3-local": (32, 8, 7168, 2048),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "llama4-scout": (16, 1, 5120, 8192),
}
TOKENS = {
    "qwen3": (1, 16, 128, 512, 1024, 4096, 8192, 16384, 20000, 100000),
    "mixtral": (1, 16, 128, 512, 1024, 4096, 8192, 16384),
    "dsv3-local": (1, 16, 128, 512, 1024, 4096, 8192, 16384),
    "gpt-oss-120b": (1, 16, 128, 512, 1024, 4096, 8192, 16384),
    "llama4-scout": (1, 16, 128, 512, 1024, 4096, 8192, 16384),
}
SCHEMES = {"bf16": None, "fp8": "fp8_w8a8_block", "mxfp4": "mxfp4_w4a16", "int4": "int4_w4a16", "int8": "int8_w8a8"}
VLLM = {
    # us on an H200: docs/performance names the source
    ("qwen3", "bf16"): {1: 30.0, 16: 204.6, 128: 298.6, 1024: 382.6, 4096: 787, 16384: 2855},
    ("qwen3", "fp8"): {1: 22.6, 16: 109.1, 128: 165.9, 1024: 269.6, 4096: 726, 16384: 2709},
    ("mixtral", "bf16"): {1: 181.4, 16: 651, 128: 678, 1024: 1590, 8192: 10792},
    ("mixtral", "fp8"): {1: 126.2, 16: 338, 128: 388.5, 1024: 1409, 8192: 9587},
    ("dsv3-local", "fp8"): {1: 97.9, 16: 341.8, 128: 403.5, 1024: 1409, 4096: 5107},
}
ERROR_LIMIT = {"bf16": 6e-3, "fp8": 6e-2, "mxfp4": 6e-3, "int4": 6e-3, "int8": 6e-2}
"""Relative Frobenius error against the reference below, which does not requantize the intermediate."""


@dataclasses.dataclass
class Problem:
    """Weights of one layer in one scheme, and the tokens and logits of every set."""

    w1: Any
    w2: Any
    config: Any
    topk: int
    tokens: list[Any]
    logits: list[Any]

    @property
    def expert_bytes(self) -> float:
        arrays = [self.w1, self.w2]
        if self.config is not None:
            arrays += [self.config.w1.scale, self.config.w2.scale]
        return sum(a.nbytes for a in arrays) / self.w1.shape[0]


def normal(shape: tuple[int, ...], deviation: float, seed: int) -> Any:
    """Return bfloat16 normal numbers, made slice by slice to bound the float32 memory."""
    generator = cupy.random.default_rng(seed)
    out = cupy.empty(shape, BF16)
    for part in out.reshape(shape[0], -1):
        part[...] = generator.standard_normal(part.shape, dtype=np.float32) * np.float32(deviation)
    return out


def make_weights(shape: tuple[int, int, int, int], scheme: str) -> tuple[Any, Any, Any]:
    E, _, K, width = shape
    w1, w2 = normal((E, 2 * width, K), K**-0.5, 1), normal((E, K, width), width**-0.5, 2)
    if SCHEMES[scheme] is None:
        return w1, w2, None
    return pymoe.quantize_experts(w1, w2, SCHEMES[scheme])


def make_problem(weights: tuple[Any, Any, Any], shape: tuple[int, int, int, int], M: int) -> Problem:
    E, topk, K, _ = shape
    tokens = [normal((M, K), 1.0, 10 + i) for i in range(ROUTINGS)]
    logits = [cupy.random.default_rng(20 + i).standard_normal((M, E), dtype=np.float32) for i in range(ROUTINGS)]
    return Problem(*weights, topk, tokens, logits)


def reference(problem: Problem, index: int, rows: np.ndarray) -> np.ndarray:
    """Return the layer's answer for `rows` in float32 from the dequantized weights, expert by expert."""
    weights, ids = pymoe.select_experts(problem.logits[index], problem.topk)
    weights, ids = weights[rows].get(), ids[rows].get()
    x = problem.tokens[index][rows].astype(np.float32)
    y = cupy.zeros(x.shape, np.float32)
    for e in np.unique(ids):
        w1, w2 = dequantized(problem, int(e))
        token, slot = np.nonzero(ids == e)
        gate, up = cupy.split(x[token] @ w1.T, 2, axis=1)
        h = (gate / (1 + cupy.exp(-gate)) * up).astype(BF16).astype(np.float32)
        cupyx_add(y, token, (h @ w2.T) * cupy.asarray(weights[token, slot])[:, None])
    return y.get()


def cupyx_add(y: Any, rows: np.ndarray, values: Any) -> None:
    for row, value in zip(rows.tolist(), values, strict=True):
        y[row] += value


def dequantized(problem: Problem, e: int) -> tuple[Any, Any]:
    if problem.config is None:
        return problem.w1[e].astype(np.float32), problem.w2[e].astype(np.float32)
    key, found = problem.config.weight_key, []
    for w, desc in ((problem.w1, problem.config.w1), (problem.w2, problem.config.w2)):
        options = {"block_shape": problem.config.block_shape}
        found.append(pymoe.dequantize(w[e], desc.scale[e], key, **options))
    return found[0], found[1]


def layer_of(problem: Problem) -> Callable[[int, Any], None]:
    layer = pymoe.MoELayer(problem.w1, problem.w2, topk=problem.topk, quant_config=problem.config)
    layer.dtype = BF16
    layer.warm_up(problem.tokens[0].shape[0])
    return lambda i, out: layer(problem.tokens[i], problem.logits[i], out=out)


def check(problem: Problem, call: Callable[[int, Any], None], scheme: str) -> float:
    """Return the relative error of `call` on some rows of each set, or raise."""
    M = problem.tokens[0].shape[0]
    rows = np.unique(np.linspace(0, M - 1, min(M, 24)).astype(int))
    error = norm = 0.0
    for i in range(ROUTINGS):
        out = cupy.full(problem.tokens[i].shape, np.nan, BF16)
        call(i, out)
        expected = reference(problem, i, rows)
        error += float(np.square(out[rows].get().astype(np.float64) - expected).sum())
        norm += float(np.square(expected.astype(np.float64)).sum())
    found = (error / norm) ** 0.5
    if not found <= ERROR_LIMIT[scheme]:
        raise SystemExit(f"wrong answer: relative error {found}, limit {ERROR_LIMIT[scheme]}")
    return found


def time_graph(record: Callable[[int], None], seconds: float) -> tuple[float, float]:
    """Return (median, least) microseconds a call of a graph of `CALLS` calls; `record(i)` queues call i."""
    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        for i in range(ROUTINGS):
            record(i)
        stream.begin_capture()
        for i in range(CALLS):
            record(i % ROUTINGS)
        graph = stream.end_capture()
        for _ in range(2):
            graph.launch(stream)
        stream.synchronize()
        times, end = [], time.monotonic() + seconds
        while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) * 1000 / CALLS)
    return statistics.median(times), min(times)


def time_burst(record: Callable[[int], None], seconds: float) -> float:
    """Return the median microseconds of graphs of one call, each replayed on a card that has rested 20 ms."""
    stream = cupy.cuda.Stream(non_blocking=True)
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        graphs = []
        for i in range(ROUTINGS):
            record(i)
            stream.begin_capture()
            record(i)
            graphs.append(stream.end_capture())
        stream.synchronize()
        times, end = [], time.monotonic() + seconds
        while len(times) < 2 * ROUTINGS or time.monotonic() < end:
            time.sleep(0.02)
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graphs[len(times) % ROUTINGS].launch(stream)
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) * 1000)
    return statistics.median(times)


def read_rate() -> float:
    """Return bytes a second of a kernel that only reads 4 GiB."""
    kernel = cupy.RawKernel(
        """extern "C" __global__ void read(const float4* x, long long n, float* out) {
        float s = 0;
        for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n;
             i += (long long)gridDim.x * blockDim.x) {
            float4 v = x[i]; s += v.x + v.y + v.z + v.w; }
        if (s == 12345.678f) *out = s; }""",
        "read",
    )  # fmt: skip
    x, out = cupy.ones(1 << 30, np.float32), cupy.zeros(1, np.float32)
    times = []
    for _ in range(8):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        kernel((132 * 8,), (512,), (x, np.int64(x.size // 4), out))
        stop.record()
        stop.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, stop) / 1000)
    return x.nbytes / min(times[2:])


def floor_us(problem: Problem, scheme: str, rates: dict[str, float]) -> float:
    """Return max(bytes / read rate, FLOPs / matrix rate) for the experts that were drawn, mean over the sets."""
    E, N, _ = problem.w1.shape
    K, M = problem.w2.shape[1], problem.tokens[0].shape[0]
    floors = []
    for logits in problem.logits:
        distinct = len(np.unique(pymoe.select_experts(logits, problem.topk)[1].get()))
        nbytes = distinct * problem.expert_bytes + 4 * M * K
        flops = 3.0 * M * problem.topk * K * N
        rate = rates["fp8_flops"] if scheme == "fp8" else rates["bf16_flops"]
        floors.append(max(nbytes / rates["read"], flops / rate) * 1e6)
    return statistics.mean(floors)


def conditions(rates: dict[str, float]) -> dict[str, Any]:
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,driver_version", "--format=csv,noheader"],
        capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    return {
        "device": properties["name"].decode(), "multiprocessors": properties["multiProcessorCount"],
        "cupy": cupy.__version__, "numpy": np.__version__, "python": sys.version.split()[0], "clocks": smi,
        "commit": commit, "command": " ".join(sys.argv), "rates": rates, "started": time.strftime("%Y-%m-%d %H:%M"),
        "peers": cuda_peers.versions(),
    }  # fmt: skip


def clocks() -> str:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def measure(name: str, scheme: str, M: int, weights: Any, options: Any, rates: dict[str, float]) -> dict[str, Any]:
    problem = make_problem(weights, SHAPES[name], M)
    call = layer_of(problem)
    error = check(problem, call, scheme)
    out = [cupy.empty(x.shape, BF16) for x in problem.tokens]
    median, least = time_graph(lambda i: call(i, out[i]), options.seconds)
    burst = time_burst(lambda i: call(i, out[i]), options.seconds)
    row = {
        "shape": name, "scheme": scheme, "M": M, "us": round(median, 2), "least_us": round(least, 2),
        "burst_us": round(burst, 2),
        "floor_us": round(floor_us(problem, scheme, rates), 2), "error": float(f"{error:.2e}"),
        "vllm_h200_us": VLLM.get((name, scheme), {}).get(M), "clocks": clocks(),
    }  # fmt: skip
    if scheme == "bf16" and "torch" in options.peers and M <= 20000:
        row["torch_us"] = cuda_peers.torch_us(problem, CALLS, options.seconds)
    if scheme == "bf16" and "jax" in options.peers and name == "qwen3" and M in (16, 1024):
        row["jax_us"] = cuda_peers.jax_us(problem, options.seconds)
    return row


def line(row: dict[str, Any]) -> str:
    cells = [
        f"{row['shape']:13} {row['scheme']:6} {row['M']:7d}",
        *(f"{row[key]:9.1f}" for key in ("us", "burst_us", "floor_us")),
        f"{row['burst_us'] / row['floor_us']:6.2f}",
    ]
    for key in ("vllm_h200_us", "torch_us", "jax_us"):
        cells.append(f"{row[key]:9.1f}" if row.get(key) else " " * 8 + "-")
    return " ".join([*cells, f"{row['error']:.1e}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="shape[:scheme[:M]], comma separated")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/cuda_moe.json"))
    parser.add_argument("--resume", action="store_true", help="keep rows that the file has for this device and commit")
    parser.add_argument("--seconds", type=float, default=0.3, help="of samples for each figure")
    parser.add_argument("--peers", default="torch,jax")
    options = parser.parse_args()
    rates = {"read": read_rate()} | cuda_peers.matrix_rates()
    cupy.get_default_memory_pool().free_all_blocks()
    run = conditions(rates)
    stored = json.loads(options.results.read_text()) if options.results.exists() else {"runs": []}
    same = [r for r in stored["runs"] if (r["device"], r["commit"]) == (run["device"], run["commit"])]
    done = {(x["shape"], x["scheme"], x["M"]) for r in same for x in r["rows"]} if options.resume else set()
    run["rows"] = []
    stored["runs"].append(run)
    print(f"{run['device']}: reads {rates['read'] / 1e9:.0f} GB/s, bf16 {rates['bf16_flops'] / 1e12:.0f} TFLOP/s")
    figures = ("us", "burst", "floor", "ratio", "vLLM*", "torch", "JAX")
    print(f"{'shape':13} {'scheme':6} {'M':>7}", *(f"{name:>{6 if name == 'ratio' else 9}}" for name in figures))
    for name, shape in SHAPES.items():
        for scheme in SCHEMES:
            wanted = [
                M for M in TOKENS[name] if is_wanted(options.only, name, scheme, M) and (name, scheme, M) not in done
            ]
            weights = make_weights(shape, scheme) if wanted else None
            for M in wanted:
                try:
                    run["rows"].append(measure(name, scheme, M, weights, options, rates))
                except cupy.cuda.memory.OutOfMemoryError:
                    print(f"{name:13} {scheme:6} {M:7d} out of memory")
                    continue
                finally:
                    cupy.get_default_memory_pool().free_all_blocks()
                print(line(run["rows"][-1]), flush=True)
                options.results.parent.mkdir(parents=True, exist_ok=True)
                options.results.write_text(json.dumps(stored, indent=1) + "\n")
            weights = None
            cupy.get_default_memory_pool().free_all_blocks()
    print("* vLLM's two GEMMs, activation and sum on an H200, without sorting: h200 figures, not measured in this run")


def is_wanted(only: str | None, name: str, scheme: str, M: int) -> bool:
    if only is None:
        return (name, scheme) in VLLM
    for part in only.split(","):
        wanted = part.split(":")
        if wanted == [name, scheme, str(M)][: len(wanted)]:
            return True
    return False


if __name__ == "__main__":
    main()
