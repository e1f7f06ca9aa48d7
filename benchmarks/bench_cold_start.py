"""How long the first call of a layer takes: with nothing compiled, and with everything in the kernel cache.

Each measurement is a process of its own with its own cache folders, CuPy's included, and with no ``nvcc`` on its path.
Imports, pymoe's own included, and the CUDA context are timed apart.

    python benchmarks/bench_cold_start.py --on cuda --scheme none fp8 --repeats 5 --output benchmarks/results/x.json

The limits are those of the project: 3 s cold, 50 ms warm; the exit status is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS_S = {"cold": 3.0, "warm": 0.05}
E, TOPK, K, I, M = 8, 2, 1024, 512, 16


def main() -> int:
    options = parsed()
    if options.child:
        print(json.dumps(measure(options.on, options.child)))
        return 0
    rows = []
    print(f"{'scheme':10} {'cache':5} {'imports':>8} {'context':>8} {'layer':>8} {'first':>8} {'second':>8}  kernels")
    for scheme in options.scheme:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(1 + options.repeats):
                row = {"scheme": scheme, "cache": "warm" if number else "cold"} | child(options.on, scheme, folder)
                rows.append(row)
                seconds = (f"{row[name]:8.3f}" for name in ("imports", "context", "layer", "first", "second"))
                print(f"{scheme:10} {row['cache']:5} {' '.join(seconds)}  {row['kernels']}", flush=True)
    missed = verdicts(rows)
    if options.output:
        found = {"command": " ".join(sys.argv), "commit": commit(), "device": device(options.on), "rows": rows}
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n")
    return 1 if missed else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scheme", nargs="+", default=["none"], help="none, or what quantize_experts takes")
    parser.add_argument("--repeats", type=int, default=5, help="warm processes after the cold one")
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(on: str, scheme: str, folder: str) -> dict:
    """Measure in a new process that finds its caches in `folder` and no compiler driver."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYMOE_")}
    environment |= {"PYMOE_CACHE_DIR": f"{folder}/pymoe", "CUPY_CACHE_DIR": f"{folder}/cupy", "PATH": "/usr/bin:/bin"}
    if shutil.which("nvcc", path=environment["PATH"]):
        raise SystemExit("nvcc is in /usr/bin or /bin: this machine cannot show that none is needed")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--on", on, "--child", scheme]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    kept = [path for path in Path(folder, "pymoe").rglob("*") if path.is_file()]
    return json.loads(done.stdout) | {"kernels": len(kept)}


def measure(on: str, scheme: str) -> dict:
    """Time imports, context, construction, first and second call of one layer in this process; seconds."""
    times = {}

    def timed(name, action):
        started = time.perf_counter()
        result = action()
        times[name] = time.perf_counter() - started
        return result

    xp, wait = timed("imports", lambda: imports(on))
    import pymoe

    host = inputs(scheme)

    def context():
        arrays = [on_device(xp, array) for array in host]
        wait()
        return arrays

    w1, w2, x, logits, config = timed("context", context)
    layer = timed("layer", lambda: pymoe.MoELayer(w1, w2, topk=TOPK, quant_config=config))

    def call():
        layer(x, router_logits=logits)
        wait()

    timed("first", call)
    timed("second", call)
    return times


def imports(on: str) -> tuple:
    """Import all that a layer needs; return the array module and a function that waits for the device."""
    import ml_dtypes  # noqa: F401
    import numpy

    import pymoe  # noqa: F401

    if on == "cpu":
        import numba  # noqa: F401

        return numpy, lambda: None
    import cuda.core  # noqa: F401
    import cupy

    from pymoe.catalogue import all_kernels

    all_kernels("sm_90a")  # pymoe's own modules for CUDA, which the first call would import
    return cupy, lambda: cupy.cuda.runtime.deviceSynchronize()


def inputs(scheme: str) -> tuple:
    """Return both weights, tokens, logits and the quant config of a random layer on the host."""
    import ml_dtypes
    import numpy as np

    import pymoe

    random = np.random.default_rng(0)
    bf16 = ml_dtypes.bfloat16
    w1, w2 = ((random.standard_normal(s, np.float32) / 32).astype(bf16) for s in ((E, 2 * I, K), (E, K, I)))
    x = random.standard_normal((M, K), np.float32).astype(bf16)
    logits = random.standard_normal((M, E), np.float32)
    config = None
    if scheme != "none":
        w1, w2, config = pymoe.quantize_experts(w1, w2, scheme)
    return w1, w2, x, logits, config


def on_device(xp, value):
    """Return an array, or what a quant config holds of arrays, on the device."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return xp.asarray(value)
    if value is None:
        return None
    operands = {}
    for name in ("w1", "w2"):
        operand = getattr(value, name)
        arrays = {key: xp.asarray(item) for key, item in vars(operand).items() if isinstance(item, np.ndarray)}
        operands[name] = dataclasses.replace(operand, **arrays)
    return dataclasses.replace(value, **operands)


def verdicts(rows: list[dict]) -> list[str]:
    """Print and return the limits that are missed: construction and first call together."""
    missed = []
    for scheme in sorted({row["scheme"] for row in rows}):
        for cache, limit in LIMITS_S.items():
            seconds = [row["layer"] + row["first"] for row in rows if (row["scheme"], row["cache"]) == (scheme, cache)]
            if not seconds:
                continue
            middle = sorted(seconds)[len(seconds) // 2]
            verdict = "within" if middle <= limit else "MISSES"
            print(f"{scheme} {cache}: {middle:.3f} s (median of {len(seconds)}), {verdict} {limit} s")
            if middle > limit:
                missed.append(f"{scheme} {cache}")
    return missed


def device(on: str) -> str:
    """Return the name of the GPU, or of the processor."""
    if on == "cpu":
        return platform.processor() or platform.machine()
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
