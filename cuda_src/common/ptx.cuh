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

#if __CUDA_ARCH__ >= 890
// Two float32 to e4m3, nearest with ties to even, beyond 448 to 448, NaN to 0x7f; `low` in the low byte.
__device__ __forceinline__ uint32 cvt_e4m3x2(float high, float low) {
    uint16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

}  // namespace pymoe::ptx
