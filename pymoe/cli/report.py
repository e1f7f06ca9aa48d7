"""What a run prints and draws: plan, expert load, sizes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from pymoe.layer import Plan

Array = Any

BAR = 40
"""Characters of the longest bar."""


def size(count: float) -> str:
    """Return a number of bytes in a unit that keeps it short."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def print_plan(plan: Plan, M: int, dtype: Any) -> None:
    """Print the chosen pair, its memory and every refused candidate."""
    print(f"plan       {plan.prepare_finalize} with {plan.experts}, {M} tokens in {dtype}")
    print(f"           {plan.chunks} chunks a step, workspace {size(plan.workspace_bytes)}")
    for refusal in plan.refused:
        print(f"           not {refusal.experts}: {refusal.reason}")


def print_load(load: Array) -> None:
    """Print the rows of each expert as bars, and how far the busiest is above the mean."""
    largest, total = int(load.max(initial=0)), int(load.sum())
    print(f"load       {total} rows over {len(load)} experts", end="")
    print(f", busiest {largest / (total / len(load)):.2f} times the mean" if total else "")
    for expert, rows in enumerate(load):
        bar = "#" * round(BAR * int(rows) / largest) if largest else ""
        print(f"{expert:>10} {int(rows):>9}  {bar}".rstrip())


def why_missing(library: str) -> str:
    """Return why an optional library cannot be imported; empty if it can.

    Another process tries, since a broken installation may do worse than raise.
    """
    if importlib.util.find_spec(library) is None:
        return "not installed"
    command = [sys.executable, "-c", f"import {library}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except subprocess.TimeoutExpired:
        return "its import takes more than a minute"
    last = done.stderr.strip().splitlines()[-1:]
    return "" if done.returncode == 0 else "".join(last)[:300] or f"its import ends with status {done.returncode}"


def print_cuda() -> None:
    """Print what there is of CUDA.  Another process looks, since broken libraries may crash or hang theirs."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from pymoe.device import findings; findings.show()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=120
        )
    except subprocess.TimeoutExpired:
        print("CUDA cannot be used: looking for it takes more than two minutes")
        return
    print(done.stdout, end="")
    if done.returncode != 0:
        last = "".join(done.stderr.strip().splitlines()[-1:])[:300]
        print(f"CUDA cannot be used: the look ended with status {done.returncode} {last}".rstrip())


def can_plot() -> bool:
    """Return whether matplotlib is there, without loading it."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_load(load: Array, path: Path, title: str) -> None:
    """Draw the expert load as bars with its mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(max(4, min(16, len(load) / 4)), 3), layout="constrained")
    axes.bar(range(len(load)), load, color="#4878a8")
    axes.axhline(load.mean(), color="#a04040", linewidth=1, label=f"mean {load.mean():.1f}")
    axes.set(xlabel="expert", ylabel="rows", title=title, ylim=(0, 1.25 * max(load.max(), 1)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
    pyplot.close(figure)
