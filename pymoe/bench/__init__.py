"""Timing of a layer beside its peers and its floor: ``python -m pymoe bench``.

Loads no optional library; a peer's library is loaded when that peer is built.
"""

from pymoe.bench.cases import Shape, whole_numbers
from pymoe.bench.command import Options, run, show
from pymoe.bench.page import rewrite
from pymoe.bench.plot import draw
from pymoe.bench.store import dump
from pymoe.bench.table import tables

__all__ = ["Options", "Shape", "draw", "dump", "rewrite", "run", "show", "tables", "whole_numbers"]
