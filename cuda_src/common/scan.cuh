// Sums in front of each place, over a block of threads; integers, so the order of the additions does not show.
#pragma once

#include "common/types.cuh"

namespace pymoe {

// Returns the sum of `x` over the threads before this one, and the sum over all in `total`.
// Every thread of a one-dimensional block of whole warps calls it; `scratch` holds 33 numbers of shared memory.
__device__ __forceinline__ int32 block_exclusive_sum(int32 x, int32* scratch, int32& total) {
    constexpr unsigned FULL = 0xffffffffu;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int32 sum = x;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        int32 below = __shfl_up_sync(FULL, sum, by);
        if (lane >= by) sum += below;
    }
    __syncthreads();  // the scratch of an earlier call has been read
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        int32 warp_total = lane < warps ? scratch[lane] : 0, running = warp_total;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            int32 below = __shfl_up_sync(FULL, running, by);
            if (lane >= by) running += below;
        }
        scratch[lane] = running - warp_total;
        if (lane == 31) scratch[32] = running;
    }
    __syncthreads();
    total = scratch[32];
    return scratch[warp] + sum - x;
}

// Replaces values[0 .. count) in shared memory by the sums in front of them and returns the sum of all.
// Callers need a barrier before it; the results are visible after it.
__device__ __forceinline__ int32 exclusive_sums(int32* values, int count, int32* scratch) {
    int each = (count + blockDim.x - 1) / blockDim.x;
    int first = min(static_cast<int>(threadIdx.x) * each, count), last = min(first + each, count);
    int32 mine = 0;
    for (int i = first; i < last; ++i) mine += values[i];
    int32 total;
    int32 running = block_exclusive_sum(mine, scratch, total);
    for (int i = first; i < last; ++i) {
        int32 value = values[i];
        values[i] = running;
        running += value;
    }
    __syncthreads();
    return total;
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
