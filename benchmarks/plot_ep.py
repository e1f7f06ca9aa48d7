"""Draw the runs of bench_ep.py: python benchmarks/plot_ep.py benchmarks/results/ep.json out.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "pymoe"  # the same file for the same numbers
from bench_ep import WAYS  # noqa: E402
from matplotlib import pyplot  # noqa: E402  after the backend is chosen

STYLES = {"shm": "o-", "host": "s-", "Alltoallv": "k:"}


def main(results: Path, picture: Path) -> None:
    runs = json.loads(results.read_text())["runs"]
    figure, panels = pyplot.subplots(len(runs), len(WAYS), figsize=(12, 3.6 * len(runs)), squeeze=False)
    for line, run in zip(panels, runs, strict=True):
        sizes = sorted(run["transfers"], key=int)
        for panel, (way, title) in zip(line, WAYS.items(), strict=True):
            for name, style in STYLES.items():
                rates = [int(size) / run["transfers"][size][name + way] / 1e9 for size in sizes]
                panel.semilogx([int(size) for size in sizes], rates, style, base=2, label=name)
            panel.set_title(f"{' '.join(run['MPI'].split(',')[0].split())}: {title}", fontsize=9)
            panel.set(xlabel="bytes a pair", ylim=(0, None))
            panel.legend()
        line[0].set(ylabel="GB/s, each way of a rank")
    figure.suptitle(f"{runs[0]['ranks']} ranks, {runs[0]['processor']}, {runs[0]['cores']} cores", fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
