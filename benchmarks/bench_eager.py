"""Python's time for an eager call of a layer, CuPy in and out, and a profile that shows that it waits for nothing.

The time is that until the call returns, the median of many: with the GPU idle at its start, and with calls queued in a
row; and the same where the driver's launches are left out, which is Python's own share.  CUPTI then names every CUDA
function that a call enters; none may wait for the device or copy to the host.  First the same look has to find a
planted synchronization and a planted copy.

    python benchmarks/bench_eager.py --output benchmarks/results/eager_h100.json

The exit status is 1 where the median of bfloat16 calls in a row is above the project's 80 us, or a call waits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import api_calls
import checkout  # noqa: F401  before pymoe
import cupy
import ml_dtypes
import numpy as np

import pymoe

LIMIT_US = 80.0
E, TOPK, K, I, M = 128, 8, 2048, 768, 16
IN_A_ROW = 20
"""Calls queued without a wait, few enough that no queue is full."""


def make_layer(scheme: str | None) -> tuple[pymoe.MoELayer, Any, Any]:
    """Return a layer with random weights, tokens and router logits on the device."""
    rng = cupy.random.default_rng(0)
    shapes = ((E, 2 * I, K), (E, K, I))
    w1, w2 = ((rng.standard_normal(shape, np.float32) / 32).astype(ml_dtypes.bfloat16) for shape in shapes)
    config = None
    if scheme is not None:
        w1, w2, config = pymoe.quantize_experts(w1, w2, scheme)
    layer = pymoe.MoELayer(w1, w2, topk=TOPK, quant_config=config)
    x = rng.standard_normal((M, K), np.float32).astype(ml_dtypes.bfloat16)
    return layer, x, rng.standard_normal((M, E), np.float32)


def times_us(call: Any, seconds: float) -> dict[str, dict[str, float]]:
    """Return the quantiles of the time until a call returns, from an idle device and in a row."""
    wait = cupy.cuda.get_current_stream().synchronize
    found: dict[str, list[float]] = {"idle": [], "in_a_row": []}
    for kind, times in found.items():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            wait()
            for _ in range(IN_A_ROW if kind == "in_a_row" else 1):
                began = time.perf_counter()
                call()
                times.append((time.perf_counter() - began) * 1e6)
        wait()
    return {kind: _quantiles(times) for kind, times in found.items()}


def _quantiles(times: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(times, n=10)
    return {"calls": len(times), "median": round(statistics.median(times), 1), "least": round(min(times), 1),
            "tenth": round(tenths[0], 1), "nine_tenths": round(tenths[-1], 1)}  # fmt: skip


def profile(call: Any, calls: int = 10) -> dict[str, float]:
    """Return the CUDA functions that a call enters, with their number a call."""
    with api_calls.recorded() as counter:
        for _ in range(calls):
            call()
    return {name: count / calls for name, count in sorted(counter.items())}


def check_the_profile(x: Any) -> dict[str, list[str]]:
    """Return what the profile finds of two planted waits, or exit."""
    stream = cupy.cuda.get_current_stream()
    found = {}
    for name, fault in (("synchronize", stream.synchronize), ("copy to the host", lambda: x[0, :1].get())):
        with api_calls.recorded() as counter:
            fault()
        found[name] = sorted(api_calls.waits(counter))
        if not found[name]:
            raise SystemExit(f"the profile does not see a planted {name}: {dict(counter)}")
    return found


def measure(scheme: str | None, seconds: float) -> dict[str, Any]:
    layer, x, logits = make_layer(scheme)

    def call() -> None:
        layer(x, router_logits=logits)

    for _ in range(50):
        call()
    times, calls = times_us(call, seconds), profile(call)
    with nothing_launched(layer):
        alone = times_us(call, seconds / 2)
    return {"scheme": scheme or "bf16", "us": times, "us_without_launches": alone, "functions_a_call": calls,
            "waits_a_call": api_calls.waits(calls)}  # fmt: skip


@contextlib.contextmanager
def nothing_launched(layer: pymoe.MoELayer) -> Iterator[None]:
    """Take the driver's launches out of the layer's calls: what is left is Python's share."""
    tapes = [entry.tape for entry in layer._tapes._entries.values() if entry is not None]
    if not tapes:
        raise SystemExit("the layer's calls are not queued from a tape")
    launch = tapes[0]._launch
    for tape in tapes:
        tape._launch = lambda *_: None
    try:
        yield
    finally:
        for tape in tapes:
            tape._launch = launch


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["bf16", "fp8_w8a8_block"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples for each figure")
    parser.add_argument("--commit", default=None, help="default: git's")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    planted = check_the_profile(cupy.zeros((M, K), np.float32))
    rows = [measure(None if scheme == "bf16" else scheme, options.seconds) for scheme in options.schemes]
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    result = {
        "device": device, "python": sys.version.split()[0], "cupy": cupy.__version__,
        "commit": options.commit or commit(), "command": " ".join(sys.argv), "started": time.strftime("%Y-%m-%d %H:%M"),
        "shape": {"E": E, "topk": TOPK, "K": K, "I": I, "M": M}, "limit_us": LIMIT_US, "planted_waits_found": planted,
        "rows": rows,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    late = [row["scheme"] for row in rows if row["us"]["in_a_row"]["median"] > LIMIT_US and row["scheme"] == "bf16"]
    return 1 if late or any(row["waits_a_call"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
