"""Experts: permute, GEMM1, activation, GEMM2, unpermute, as one of the contract's classes each."""

from pymoe.experts.cpu import CpuExperts
from pymoe.experts.cpu_monolithic import CpuMonolithicExperts
from pymoe.experts.cuda_batched import CudaBatchedExperts
from pymoe.experts.cuda_grouped import CudaGroupedExperts
from pymoe.experts.cuda_monolithic import CudaMonolithicExperts
from pymoe.experts.naive_batched import NaiveBatchedExperts
from pymoe.experts.numba_cuda import NumbaCudaExperts
from pymoe.experts.numpy_reference import NumpyReferenceExperts

__all__ = [
    "CpuExperts",
    "CpuMonolithicExperts",
    "CudaBatchedExperts",
    "CudaGroupedExperts",
    "CudaMonolithicExperts",
    "NaiveBatchedExperts",
    "NumbaCudaExperts",
    "NumpyReferenceExperts",
]
