// What the GEMMs of sm_90a are made of: the ring of stages that they multiply from, whose turn it is, the tiles of a block,
// and what its warpgroups do.
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

// The stages of a tile: multiply(slot, first) queues the multiplies of one, and `first` says that there are no sums yet.
template <class I, bool kTurns, class Multiply>
__device__ __forceinline__ void multiply_stages(const Stages<I>& ring, Place<I>& at, const Turns& turns, int32 steps,
                                                Multiply multiply) {
    int32 before = 0;
    if (kTurns) turns.wait();
#pragma unroll 1
    for (int32 s = 0; s < steps; ++s) {
        ptx::mbarrier_wait(ring.full(at.slot()), at.parity());
        ptx::wgmma_fence();
        multiply(at.slot(), s == 0);
        ptx::wgmma_commit();
        if (kTurns && s + 1 == steps) turns.pass_on();
        ptx::wgmma_wait<1>();  // the stage before
        if (s > 0) give_back(ring.empty(before));
        before = at.slot();
        ++at.number;
    }
    ptx::wgmma_wait<0>();
    give_back(ring.empty(before));
}

// The tiles of a block: every gridDim.x-th of groups of kTilesAtOnce tiles of the list by all column tiles, so that the rows
// of a group stay in the second-level cache.  The two blocks of a cluster have neighbours: two tiles of the list with the
// same columns, or, kAcross, the same tile and columns that follow each other, but for the last where their number is odd.
// A tile that nobody is left for has its neighbour's place without rows.
template <bool kAcross>
struct Walk {
    int32 block;

    // Read again for every tile: it lies in the first-level cache, and registers are for sums.
    static __device__ __forceinline__ int32 live_tiles(const GemmArguments& p) { return min(*p.tile_count, p.capacity); }
    __device__ __forceinline__ bool more(const GemmArguments& p) const {
        return (block & ~1) < live_tiles(p) * p.column_tiles;
    }
    static __device__ __forceinline__ BlockTile tile(const GemmArguments& p, int32 block) {
        const int32 live = live_tiles(p), at = min(block, live * p.column_tiles - 1);
        const int32 area = kTilesAtOnce * p.column_tiles, first = at / area * kTilesAtOnce, rest = at % area;
        const int32 height = min(kTilesAtOnce, live - first);
        int32 row = rest % height, column = rest / height;
        if constexpr (kAcross) {
            const int32 paired = height * (p.column_tiles & ~1);
            const bool alone = rest >= paired;
            row = alone ? rest - paired : rest / 2 % height;
            column = alone ? p.column_tiles - 1 : rest / 2 / height * 2 + rest % 2;
        }
        const int4 t = p.tiles[first + row];
        return {t.x, t.y, at == block ? t.z : 0, column};
    }
    __device__ __forceinline__ BlockTile tile(const GemmArguments& p) const { return tile(p, block); }
    __device__ __forceinline__ BlockTile neighbour(const GemmArguments& p) const { return tile(p, block ^ 1); }
};

// A warp's own part of shared memory, behind the stages, of which a tile has the last 16 bytes.  It is found anew, and what
// it holds is read anew, at each use: registers are for sums.
template <class I>
__device__ __forceinline__ float* spare_of() {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const int32 warp = ptx::afresh(threadIdx.x) / 32 - 4;
    return reinterpret_cast<float*>(shared_memory + I::kStages * I::kStageBytes + warp * I::kSpareBytes);
}

// Where a tile waits until its sums are there.
template <class I>
__device__ __forceinline__ void note_tile(const BlockTile& t) {
    int4* place = reinterpret_cast<int4*>(spare_of<I>() + I::kSpareBytes / 4 - 4);
    if (threadIdx.x % 32 == 0) *place = {t.expert, t.first_row, t.rows, t.column_tile};
}

template <class I>
__device__ __forceinline__ BlockTile noted_tile() {
    const int4 t = *reinterpret_cast<const int4*>(spare_of<I>() + I::kSpareBytes / 4 - 4);
    return {t.x, t.y, t.z, t.w};
}

constexpr int kFillRegisters = 24, kMultiplyRegisters = 240;  // of a thread

// What the three warpgroups of a block do: fill() by one thread, multiply(group) by both others.
template <class I, class Fill, class Multiply>
__device__ __forceinline__ void share_out(const Stages<I>& ring, Fill fill, Multiply multiply) {
    if (threadIdx.x == 0) {
        for (int32 s = 0; s < I::kStages; ++s) {
            ptx::mbarrier_init(ring.full(s), 1);
            ptx::mbarrier_init(ring.empty(s), I::kReaders);
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();
    const int32 warpgroup = threadIdx.x / 128;
    if (warpgroup == 0) {
        ptx::setmaxnreg_dec<kFillRegisters>();
        if (threadIdx.x < 32) {
            if (ptx::elect()) fill();
            __syncwarp();
        }
    } else {
        ptx::setmaxnreg_inc<kMultiplyRegisters>();
        multiply(warpgroup - 1);
    }
    ptx::cluster_sync();  // the other block may still write to this one
}

}  // namespace pymoe
