"""Draw the newest run of bench_moe.py: python benchmarks/plot_moe.py benchmarks/results/cuda_moe.json out.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "pymoe"  # the same file for the same numbers
from matplotlib import pyplot  # noqa: E402  after the backend is chosen


def main(results: Path, picture: Path) -> None:
    run = json.loads(results.read_text())["runs"][-1]
    kinds = sorted({(row["shape"], row["scheme"]) for row in run["rows"]})
    figure, panels = pyplot.subplots(1, len(kinds), figsize=(5.2 * len(kinds), 3.6), squeeze=False)
    for panel, (shape, scheme) in zip(panels[0], kinds, strict=True):
        rows = sorted((r for r in run["rows"] if (r["shape"], r["scheme"]) == (shape, scheme)), key=lambda r: r["M"])
        tokens = [r["M"] for r in rows]
        panel.loglog(tokens, [r["us"] for r in rows], "o-", label="pymoe")
        panel.loglog(tokens, [r["floor_us"] for r in rows], "k:", label="floor")
        peers = [(r["M"], r["torch_us"]) for r in rows if r.get("torch_us")]
        if peers:
            panel.loglog(*zip(*peers, strict=True), "s--", label="PyTorch, grouped_mm")
        panel.set(title=f"{shape}, {scheme}", xlabel="tokens M", ylabel="microseconds a layer")
        panel.legend()
    figure.suptitle(run["device"], fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
