// The only file with inline assembly: one function an instruction, named after it.
#pragma once

#include "common/types.cuh"

namespace pymoe::ptx {

// Lets the next kernel of the stream start (programmatic dependent launch); memory is ordered by its wait alone.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before have ended and their writes are visible; at once in an ordinary launch.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace pymoe::ptx
