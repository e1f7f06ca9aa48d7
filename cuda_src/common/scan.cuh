// Sums in front of each place, over a block of threads; integers, so the order of the additions does not show.
#pragma once

#include "common/types.cuh"

namespace pymoe {

// Returns the sum of `x` over the threads before this one, and the sum over all in `total`.
// Every thread of a one-dimensional block of whole warps calls it once; `scratch` holds 32 numbers of shared memory.
template <typename T>
__device__ __forceinline__ T block_exclusive_sum(T x, T* scratch, T& total) {
    constexpr unsigned FULL = 0xffffffffu;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    T sum = x;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        T below = __shfl_up_sync(FULL, sum, by);
        if (lane >= by) sum += below;
    }
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    // Every warp adds up the warps for itself, which spares a barrier.
    T running = lane < warps ? scratch[lane] : T(0);
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        T below = __shfl_up_sync(FULL, running, by);
        if (lane >= by) running += below;
    }
    total = __shfl_sync(FULL, running, 31);
    T before = __shfl_sync(FULL, running, warp == 0 ? 0 : warp - 1);
    return (warp == 0 ? T(0) : before) + sum - x;
}

// The last i in [0, count) with starts[i] <= x; starts ascend from 0 and x is not negative.
__device__ __forceinline__ int last_at_most(const int32* starts, int count, int32 x) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (starts[middle] <= x)
            low = middle;
        else
            high = middle;
    }
    return low;
}

}  // namespace pymoe
