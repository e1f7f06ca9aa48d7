"""The contract of the modular kernel: what prepare/finalize, experts and weight-and-reduce owe each other.

Names, signatures and order of arguments are those of vLLM's ``modular_kernel`` (seed page); semantics in
``docs/architecture``.
"""

from pymoe.contracts.experts import FusedMoEExperts, FusedMoEExpertsModular, FusedMoEExpertsMonolithic
from pymoe.contracts.prepare_finalize import (
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
)
from pymoe.contracts.results import (
    DeviceRowMap,
    DeviceSlabMap,
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    PrepareMonolithicResult,
    PrepareResult,
    RowMap,
)
from pymoe.contracts.weight_and_reduce import TopKWeightAndReduce

__all__ = [
    "DeviceRowMap",
    "DeviceSlabMap",
    "ExpertTokensMetadata",
    "FusedMoEActivationFormat",
    "FusedMoEExperts",
    "FusedMoEExpertsModular",
    "FusedMoEExpertsMonolithic",
    "FusedMoEPrepareAndFinalize",
    "FusedMoEPrepareAndFinalizeModular",
    "FusedMoEPrepareAndFinalizeMonolithic",
    "PrepareMonolithicResult",
    "PrepareResult",
    "RowMap",
    "TopKWeightAndReduce",
]
