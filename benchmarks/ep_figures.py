"""Published and measured figures beside the model's: reads ``benchmarks/published``, predicts every line."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401  before pymoe
import numpy as np

from pymoe import ep_model

PUBLISHED = Path(__file__).parent / "published"
COMPUTE = {"fp8": ep_model.H200_FP8, "bf16": ep_model.H200_BF16}


class Compared(NamedTuple):
    """One line of a file and what the model says; `error` is predicted over given, less 1."""

    line: dict[str, str]
    given: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.given - 1


@functools.cache
def traffic_of(E: int, routing: str, tokens: int, ranks: int, route: str) -> tuple[ep_model.Traffic, float]:
    """Return what a figure's routing sends, and how many (token, node) pairs a rank brings."""
    nodes = max(1, ranks // 8)
    owner = np.arange(E) * ranks // E
    if routing == "spread":
        near = (np.arange(tokens)[:, None] + np.arange(8)) % ranks
        ids = [((near + rank) % ranks) * (E // ranks) for rank in range(ranks)]
    else:
        groups, limit = (nodes, min(4, nodes)) if routing == "grouped" else (1, 1)
        shape = ep_model.ModelShape("", 7168, 2048, E, 8, groups, limit)
        ids = [ep_model.draw_routing(shape, tokens, seed=rank) for rank in range(ranks)]
    node_size = min(8, ranks) if route == "node" or routing != "spread" else ranks
    pairs = [len(np.unique(np.arange(tokens)[:, None] * nodes + owner[chosen] * nodes // ranks)) for chosen in ids]
    return ep_model.count_rows(ids, owner, route=route, node_size=node_size), float(np.mean(pairs))


def compare_exchange(line: dict[str, str]) -> Compared:
    """Predict a line of ``ep.csv``."""
    E, tokens, ranks = (int(line[name]) for name in ("E", "tokens", "ranks"))
    traffic, pairs = traffic_of(E, line["routing"], tokens, ranks, line["route"])
    row = ep_model.row_bytes(7168, line["format"])
    us, _ = ep_model.exchange_us(traffic, ep_model.SYSTEMS[line["system"]], row, combine=line["op"] == "combine")
    if line["unit"] == "us":
        return Compared(line, float(line["value"]), us)
    counted = pairs if line["counted"] == "node" else float(traffic.legs[-1].sum() / ranks)
    return Compared(line, float(line["value"]), counted * row / us / 1e3)


def compare_gemms(line: dict[str, str]) -> Compared:
    """Predict a line of ``measured_gemms.csv``."""
    E, topk, K, width, tokens = (int(line[name]) for name in ("E", "topk", "K", "I", "tokens"))
    shape = ep_model.ModelShape(line["layer"], K, width, E, topk)
    traffic = ep_model.count_rows([ep_model.draw_routing(shape, tokens)], np.zeros(E, np.int64))
    us = COMPUTE[line["compute"]].experts_us(traffic.rows, shape)[0]
    return Compared(line, float(line["us"]), float(us))


def compare(name: str) -> list[Compared]:
    """Return every line of the file `name` of ``benchmarks/published`` with its prediction."""
    with open(PUBLISHED / name, encoding="utf-8", newline="") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file))
    return [compare_gemms(line) if name == "measured_gemms.csv" else compare_exchange(line) for line in lines]


if __name__ == "__main__":
    for name in ("ep.csv", "measured_gemms.csv"):
        for found in compare(name):
            what = " ".join(value for key, value in found.line.items() if key not in ("value", "us", "source"))
            print(f"{found.given:8.1f} {found.predicted:8.1f} {found.error:+6.1%}  {what}")
