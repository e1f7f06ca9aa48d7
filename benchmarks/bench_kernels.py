"""Time the kernels of whole bfloat16 layers on a GPU, one by one: python benchmarks/bench_kernels.py qwen3:512,4096

CUPTI, by way of PyTorch's profiler, times each kernel of 12 calls in a row over four routings; every shape is checked
against float32 first.  One line a shape and number of tokens: the microseconds a call of each stage, and their sum.
"""

from __future__ import annotations

import json
import re
import sys

import bench_moe
import cupy
from torch.profiler import ProfilerActivity, profile

CALLS = 12
STAGES = {
    # a kernel's name begins with: stage
    "gate": "gate", "route": "route", "permute": "sort", "scatter_rows": "copy", "grouped_gemm": "gemm",
    "quantize": "quantize", "unpermute": "sum", "zero_sums": "sum", "round_sums": "sum",
}  # fmt: skip


def stage_of(kernel: str) -> str:
    name = re.sub(r"^void |pymoe::", "", kernel)
    return next((stage for prefix, stage in STAGES.items() if name.startswith(prefix)), name)


def kernel_times(problem, call) -> dict[str, float]:
    """Return the microseconds a call of each stage; the layer's two grouped GEMMs are told apart by their order."""
    out = cupy.empty(problem.tokens[0].shape, bench_moe.BF16)
    for i in range(bench_moe.ROUTINGS):
        call(i, out)
    cupy.cuda.Device().synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for i in range(CALLS):
            call(i % bench_moe.ROUTINGS, out)
        cupy.cuda.Device().synchronize()
    found: dict[str, float] = {}
    gemms = 0
    for event in sorted(profiled.events(), key=lambda event: event.time_range.start):
        if event.device_time <= 0:
            continue  # the host's part
        stage = stage_of(event.name)
        if stage == "gemm":
            stage, gemms = f"gemm{gemms % 2 + 1}", gemms + 1
        found[stage] = found.get(stage, 0.0) + event.device_time / CALLS
    return {stage: round(us, 1) for stage, us in found.items()}


def main() -> None:
    for case in sys.argv[1:]:
        shape, tokens = case.split(":")
        weights = bench_moe.make_weights(bench_moe.SHAPES[shape], "bf16")
        for M in map(int, tokens.split(",")):
            problem = bench_moe.make_problem(weights, bench_moe.SHAPES[shape], M)
            call = bench_moe.layer_of(problem)
            bench_moe.check(problem, call, "bf16")
            times = kernel_times(problem, call)
            print(json.dumps({"shape": shape, "M": M, "us": times, "all": round(sum(times.values()), 1)}), flush=True)
        del weights, problem, call
        cupy.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
