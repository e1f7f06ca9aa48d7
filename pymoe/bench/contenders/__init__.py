"""Who is timed: pymoe and its peers, behind one interface."""

from pymoe.bench.contenders.contender import Contender
from pymoe.bench.contenders.registry import PEERS, build, importable

__all__ = ["PEERS", "Contender", "build", "importable"]
