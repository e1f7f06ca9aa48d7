"""Tables and plots of ``docs/scaling.md``, all of them modelled: rewrites the page between its marks.

python benchmarks/model_scaling.py            # about three minutes; needs matplotlib
python benchmarks/model_scaling.py --no-plots
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  before pymoe
import ep_figures
import numpy as np

from pymoe import ep_model
from pymoe.comm.eplb import LoadWindow, initial_plan
from pymoe.comm.rebalance import rebalance

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
PLOTS = PAGE.parent / "_static"
H200 = dataclasses.replace(ep_model.SYSTEMS["deepep-h200-ib"], name="H200, 8 a node, CX7", start_us=(27.0, 27.0))
"""Bandwidths of DeepEP's normal kernels on H200 and CX7; start-up times of its low-latency kernels."""
SHAPES = (ep_model.DEEPSEEK_V3, ep_model.QWEN3_235B)
RANKS = (8, 16, 32, 64, 128, 256)
DECODE, PREFILL, STRONG = 128, 2048, 16384
ROUTES = ("rank", "node")


@functools.cache
def predicted(shape: ep_model.ModelShape, ranks: int, tokens: int, route: str) -> ep_model.Prediction:
    """Return one layer with `tokens` a rank, uniform routing, experts in blocks."""
    ids = [ep_model.draw_routing(shape, tokens, seed=rank) for rank in range(ranks)]
    traffic = ep_model.count_rows(ids, np.arange(shape.E) * ranks // shape.E, route=route, node_size=8)
    return ep_model.predict(traffic, H200, shape, ep_model.H200_FP8)


def fastest(shape: ep_model.ModelShape, ranks: int, tokens: int) -> tuple[ep_model.Prediction, str]:
    """Return the better of the two routes."""
    return min(((predicted(shape, ranks, tokens, route), route) for route in ROUTES), key=lambda pair: pair[0].layer_us)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table, numbers to the right."""
    shown = [[f"{cell:.0f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    numeric = [all(re.fullmatch(r"[-+\d.,%]+", row[i]) for row in shown) for i in range(len(heads))]
    marks = ["--:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, marks, *shown))


def published() -> str:
    """Return one line a system: how its figures compare."""
    rows = []
    for name, system in ep_model.SYSTEMS.items():
        found = [one for one in ep_figures.compare("ep.csv") if one.line["system"] == name]
        by_use = {
            use: [abs(one.error) for one in found if one.line["use"] == use] for use in ("fit", "check", "outside")
        }
        if not by_use["check"]:
            continue
        checks = by_use["check"]
        counts = [str(len(by_use[use])) for use in ("fit", "check")]
        rows.append([f"`{name}`", *counts, f"{np.median(checks):.1%}", f"{max(checks):.1%}", system.source])
    heads = ["system", "fitted", "predicted", "median error", "greatest", "constants fitted to"]
    return table(heads, rows)


def outside() -> str:
    """Return the figures that the model does not reproduce."""
    rows = []
    for one in ep_figures.compare("ep.csv"):
        if one.line["use"] == "outside":
            line = one.line
            what = f"{line['op']}, {line['ranks']} ranks, {line['tokens']} tokens"
            rows.append([f"`{line['system']}`", what, line["value"], one.predicted, f"{one.error:+.0%}"])
    return table(["system", "what", "published us", "modelled us", "error"], rows)


def gemms() -> str:
    """Return measured GEMMs beside the model's."""
    found = ep_figures.compare("measured_gemms.csv")
    rows = []
    for one in found:
        line = one.line
        cells = [line["layer"], line["compute"], line["tokens"], one.given, one.predicted, f"{one.error:+.0%}"]
        rows.append([*cells, "fitted" if line["use"] == "fit" else ""])
    return table(["layer", "dtype", "tokens", "measured us", "modelled us", "error", " "], rows)


def weak(shape: ep_model.ModelShape, tokens: int, ranks: Sequence[int] = RANKS) -> str:
    """Return weak scaling: `tokens` a rank."""
    rows, base = [], fastest(shape, 8, tokens)[0].layer_us
    for R in ranks:
        if R > shape.E:
            continue
        best, route = fastest(shape, R, tokens)
        direct = predicted(shape, R, tokens, "rank").layer_us
        parts = [best.dispatch_us, best.experts_us, best.combine_us, best.layer_us]
        rate = f"{tokens / best.layer_us:.2f}"
        rows.append([str(R), route, *parts, best.dispatch_link, direct, rate, f"{base / best.layer_us:.0%}"])
    heads = ["ranks", "route", "dispatch", "experts", "combine", "layer us", "link", "by rank", "tokens/us a rank"]
    return table([*heads, "efficiency"], rows)


def strong(shape: ep_model.ModelShape, ranks: Sequence[int] = RANKS) -> str:
    """Return strong scaling: `STRONG` tokens in all."""
    rows, base = [], fastest(shape, 8, STRONG // 8)[0].layer_us
    for R in ranks:
        if R > shape.E:
            continue
        best, route = fastest(shape, R, STRONG // R)
        parts = [best.dispatch_us, best.experts_us, best.combine_us, best.layer_us]
        speedup = base / best.layer_us
        rows.append([str(R), str(STRONG // R), route, *parts, f"{speedup:.2f}", f"{speedup * 8 / R:.0%}"])
    heads = ["ranks", "tokens a rank", "route", "dispatch", "experts", "combine", "layer us", "speed-up over 8"]
    return table([*heads, "efficiency"], rows)


def formats(ranks: int = 32, tokens: int = DECODE) -> str:
    """Return what formats on the wire cost DeepSeek-V3, by node and by slot too."""
    shape, rows = ep_model.DEEPSEEK_V3, []
    ids = [ep_model.draw_routing(shape, tokens, seed=rank) for rank in range(ranks)]
    owner = np.arange(shape.E) * ranks // shape.E
    traffic = {route: ep_model.count_rows(ids, owner, route=route, node_size=8) for route in ep_model.ROUTES}
    for there, back in (("fp8", "bfloat16"), ("bfloat16", "bfloat16"), ("nvfp4", "bfloat16"), ("fp8", "float32")):
        times = []
        for route in ep_model.ROUTES:
            found = ep_model.predict(traffic[route], H200, shape, dispatch_format=there, combine_format=back)
            times.append(found.layer_us)
        rows.append([there, back, *times])
    return table(["dispatch", "combine", *(f"by {route}, us" for route in ep_model.ROUTES)], rows)


def balance(ranks: int = 32, tokens: int = PREFILL, redundant: Sequence[int] = (0, 32, 64)) -> str:
    """Return DeepSeek-V3 under skewed routing, before and after balancing by the loads of other tokens."""
    shape, rows = ep_model.DEEPSEEK_V3, []
    for exponent in (0.0, 0.4, 0.8):
        popular = ep_model.zipf(shape.E, exponent, seed=1)
        window = LoadWindow(1, shape.E)
        window.record(ep_model.draw_routing(shape, 16 * tokens, popular, seed=999))
        window.step()
        ids = [ep_model.draw_routing(shape, tokens, popular, seed=rank) for rank in range(ranks)]
        loads = np.bincount(np.concatenate(ids).reshape(-1), minlength=shape.E)[None]
        plans = [("blocks", initial_plan(shape.E, 0, ranks))]
        for more in redundant:
            plan = rebalance(window.total(), num_physical=shape.E + more, ranks=ranks)
            plans.append((f"balanced, {more} redundant" if more else "balanced", plan))
        size = {"num_physical": shape.E + 32, "ranks": ranks, "nodes": ranks // 8, "groups": shape.groups}
        plans.append(("balanced, 32 redundant, groups on nodes", rebalance(window.total(), **size)))
        for name, plan in plans:
            served = [plan.to_physical(chosen, first_token=rank) for rank, chosen in enumerate(ids)]
            owner = np.arange(plan.num_physical) // plan.slots
            traffic = ep_model.count_rows(served, owner, route="node", node_size=8)
            found = ep_model.predict(traffic, H200, shape, ep_model.H200_FP8)
            by_rank = traffic.rows.sum(axis=1)
            rows.append([
                f"{exponent:.1f}", name, f"{by_rank.mean() / by_rank.max():.2f}", f"{plan.balancedness(loads)[0]:.2f}",
                found.dispatch_us, found.experts_us, found.combine_us, found.layer_us,
            ])  # fmt: skip
    heads = ["Zipf", "placement", "rows: mean/greatest", "by counts", "dispatch", "experts", "combine", "layer us"]
    return table(heads, rows)


def drift(layers: int = 58) -> str:
    """Return what a change of loads moves: DeepSeek-V3's layers, each expert's load times a log-normal factor."""
    rng = np.random.Generator(np.random.Philox(7))
    L, P, R = 256, 288, 32
    loads = np.stack([ep_model.zipf(L, 0.8, seed=layer) for layer in range(layers)])
    plan = rebalance(loads, num_physical=P, ranks=R)
    rows = []
    for spread in (0.05, 0.2, 0.5):
        now = loads * rng.lognormal(0, spread, loads.shape)
        fresh = rebalance(now, num_physical=P, ranks=R)
        cells: list[Any] = [f"{spread:.2f}", f"{plan.balancedness(now).mean():.3f}"]
        for name in (fresh, *(rebalance(now, num_physical=P, ranks=R, current=plan, slack=s) for s in (0.01, 0.05))):
            cells += [f"{name.balancedness(now).mean():.3f}", f"{name.moved_from(plan).mean():.0f}"]
        rows.append(cells)
    heads = ["drift", "kept", "new plan", "moved", "slack 1 %", "moved", "slack 5 %", "moved"]
    return table(heads, rows)


TABLES: dict[str, Callable[[], str]] = {
    "published": published,
    "outside": outside,
    "gemms": gemms,
    **{
        f"weak {shape.name} {tokens}": functools.partial(weak, shape, tokens)
        for shape in SHAPES
        for tokens in (DECODE, PREFILL)
    },
    **{f"strong {shape.name}": functools.partial(strong, shape) for shape in SHAPES},
    "formats": formats,
    "balance": balance,
    "drift": drift,
}


def between_marks(name: str) -> str:
    """Return the pattern of table `name` in the page, marks as its first and last group."""
    return f"(<!-- table: {re.escape(name)} -->\n\n)(.*?)(\n\n<!-- end of table -->)"


def shown(name: str) -> str:
    """Return what the page holds as table `name`."""
    ((_, found, _),) = re.findall(between_marks(name), PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return found


def rewrite() -> None:
    """Write every table into the page."""
    for name, make in TABLES.items():
        shown(name)  # the page must have it once
        new = make()
        text = PAGE.read_text(encoding="utf-8")
        text = re.sub(between_marks(name), lambda m, new=new: m[1] + new + m[3], text, flags=re.DOTALL)
        PAGE.write_text(text, encoding="utf-8")


def draw() -> None:
    """Draw the three plots."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "pymoe", "font.size": 8, "axes.spines.top": False,
                     "axes.spines.right": False}  # fmt: skip
    with matplotlib.rc_context(settings):
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(5, 4.2), layout="constrained")
        compared = [one for one in ep_figures.compare("ep.csv") if one.line["use"] == "check"]
        for unit, colour in (("us", "#1f5fa8"), ("GB/s", "#b5402e")):
            found = [one for one in compared if one.line["unit"] == unit]
            axes.plot(
                [o.given for o in found], [o.predicted for o in found], "o", color=colour, markersize=3, label=unit
            )
        ends = np.array([15.0, 1200.0])
        axes.plot(ends, ends, color="#888888", linewidth=0.8)
        axes.fill_between(ends, 0.85 * ends, 1.15 * ends, color="#dddddd", label="15 % either way")
        axes.set(xscale="log", yscale="log", xlabel="published", ylabel="modelled", xlim=ends, ylim=ends)
        axes.legend(frameon=False)
        figure.savefig(PLOTS / "scaling_published.svg", metadata={"Date": None})

        for kind, label in (("weak", "tokens a rank"), ("strong", "tokens in all")):
            figure, grid = pyplot.subplots(1, 4 if kind == "weak" else 2, figsize=(9, 2.6), layout="constrained")
            cases = [(s, t) for s in SHAPES for t in ((DECODE, PREFILL) if kind == "weak" else (STRONG,))]
            for panel, (shape, tokens) in zip(grid, cases, strict=True):
                _stack(panel, shape, tokens, kind == "strong", f"{shape.name}\n{tokens} {label}")
            grid[0].set_ylabel("us (modelled)")
            handles, labels = grid[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
            figure.savefig(PLOTS / f"scaling_{kind}.svg", metadata={"Date": None})


def _stack(axes: Any, shape: ep_model.ModelShape, tokens: int, shared: bool, title: str) -> None:
    """Draw the parts of a layer above each other."""
    ranks = [R for R in RANKS if R <= shape.E]
    found = [fastest(shape, R, tokens // R if shared else tokens)[0] for R in ranks]
    bottom = np.zeros(len(ranks))
    for part, colour in (("dispatch_us", "#1f5fa8"), ("experts_us", "#bbbbbb"), ("combine_us", "#b5402e")):
        heights = np.array([getattr(one, part) for one in found])
        axes.bar([str(R) for R in ranks], heights, 0.7, bottom, color=colour, label=part.removesuffix("_us"))
        bottom += heights
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("ranks")


if __name__ == "__main__":
    rewrite()
    if "--no-plots" not in sys.argv:
        draw()
