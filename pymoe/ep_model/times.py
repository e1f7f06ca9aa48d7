"""From counts to microseconds: links by start-up time and bandwidth, experts by products and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pymoe import checks
from pymoe.ep_model.traffic import ModelShape, Traffic
from pymoe.errors import ArgumentError, complaint

Array = Any

_FORMATS = {  # bytes of an element; elements that share a scale, bytes of a scale
    "float32": (4.0, 0, 0),
    "bfloat16": (2.0, 0, 0),
    "float16": (2.0, 0, 0),
    "fp8": (1.0, 128, 4),
    "int8": (1.0, 0, 4),
    "mxfp8": (1.0, 32, 1),
    "mxfp4": (0.5, 32, 1),
    "nvfp4": (0.5, 16, 1),
}


@dataclass(frozen=True)
class System:
    """Ranks, links and start-up times of a machine with a communication library.

    Attributes
    ----------
    name : str
    node_size : int
        Ranks of a node.
    inside, network : float
        GB/s (1e9 bytes a second) that a rank sends, and receives at the same time, within its node and to other nodes.
    start_us : tuple of float
        Start-up time of a dispatch and of a combine.
    floor_us : tuple of float, optional
        The least that a dispatch and a combine take: small ones hide in their own synchronisation.
    message_us : float, optional
        For each rank that a rank sends to.
    inside_kind : str, optional
        What `inside` is: "nvlink", "xgmi", "pcie" or "shm", memory shared by processes.
    local, staging : float, optional
        GB/s of copies that stay on a rank, and between a rank's memory and its links (PCIe, where the host sends what a
        GPU holds); default unlimited.
    source : str, optional
        Where the constants come from.
    """

    name: str
    node_size: int
    inside: float
    network: float
    start_us: tuple[float, float]
    floor_us: tuple[float, float] = (0.0, 0.0)
    message_us: float = 0.0
    inside_kind: str = "nvlink"
    local: float = np.inf
    staging: float = np.inf
    source: str = ""

    def links(self) -> dict[str, float]:
        """Return the GB/s of every link by its kind."""
        return {"rank": self.local, self.inside_kind: self.inside, "network": self.network, "staging": self.staging}


@dataclass(frozen=True)
class Compute:
    """How fast a rank multiplies.

    Attributes
    ----------
    tflops : float
        Of the experts' GEMMs, rows that fill a tile included.
    memory : float
        GB/s at which weights are read.
    tile : int
        The rows of an expert are computed in multiples of it.
    weight_bytes : float
        Bytes of a weight.
    source : str, optional
        Where the constants come from.
    """

    tflops: float
    memory: float
    tile: int = 1
    weight_bytes: float = 2.0
    source: str = ""

    def experts_us(self, rows: Array, shape: ModelShape) -> Array:
        """Return (ranks,) us for both GEMMs of `rows` (ranks, experts of a rank): products or weights."""
        rows = np.asarray(rows, np.int64)
        padded = -(-rows // self.tile) * self.tile
        weights = 3 * shape.K * shape.I  # gate, up and down
        products_us = 2 * padded.sum(axis=-1) * weights / (self.tflops * 1e6)
        weights_us = np.count_nonzero(rows, axis=-1) * weights * self.weight_bytes / (self.memory * 1e3)
        return np.maximum(products_us, weights_us)


class Prediction(NamedTuple):
    """Microseconds of one layer on the slowest rank; modelled.

    Attributes
    ----------
    dispatch_us, experts_us, combine_us, layer_us : float
        The last is the sum of the others: nothing overlaps.
    dispatch_link, combine_link : str
        The busiest link of each exchange, or "start" where it is busy for less than the exchange takes to start.
    """

    dispatch_us: float
    experts_us: float
    combine_us: float
    layer_us: float
    dispatch_link: str
    combine_link: str


def row_bytes(K: int, format: str, topk: int = 0) -> float:
    """Return the bytes of a row of K elements on the wire, its scales and `topk` ids and weights included.

    Parameters
    ----------
    K : int
    format : str
        "float32", "bfloat16", "float16", "fp8" (a float32 scale for 128 elements), "int8" (one for the row), "mxfp8",
        "mxfp4", "nvfp4".
    topk : int, optional
        Slots whose int32 id and float32 weight travel along.

    Examples
    --------
    >>> from pymoe.ep_model import row_bytes
    >>> row_bytes(7168, "fp8"), row_bytes(7168, "nvfp4"), row_bytes(7168, "bfloat16", topk=8)
    (7392.0, 4032.0, 14400.0)
    """
    K = checks.integer("row_bytes", "K", K, 0)
    if format not in _FORMATS:
        raise ArgumentError(complaint("row_bytes", "format", f"be one of {', '.join(_FORMATS)}", repr(format)))
    element, group, scale = _FORMATS[format]
    scales = 0 if not scale else -(-K // group) if group else 1
    return K * element + scales * scale + 8.0 * topk


def exchange_us(traffic: Traffic, system: System, bytes_of_row: float, *, combine: bool = False) -> tuple[float, str]:
    """Return the microseconds of one exchange of the rows in `traffic`, and its busiest link.

    Parameters
    ----------
    traffic : Traffic
        Of a combine: the way there; the rows go back along it.
    system : System
    bytes_of_row : float
    combine : bool
    """
    if combine:
        traffic = traffic.back()
    busy = {}
    for kind, bandwidth, sent in _bytes_by_link(traffic, system, bytes_of_row):
        most = max(sent.sum(axis=0).max(initial=0), sent.sum(axis=1).max(initial=0))
        busy[kind] = float(most) / (bandwidth * 1e3)
    link = max(busy, key=lambda kind: busy[kind])
    messages = 0
    for leg in traffic.legs:
        messages += int((np.count_nonzero(leg, axis=1) - (np.diagonal(leg) > 0)).max(initial=0))
    start = system.start_us[combine] + system.message_us * messages
    floor = system.floor_us[combine]
    return max(floor, start + busy[link]), link if busy[link] > max(start, floor - start) else "start"


def _bytes_by_link(traffic: Traffic, system: System, bytes_of_row: float) -> Iterator[tuple[str, float, Array]]:
    """Yield kind and GB/s of every link, and the bytes (R, R) that cross it, both hops together."""
    number = np.arange(len(traffic.tokens))
    node = number // system.node_size
    sent = np.sum(traffic.legs, axis=0) * bytes_of_row
    same, near = number[:, None] == number, node[:, None] == node
    for (kind, bandwidth), mask in zip(system.links().items(), (same, near & ~same, ~near, ~same), strict=True):
        yield kind, bandwidth, np.where(mask, sent, 0)


def predict(
    traffic: Traffic,
    system: System,
    shape: ModelShape,
    compute: Compute | None = None,
    *,
    dispatch_format: str = "fp8",
    combine_format: str = "bfloat16",
) -> Prediction:
    """Predict one layer: dispatch, the experts' GEMMs on the rank with most to do, combine.

    Parameters
    ----------
    traffic : Traffic
        See `count_rows`.
    system : System
    shape : ModelShape
    compute : Compute, optional
        Without it the experts take no time.
    dispatch_format, combine_format : str
        Of the rows there and back, see `row_bytes`.  Expert-parallel layers of pymoe send "float32" partial sums back.
    """
    if traffic.node_size != system.node_size and len(traffic.legs) > 1:
        rule = f"be counted with the system's {system.node_size} ranks a node"
        raise ArgumentError(complaint("predict", "traffic", rule, traffic.node_size))
    there, back = row_bytes(shape.K, dispatch_format, shape.topk), row_bytes(shape.K, combine_format)
    dispatch_us, dispatch_link = exchange_us(traffic, system, there)
    combine_us, combine_link = exchange_us(traffic, system, back, combine=True)
    experts_us = 0.0 if compute is None else float(compute.experts_us(traffic.rows, shape).max(initial=0.0))
    total = dispatch_us + experts_us + combine_us
    return Prediction(dispatch_us, experts_us, combine_us, total, dispatch_link, combine_link)
