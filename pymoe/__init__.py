"""Fused Mixture-of-Experts layers on NumPy and CuPy arrays, without PyTorch."""

from pymoe import ep_model, ops
from pymoe._version import __version__
from pymoe.activations import ActivationConfig, MoEActivation, register_activation
from pymoe.comm import abort_on_error
from pymoe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingConfig,
    RoutingMethodType,
    get_routing_method_type,
)
from pymoe.contracts import (
    ExpertTokensMetadata,
    FusedMoEActivationFormat,
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEExpertsMonolithic,
    FusedMoEPrepareAndFinalize,
    FusedMoEPrepareAndFinalizeModular,
    FusedMoEPrepareAndFinalizeMonolithic,
    PrepareMonolithicResult,
    PrepareResult,
    TopKWeightAndReduce,
)
from pymoe.dense import Gate, SharedExperts
from pymoe.environment import checked
from pymoe.errors import (
    ArgumentError,
    BackendUnavailableError,
    CheckpointError,
    ClosedError,
    CommError,
    DTypeError,
    KernelCompileError,
    PymoeError,
    ShapeError,
    UnsupportedError,
)
from pymoe.experts import (
    CpuExperts,
    CpuMonolithicExperts,
    CudaBatchedExperts,
    CudaGroupedExperts,
    CudaMonolithicExperts,
    NaiveBatchedExperts,
    NumbaCudaExperts,
    NumpyReferenceExperts,
)
from pymoe.functional import dequantize, fused_experts, fused_moe, quantize, quantize_experts, select_experts
from pymoe.installation import show_config
from pymoe.kernel import FusedMoEKernel, FusedMoEKernelModularImpl, FusedMoEKernelMonolithicImpl
from pymoe.layer import MoELayer, Plan
from pymoe.prepare_finalize import (
    AllGatherMonolithicPrepareAndFinalize,
    AllGatherPrepareAndFinalize,
    BatchedEpPrepareAndFinalize,
    BatchedPrepareAndFinalize,
    CudaBatchedPrepareAndFinalize,
    SingleProcessAsyncPrepareAndFinalize,
    SingleProcessMonolithicPrepareAndFinalize,
    SingleProcessPrepareAndFinalize,
    StandardEpPrepareAndFinalize,
)
from pymoe.quantization import *  # noqa: F403  every QuantKey under its own name
from pymoe.quantization import QUANT_KEYS, FusedMoEQuantConfig, FusedMoEQuantDesc, GroupShape, QuantKey, ScaleDesc
from pymoe.select import select
from pymoe.weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNaiveBatched,
    TopKWeightAndReduceNoOP,
)

__all__ = [
    *QUANT_KEYS,
    "ActivationConfig",
    "AllGatherMonolithicPrepareAndFinalize",
    "AllGatherPrepareAndFinalize",
    "ArgumentError",
    "BackendUnavailableError",
    "BatchedEpPrepareAndFinalize",
    "BatchedPrepareAndFinalize",
    "CudaBatchedPrepareAndFinalize",
    "CheckpointError",
    "ClosedError",
    "CommError",
    "CpuExperts",
    "CpuMonolithicExperts",
    "CudaBatchedExperts",
    "CudaGroupedExperts",
    "CudaMonolithicExperts",
    "DTypeError",
    "ExpertTokensMetadata",
    "FusedMoEActivationFormat",
    "FusedMoEConfig",
    "FusedMoEExperts",
    "FusedMoEExpertsModular",
    "FusedMoEExpertsMonolithic",
    "FusedMoEKernel",
    "FusedMoEKernelModularImpl",
    "FusedMoEKernelMonolithicImpl",
    "FusedMoEParallelConfig",
    "FusedMoEPrepareAndFinalize",
    "FusedMoEPrepareAndFinalizeModular",
    "FusedMoEPrepareAndFinalizeMonolithic",
    "FusedMoEQuantConfig",
    "FusedMoEQuantDesc",
    "Gate",
    "GroupShape",
    "KernelCompileError",
    "MoEActivation",
    "MoELayer",
    "NaiveBatchedExperts",
    "NumbaCudaExperts",
    "NumpyReferenceExperts",
    "Plan",
    "PrepareMonolithicResult",
    "PrepareResult",
    "PymoeError",
    "QUANT_KEYS",
    "QuantKey",
    "RoutingConfig",
    "RoutingMethodType",
    "ScaleDesc",
    "ShapeError",
    "SharedExperts",
    "SingleProcessAsyncPrepareAndFinalize",
    "SingleProcessMonolithicPrepareAndFinalize",
    "SingleProcessPrepareAndFinalize",
    "StandardEpPrepareAndFinalize",
    "TopKWeightAndReduce",
    "TopKWeightAndReduceContiguous",
    "TopKWeightAndReduceDelegate",
    "TopKWeightAndReduceNaiveBatched",
    "TopKWeightAndReduceNoOP",
    "UnsupportedError",
    "__version__",
    "abort_on_error",
    "checked",
    "dequantize",
    "ep_model",
    "fused_experts",
    "fused_moe",
    "get_routing_method_type",
    "ops",
    "quantize",
    "quantize_experts",
    "register_activation",
    "select",
    "select_experts",
    "show_config",
]
