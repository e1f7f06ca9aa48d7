"""A model of expert-parallel time: rows counted exactly, links by start-up time and bandwidth.  Nothing is measured.

An exchange takes ``max(floor, start + busy + message * messages)``: a start-up time, the time of the busiest link, a
cost for each message that a rank sends, and a least time.  A link is busy for the bytes of the rank that sends or
receives most over it, divided by its bandwidth.  Links differ by what lies between two ranks: nothing (one rank), the
node (NVLink, PCIe or shared memory), the network; where a *staging* link is given, all bytes that leave a rank cross
it as well, as between a GPU and its host.

What is modelled: counts of rows, from real ids and owners, imbalance included; bytes of rows in each format; one row
for each expert, rank or node; links of different kinds at work at the same time; the slowest rank.  What is not:
contention in switches, incast, messages too small to fill a link, clocks, overlap of exchanges with experts, and
everything around the experts' two GEMMs.

Examples
--------
How long does a layer of DeepSeek-V3 take on 16 GPUs, 8 a node, with 512 tokens each?

>>> from pymoe import ep_model as model
>>> shape, system = model.DEEPSEEK_V3, model.SYSTEMS["deepep-h200-ib"]
>>> ids = [model.draw_routing(shape, 512, seed=rank) for rank in range(16)]
>>> traffic = model.count_rows(ids, np.arange(256) // 16, route="node", node_size=8)
>>> model.predict(traffic, system, shape, model.H200_FP8).dispatch_link
'network'
"""

from pymoe.ep_model.systems import DEEPSEEK_V3, H200_BF16, H200_FP8, QWEN3_30B, QWEN3_235B, SYSTEMS
from pymoe.ep_model.times import Compute, Prediction, System, exchange_us, predict, row_bytes
from pymoe.ep_model.traffic import ROUTES, ModelShape, Traffic, count_rows, draw_routing, zipf

__all__ = [
    "DEEPSEEK_V3",
    "H200_BF16",
    "H200_FP8",
    "QWEN3_235B",
    "QWEN3_30B",
    "ROUTES",
    "SYSTEMS",
    "Compute",
    "ModelShape",
    "Prediction",
    "System",
    "Traffic",
    "count_rows",
    "draw_routing",
    "exchange_us",
    "predict",
    "row_bytes",
    "zipf",
]
