"""What a layer's choices about routed rows cost on a GPU: python benchmarks/bench_combine.py [--only qwen3:4096]

Rows rounded to bfloat16 (the default), kept in float32, added in any order, and batch-invariant, in turns in one run.
Figures are those of `bench_moe.py`: the median replay of a graph of 20 calls, divided by 20; each choice is checked
first, and timed three times, of which the median and the spread are shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import bench_moe
import checkout  # noqa: F401  before pymoe
import cupy
import numpy as np

import pymoe

CHOICES = {
    "rounded": {},
    "float32": {"routed_dtype": np.float32},
    "any order": {"deterministic": False},
    "batch-invariant": {"batch_invariant": True},
}
TOKENS = {"qwen3": (128, 1024, 4096, 16384), "mixtral": (1024, 8192), "dsv3-local": (1024, 4096)}


def measure(name, weights, M, seconds):
    """Return the record of one shape and number of tokens: for each choice, times and workspace."""
    problem = bench_moe.make_problem(weights, bench_moe.SHAPES[name], M)
    out = [cupy.empty(x.shape, bench_moe.BF16) for x in problem.tokens]
    layers = {
        choice: pymoe.MoELayer(problem.w1, problem.w2, topk=problem.topk, **options)
        for choice, options in CHOICES.items()
    }
    record = {"shape": name, "M": M}

    def call(layer, i, y):
        layer(problem.tokens[i], problem.logits[i], out=y)

    for choice, layer in layers.items():
        error = bench_moe.check(problem, partial(call, layer), "bf16")
        record[choice] = {"error": error, "workspace": layer.plan(M).workspace_bytes, "us": []}
    for _ in range(3):
        for choice, layer in layers.items():
            median, _ = bench_moe.time_graph(lambda i, layer=layer: call(layer, i, out[i]), seconds)
            record[choice]["us"].append(round(median, 2))
    return record


def line(record):
    cells = [f"{record['shape']:11} {record['M']:6d}"]
    for choice in CHOICES:
        times = record[choice]["us"]
        cells.append(f"{statistics.median(times):9.1f} +-{(max(times) - min(times)) / 2:5.1f}")
    return " ".join(cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="shape[:M], comma separated")
    parser.add_argument("--seconds", type=float, default=0.2, help="of samples for each figure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = bench_moe.conditions({}) | {"rows": []}
    print(f"{'shape':11} {'M':>6} " + " ".join(f"{choice:>17}" for choice in CHOICES))
    for name, counts in TOKENS.items():
        wanted = [M for M in counts if bench_moe.is_wanted(options.only or name, name, str(M), M)]
        weights = bench_moe.make_weights(bench_moe.SHAPES[name], "bf16") if wanted else None
        for M in wanted:
            run["rows"].append(measure(name, weights, M, options.seconds))
            print(line(run["rows"][-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(run, indent=1) + "\n")
        weights = None
        cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
