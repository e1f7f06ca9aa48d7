// Sums in front of each place, and the search among them; integers, so the order of the additions does not show.
#pragma once

#include "common/types.cuh"

namespace pymoe {

// Returns the sum of `x` over the lanes before this one, and the sum over all in `total`; the full warp calls it.
template <typename T>
__device__ __forceinline__ T warp_exclusive_sum(T x, T& total) {
    constexpr unsigned FULL = 0xffffffffu;
    int lane = threadIdx.x % 32;
    T sum = x;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        T below = __shfl_up_sync(FULL, sum, by);
        if (lane >= by) sum += below;
    }
    total = __shfl_sync(FULL, sum, 31);
    return sum - x;
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
