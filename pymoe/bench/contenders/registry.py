"""Which contenders there are, and how each is built."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from pymoe import environment
from pymoe.bench import machine
from pymoe.bench.cases import Shape, Weights
from pymoe.bench.contenders.contender import Contender
from pymoe.bench.contenders.ours import Ours
from pymoe.bench.reference import Quantized

__all__ = ["PEERS", "build", "importable"]

PEERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "numpy": ((), ("fp32",), ""),
    "torch": (("torch", "transformers"), ("fp32", "bf16"), "pip install torch transformers"),
    "jax": (("jax",), ("fp32", "bf16"), "pip install jax"),
}
"""Name -> the modules it needs, the schemes it computes in, and how to get it."""


def importable(name: str) -> str:
    """Return why a peer cannot be timed here; empty if it can.  Loads nothing."""
    missing = [module for module in PEERS[name][0] if importlib.util.find_spec(module) is None]
    if missing:
        return f"{' and '.join(missing)} not installed ({PEERS[name][2]})"
    threads, cores = environment.num_threads(), machine.cores()
    if name == "jax" and threads != cores:
        return f"its thread pool takes all {cores} cores of the process, not {threads}"
    if name == "numpy" and threads != cores and importlib.util.find_spec("threadpoolctl") is None:
        return f"threadpoolctl, which holds its BLAS to {threads} threads, not installed (pip install 'pymoe[bench]')"
    return ""


def build(name: str, scheme: str, shape: Shape, sets: Sequence[Weights], quantized: Sequence[Quantized]) -> Contender:
    """Return the contender `name` in `scheme`; `quantized` is read for ours only."""
    threads = environment.num_threads()
    if name == "numpy":
        from pymoe.bench.contenders.numpy_loop import NumpyLoop

        return NumpyLoop(shape, sets, threads)
    if name == "torch":
        from pymoe.bench.contenders.torch_block import TorchBlock

        return TorchBlock(shape, scheme, sets, threads)
    if name == "jax":
        from pymoe.bench.contenders.jax_ragged import JaxRagged

        return JaxRagged(shape, scheme, sets, threads)
    return Ours(shape, scheme, sets, quantized)
