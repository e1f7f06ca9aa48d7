// The ring of stages that the GEMMs of sm_90a multiply from, and whose turn it is.
#pragma once

#include "common/ptx_sm90.cuh"
#include "grouped_gemm/arguments.cuh"

namespace pymoe {

// Stages and their barriers in shared memory, by the running number of a stage.
template <class I>
struct Stages {
    uint32 base;

    __device__ __forceinline__ uint32 rows(int32 slot) const { return base + slot * I::kStageBytes; }
    __device__ __forceinline__ uint32 weights(int32 slot) const { return rows(slot) + I::kRowsBytes; }
    __device__ __forceinline__ uint32 full(int32 slot) const {
        return base + I::kStages * I::kStageBytes + 8 * I::kSpareBytes + 16 * slot;
    }
    __device__ __forceinline__ uint32 empty(int32 slot) const { return full(slot) + 8; }
};

// A place in the ring, as the running number of a stage.
template <class I>
struct Place {
    uint32 number = 0;

    __device__ __forceinline__ int32 slot() const { return number % I::kStages; }
    __device__ __forceinline__ uint32 parity() const { return number / I::kStages % 2; }
};

// Gives a stage back to all that fill it, by one warp.
__device__ __forceinline__ void give_back(uint32 empty) {
    const uint32 block = threadIdx.x % 32;
    if (block < 2) ptx::mbarrier_arrive_at(empty, block);
}

// Who multiplies next, where warpgroups take turns.  A wait for a stage names only the parity of its phase: a warpgroup
// that began before the other had seen its last stage full would take a stage of the phase before for its own.
struct Turns {
    int32 group;

    __device__ __forceinline__ void wait() const { ptx::barrier_wait(1 + group, 256); }
    __device__ __forceinline__ void pass_on() const { ptx::barrier_arrive(2 - group, 256); }
};

// Of an operand in rows of 128 swizzled bytes, groups of eight rows 1024 bytes apart.
__device__ __forceinline__ uint64 operand(uint32 shared) {
    constexpr uint64 kSwizzle128 = 1ull << 62, kGroupPitch = (1024ull >> 4) << 32;
    return kSwizzle128 | kGroupPitch | 1ull << 16 | (shared & 0x3ffff) >> 4;
}

// Barriers of all stages, before anybody uses them.
template <class I>
__device__ __forceinline__ void start_ring(const Stages<I>& ring) {
    if (threadIdx.x == 0) {
        for (int32 s = 0; s < I::kStages; ++s) {
            ptx::mbarrier_init(ring.full(s), 1);
            ptx::mbarrier_init(ring.empty(s), I::kReaders);
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();
}

}  // namespace pymoe
