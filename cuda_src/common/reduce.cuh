// Sums over the slots of a token in slot order, and the largest number of a block.
#pragma once

#include "common/elements.cuh"

namespace pymoe {

// Adds to total[] the weighed rows of slots 0 .. topk-1 that `row_of(j)` gives (negative: none), from `column` on.
// Each product is rounded before it is added, as the definition does: no contraction.
template <typename Elem, int COUNT, typename RowOf>
__device__ __forceinline__ void add_slots(float (&total)[COUNT], const Elem* rows, const float* weights, RowOf row_of,
                                          int topk, int K, int column) {
    constexpr int AHEAD = 8;  // rows in flight
    for (int base = 0; base < topk; base += AHEAD) {
        Pack<Elem, COUNT> part[AHEAD];
        bool live[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            int64 row = base + i < topk ? row_of(base + i) : -1;
            live[i] = row >= 0;
            if (live[i]) part[i] = *reinterpret_cast<const Pack<Elem, COUNT>*>(rows + row * K + column);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (!live[i]) continue;
            float weight = weights == nullptr ? 1.0f : weights[base + i];
#pragma unroll
            for (int k = 0; k < COUNT; ++k) {
                float term = to_float(part[i].at[k]);
                total[k] = __fadd_rn(total[k], weights == nullptr ? term : __fmul_rn(term, weight));
            }
        }
    }
}

// Rounds and stores COUNT neighbours.
template <typename Out, int COUNT>
__device__ __forceinline__ void store_rounded(Out* out, const float (&total)[COUNT]) {
    Pack<Out, COUNT> rounded;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) rounded.at[k] = from_float<Out>(total[k]);
    *reinterpret_cast<Pack<Out, COUNT>*>(out) = rounded;
}

// The largest `x` of a block of whole warps, in all its threads; `scratch` holds 32 numbers of shared memory.
__device__ __forceinline__ uint32 block_max(uint32 x, uint32* scratch) {
    constexpr unsigned FULL = 0xffffffffu;
    int thread = threadIdx.y * blockDim.x + threadIdx.x, lane = thread % 32, warp = thread / 32;
    int warps = blockDim.x * blockDim.y / 32;
    x = __reduce_max_sync(FULL, x);
    __syncthreads();  // the scratch of an earlier call has been read
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return __reduce_max_sync(FULL, lane < warps ? scratch[lane] : 0u);
}

}  // namespace pymoe
