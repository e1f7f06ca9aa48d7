"""Rows as a table, in plain text or Markdown: each scheme of ours beside its floor and its peers of the same run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pymoe.bench.aims import NEAR_FLOOR, aim_for
from pymoe.bench.store import Results, Row

__all__ = ["Line", "as_markdown", "as_text", "heading", "lines", "tables"]

LABELS = {"ours": "pymoe", "numpy": "NumPy fp32", "torch": "PyTorch", "jax": "JAX"}
NONE = "-"
NOISY = 1.25
"""Spread between rounds from which a comparison is worth nothing: an aim is then neither met nor missed."""

WIDTH = 100
"""Characters of a line of text."""


@dataclass(frozen=True)
class Line:
    """One scheme of ours with the peers that answer for it."""

    ours: Row
    peers: dict[str, Row]

    @property
    def best(self) -> Row | None:
        """The fastest peer."""
        return min(self.peers.values(), key=lambda row: row.median_s, default=None)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the fastest peer, by medians."""
        return None if self.best is None else self.best.median_s / self.ours.median_s

    @property
    def noisy(self) -> bool:
        """Whether the machine was too busy to compare the two."""
        return max(row.spread for row in (self.ours, self.best) if row is not None) > NOISY

    @property
    def over_floor(self) -> float:
        """How many times the floor."""
        return self.ours.median_s / self.ours.floor_s


def lines(rows: Iterable[Row]) -> list[Line]:
    """Return the lines of one run and shape, by tokens and then in the order of the rows.

    A peer answers in the scheme's own precision if it has it, else in bf16, else in fp32.
    """
    rows = list(rows)
    found = []
    for ours in (row for row in rows if row.contender == "ours"):
        peers: dict[str, Row] = {}
        for scheme in ("fp32", "bf16", ours.scheme):
            if scheme == "bf16" and ours.scheme == "fp32":
                continue
            same = [row for row in rows if (row.tokens, row.scheme) == (ours.tokens, scheme)]
            peers |= {row.contender: row for row in same if row.contender != "ours"}
        found.append(Line(ours, peers))
    return sorted(found, key=lambda line: line.ours.tokens)


def milliseconds(seconds: float) -> str:
    """Return milliseconds with three significant digits and no exponent."""
    value = 1e3 * seconds
    places = 2 - math.floor(math.log10(value)) if value > 0 else 2
    return f"{value:.{min(max(places, 0), 6)}f}"


def cells(found: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Return the header and one list of cells for each line."""
    names = [name for name in LABELS if any(name in line.peers for line in found)]
    names += sorted({name for line in found for name in line.peers} - set(names))
    header = ["M", "scheme", "ms", "least", "floor", "times floor"]
    header += [LABELS.get(name, name) for name in names] + ["speed-up", "aim"]
    body = []
    for line in found:
        ours = line.ours
        body.append([
            str(ours.tokens), ours.scheme, milliseconds(ours.median_s), milliseconds(ours.min_s),
            f"{milliseconds(ours.floor_s)} {ours.bound}", f"{line.over_floor:.2f}",
            *(_peer(line.peers.get(name)) for name in names),
            NONE if line.speedup is None else f"{line.speedup:.2f}", _aim(line),
        ])  # fmt: skip
    return header, body


def _peer(row: Row | None) -> str:
    return NONE if row is None else f"{milliseconds(row.median_s)} {row.variant}".rstrip()


def _aim(line: Line) -> str:
    aim = aim_for(line.ours.shape, line.ours.scheme, line.ours.tokens)
    if aim is None or line.speedup is None:
        return NONE
    if line.noisy:
        return f"{aim:g} noisy"
    if line.speedup >= aim:
        return f"{aim:g} met"
    return f"{aim:g} met (floor)" if line.over_floor <= NEAR_FLOOR else f"{aim:g} missed"


def as_text(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return columns aligned by spaces, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *body)
    )


def as_markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    rule = ["--:"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *body))


def heading(run: dict[str, Any], started: str, rows: Sequence[Row]) -> str:
    """Return one paragraph: what was measured, where, with which versions, at which rates."""
    E, topk, K, I = rows[0].shape
    device, versions, rates = run["device"], run["versions"], run["rates"]
    features = "; ".join([f"{device['cores']} cores", " ".join(device["features"])] if "cores" in device else [])
    threads = f"{run['threads']} threads of " if "threads" in run else ""
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "pymoe")
    gemm = [f"{library} {name} {rate / 1e9:.0f}" for name, by in rates["gemm"].items() for library, rate in by.items()]
    read = [f"{int(size) / 1e6:.3g} MB at {rate / 1e9:.1f} GB/s" for size, rate in rates["read"].items()]
    commit = (run["commit"] or "unknown")[:9]
    return (
        f"E {E}, topk {topk}, K {K}, I {I}; {threads}{device['processor']}{f' ({features})' if features else ''}; "
        f"{started}, commit {commit}, load before {run['load_before']}; {libraries}. "
        f"Read rates: {', '.join(read)}. GEMM rates, GFLOP/s: {', '.join(gemm)}. "
        f"Largest spread between the rounds of a contender: {max(row.spread for row in rows):.2f} times."
    )


def tables(results: Results, markdown: bool = False, only_run: str | None = None) -> str:
    """Return a heading and a table for each run and shape in the file, newest run first."""
    parts = []
    for started in sorted({row.run for row in results.rows}, reverse=True):
        if only_run is not None and started != only_run:
            continue
        rows = [row for row in results.rows if row.run == started]
        for shape in sorted({row.shape for row in rows}):
            mine = [row for row in rows if row.shape == shape]
            found = lines(mine)
            run = results.runs[started]
            text = [heading(run, started, mine)]
            if not markdown:
                text = [textwrap.fill(text[0], WIDTH)]
            else:
                text.append("Measured by " + ", ".join(f"`{command}`" for command in run["commands"]) + ".")
            if found:
                text.append((as_markdown if markdown else as_text)(*cells(found)))
            alone = [row for row in mine if row.contender != "ours"] if not found else []
            text += [f"{row.key}: {milliseconds(row.median_s)} ms {row.variant}".rstrip() for row in alone]
            parts.append("\n\n".join(text))
    return "\n\n".join(parts)
