"""Prepare/finalize: what happens to the tokens before the experts and to their output after them."""

from pymoe.prepare_finalize.batched import BatchedPrepareAndFinalize
from pymoe.prepare_finalize.batched_ep import BatchedEpPrepareAndFinalize
from pymoe.prepare_finalize.cuda_batched import CudaBatchedPrepareAndFinalize
from pymoe.prepare_finalize.monolithic import SingleProcessMonolithicPrepareAndFinalize
from pymoe.prepare_finalize.monolithic_ep import AllGatherMonolithicPrepareAndFinalize
from pymoe.prepare_finalize.single import SingleProcessAsyncPrepareAndFinalize, SingleProcessPrepareAndFinalize
from pymoe.prepare_finalize.standard_ep import AllGatherPrepareAndFinalize, StandardEpPrepareAndFinalize

__all__ = [
    "AllGatherMonolithicPrepareAndFinalize",
    "AllGatherPrepareAndFinalize",
    "BatchedEpPrepareAndFinalize",
    "BatchedPrepareAndFinalize",
    "CudaBatchedPrepareAndFinalize",
    "SingleProcessAsyncPrepareAndFinalize",
    "SingleProcessMonolithicPrepareAndFinalize",
    "SingleProcessPrepareAndFinalize",
    "StandardEpPrepareAndFinalize",
]
