"""Draw the newest figure of each row: python benchmarks/plot_moe.py benchmarks/results/cuda_moe.json out.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "pymoe"  # the same file for the same numbers
from matplotlib import pyplot  # noqa: E402  after the backend is chosen

COLUMNS = 3


def main(results: Path, picture: Path) -> None:
    runs = json.loads(results.read_text())["runs"]
    newest = {(row["shape"], row["scheme"], row["M"]): row for run in runs for row in run["rows"]}
    kinds = sorted({key[:2] for key in newest})
    height = -(-len(kinds) // COLUMNS)
    figure, grid = pyplot.subplots(height, COLUMNS, figsize=(4.4 * COLUMNS, 3.4 * height), squeeze=False)
    for panel in grid.flat[len(kinds) :]:
        panel.remove()
    for panel, kind in zip(grid.flat, kinds, strict=False):
        shape, scheme = kind
        rows = [newest[key] for key in sorted(newest) if key[:2] == kind]
        tokens = [r["M"] for r in rows]
        panel.loglog(tokens, [r["us"] for r in rows], "o-", label="pymoe")
        panel.loglog(tokens, [r["floor_us"] for r in rows], "k:", label="floor")
        peers = [(r["M"], r["torch_us"]) for r in rows if r.get("torch_us")]
        if peers:
            panel.loglog(*zip(*peers, strict=True), "s--", label="PyTorch, grouped_mm")
        panel.set(title=f"{shape}, {scheme}", xlabel="tokens M", ylabel="microseconds a layer")
        panel.legend()
    figure.suptitle(", ".join(sorted({run["device"] for run in runs})), fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
