"""The modular kernel: prepare ► experts ► finalize, for any pair of the same activation format."""

from pymoe.kernel.kernel import FusedMoEKernel
from pymoe.kernel.modular import DEFAULT_CHUNK_SIZE, FusedMoEKernelModularImpl
from pymoe.kernel.monolithic import FusedMoEKernelMonolithicImpl

__all__ = ["DEFAULT_CHUNK_SIZE", "FusedMoEKernel", "FusedMoEKernelModularImpl", "FusedMoEKernelMonolithicImpl"]
