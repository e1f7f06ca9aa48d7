"""Time against tokens, one panel a scheme: ours, the peers, the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pymoe.bench.store import Results
from pymoe.bench.table import LABELS, Line, lines

__all__ = ["draw"]

COLOURS = {"ours": "#1f5fa8", "numpy": "#c98a1b", "torch": "#b5402e", "jax": "#5c8f4a"}
COLUMNS = 3


def draw(results: Results, path: Path) -> None:
    """Draw the newest run of the file into `path` (.svg, .png or .pdf); its first shape, if it has several."""
    import matplotlib

    # Text stays text, names and dates do not change from drawing to drawing: the file is small and diffs are honest.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "pymoe", "font.size": 8, "axes.spines.top": False,
                "axes.spines.right": False}  # fmt: skip
    with matplotlib.rc_context(settings):
        matplotlib.use("Agg")
        from matplotlib import pyplot

        newest = max((row.run for row in results.rows if row.contender == "ours"), default="")
        rows = [row for row in results.rows if row.run == newest]
        found = lines(row for row in rows if row.shape == rows[0].shape)
        schemes = list(dict.fromkeys(line.ours.scheme for line in found))
        down = max(1, -(-len(schemes) // COLUMNS))
        figure, grid = pyplot.subplots(
            down, COLUMNS, figsize=(9, 0.4 + 2.4 * down), sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for axes, scheme in zip(grid.flat, schemes, strict=False):
            _panel(axes, [line for line in found if line.ours.scheme == scheme], scheme)
        for axes in list(grid.flat)[len(schemes) :]:
            axes.axis("off")
        handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(),
                                                                                strict=True)}  # fmt: skip
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
        pyplot.close(figure)


def _panel(axes: Any, found: list[Line], scheme: str) -> None:
    tokens = [line.ours.tokens for line in found]
    axes.fill_between(tokens, [1e3 * line.ours.floor_s for line in found], color="#dddddd", label="below the floor")
    for name in ("numpy", "torch", "jax"):
        there = [(line.ours.tokens, line.peers[name]) for line in found if name in line.peers]
        if there:
            label = LABELS[name] if name == "numpy" else f"{LABELS[name]}, same precision or bf16"
            axes.plot(
                [M for M, _ in there], [1e3 * row.median_s for _, row in there], "o-", markersize=3, linewidth=1,
                color=COLOURS[name], label=label,
            )  # fmt: skip
    axes.plot(
        tokens, [1e3 * line.ours.median_s for line in found], "o-", markersize=4, linewidth=2, color=COLOURS["ours"],
        label="pymoe",
    )  # fmt: skip
    axes.set(xscale="log", yscale="log", title=scheme, xlabel="tokens", ylabel="ms")
    axes.set_xticks(tokens, [str(M) for M in tokens])
    axes.minorticks_off()
