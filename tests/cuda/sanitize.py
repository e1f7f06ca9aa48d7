"""Every kernel at small shapes, for compute-sanitizer: python tests/cuda/sanitize.py memcheck (or another tool)

Runs itself under the tool twice: on one planted fault, which the tool must report, and on the library, where it must
report none.  CuPy's pool is off, so that every array is an allocation of its own and a read beside it is seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

FAULTS = {
    "memcheck": """extern "C" __global__ void fault(float* x, int n) { x[n + threadIdx.x] = 1; }""",
    "racecheck": """extern "C" __global__ void fault(float* x, int n) {
        __shared__ float s[64]; s[threadIdx.x] = x[threadIdx.x]; x[threadIdx.x] = s[63 - threadIdx.x]; }""",
    "initcheck": """extern "C" __global__ void fault(float* x, int n) { if (x[threadIdx.x] == 3.5f) x[0] = 1; }""",
    "synccheck": """extern "C" __global__ void fault(float* x, int n) {
        if (threadIdx.x < 48) { x[threadIdx.x] = 1; __syncthreads(); }
        x[threadIdx.x] += 2; __syncthreads(); x[threadIdx.x] += x[63 - threadIdx.x]; }""",
}  # fmt: skip
OPTIONS = {
    # Libraries ask the driver for functions that it does not have, which is no error of a kernel.
    "memcheck": ["--leak-check", "no", "--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
    "synccheck": [],
}
TIMEOUT_S = 440
WHOLE = "every kernel has run"


def plant(tool: str) -> None:
    """Run the fault that `tool` must find."""
    import cupy

    cupy.cuda.set_allocator(None)
    x = cupy.empty(64, np.float32) if tool == "initcheck" else cupy.zeros(64, np.float32)
    cupy.RawKernel(FAULTS[tool], "fault")((1,), (64,), (x, np.int32(64)))
    cupy.cuda.runtime.deviceSynchronize()


def run_library() -> None:
    """Launch every kernel of the library on small problems, and look at no answer."""
    import cupy

    import pymoe
    from tests.cuda.transfer import to_device
    from tests.experts.test_pairs import SCHEMES, E, problem
    from tests.selection import BF16, selection

    cupy.cuda.set_allocator(None)
    for scheme in SCHEMES:
        for dtype in (np.float32, BF16):
            p = problem(scheme, dtype=dtype, biases=True)
            given = to_device({"x": p.x, "w1": p.w1, "w2": p.w2, "config": p.quant_config})
            layer = pymoe.MoELayer(given["w1"], given["w2"], topk=3, quant_config=given["config"])
            logits = to_device(np.random.default_rng(0).standard_normal((len(p.x), E)).astype(np.float32))
            for _ in range(4):
                layer(given["x"], logits)
        q = dataclasses.replace(
            p, x=given["x"], w1=given["w1"], w2=given["w2"], scale=to_device(p.scale), ids=to_device(p.ids),
            quant_config=given["config"],
        )  # fmt: skip
        experts = pymoe.CudaBatchedExperts(q.config(device="cuda"), q.quant_config, 16, 1)
        q.run(experts, pymoe.CudaBatchedPrepareAndFinalize(16, E))
    for dtype in (np.float32, np.float16, BF16):
        for M, K, width in ((1, 64, 64), (70, 128, 96), (300, 64, 64), (9, 33, 17)):
            arguments = to_device(selection(M, K, width, 4, 2, dtype=dtype, mapped=True).arguments())
            pymoe.fused_experts(**arguments)
    for key in ("kFp8DynamicTokenSym", "kFp8DynamicTensorSym", "kFp8Dynamic128Sym", "kInt8DynamicTokenSym"):
        codes, scale = pymoe.quantize(
            to_device(np.random.default_rng(1).standard_normal((5, 256)).astype(np.float32)), key
        )
        pymoe.dequantize(codes, scale, key)
    rng = np.random.default_rng(2)
    for M, E_, groups in ((3, 8, None), (40, 64, 8), (9000, 16, None)):
        logits = to_device(rng.standard_normal((M, E_)).astype(np.float32))
        bias = None if groups is None else np.zeros(E_, np.float32)
        options = {} if groups is None else {
            "num_expert_group": groups, "topk_group": 4, "scoring_func": "sigmoid", "e_score_correction_bias": bias,
        }  # fmt: skip
        weights, ids = pymoe.select_experts(logits, 2, **options)
    w1, w2 = (
        to_device(rng.standard_normal((16, 32, 32)).astype(BF16)),
        to_device(rng.standard_normal((16, 32, 16)).astype(BF16)),
    )
    gate = pymoe.Gate(to_device(rng.standard_normal((16, 32)).astype(BF16)))
    x = to_device(rng.standard_normal((9000, 32)).astype(BF16))
    pymoe.fused_experts(x, w1, w2, weights, ids)
    for M in (1, 40, 9000):
        gate(x[:M])
    shared = pymoe.SharedExperts(w1[0], w2[0])
    pymoe.MoELayer(w1, w2, topk=2, gate=gate, shared_experts=shared)(x[:64])
    cupy.cuda.runtime.deviceSynchronize()
    print(WHOLE)


def sanitized(tool: str, *what: str) -> tuple[int, str]:
    """Return (errors that the tool counts, its output) of this script under the tool."""
    command = ["compute-sanitizer", "--tool", tool, *OPTIONS[tool], sys.executable, __file__, tool, *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT)
    text = done.stdout + done.stderr
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", text)
    return (sum(int(a or b) for a, b in found) if found else -1), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=FAULTS)
    parser.add_argument("--run", choices=("fault", "library"), help="run this in this process, without the tool")
    parser.add_argument("--log", type=Path, help="where the tool's output goes")
    options = parser.parse_args()
    if options.run == "fault":
        return plant(options.tool)
    if options.run == "library":
        return run_library()
    planted, planted_text = sanitized(options.tool, "--run", "fault")
    found, text = sanitized(options.tool, "--run", "library")
    summary = f"{options.tool}: planted fault {planted} errors, library {found} errors"
    if options.log is not None:
        lines = text.splitlines()
        kept = lines if len(lines) < 400 else [*lines[:300], f"... {len(lines) - 350} lines ...", *lines[-50:]]
        options.log.write_text(
            "\n".join([summary, "--- the planted fault", planted_text[:3000], "--- the library", *kept])
        )
    print(summary)
    if planted <= 0 or found != 0 or WHOLE not in text:
        raise SystemExit(f"{options.tool}: {'the library did not run to its end' if WHOLE not in text else 'failed'}")


if __name__ == "__main__":
    main()
