// Grouped GEMM of 16-bit floats on sm_90a: the sums of grouped_gemm.cu, by wgmma from a ring that copies fill by themselves.
//
// One block a multiprocessor takes one tile of kTileRows x kColumns after the other.  A thread of warpgroup 0 fills the
// ring by tensor copies.  The other two warpgroups multiply, in turns (a tile each, so that one stores while the other
// multiplies) or together (half a tile each).  Rows of `a` are in one piece: a gather by cp.async, in three forms, left the
// ring half empty, and cost more than a copy of the rows beforehand.
#include "common/ptx_sm90.cuh"
#include "grouped_gemm/epilogue.cuh"

namespace pymoe {

// pymoe/ops/grouped_gemm/_sm90.py writes the same fields.
struct MappedArguments {
    GemmArguments gemm;
    TensorMap weights;  // (E, N, K), boxes of (1, kColumns / 2, kDepth)
    TensorMap rows;     // (rows, K), boxes of (64, kDepth)
};

template <Format kFormat_, bool kTurns_>
struct Sm90Instance {
    static constexpr Format kFormat = kFormat_;
    static constexpr bool kTurns = kTurns_;
    // As many columns as a warpgroup's registers hold sums of: two blocks of 64 rows by 192, or one by 256.
    static constexpr int kColumns = kTurns ? 192 : 256, kStages = 4;
    static constexpr int kTileRows = 128, kDepth = 64;          // a row of a stage is 128 bytes, the span of the swizzle
    static constexpr int kBlocks = kTurns ? 2 : 1;              // of 64 rows that a warpgroup multiplies
    static constexpr int kRowsBytes = kTileRows * 128, kWeightsBytes = kColumns * 128;
    static constexpr int kStageBytes = kRowsBytes + kWeightsBytes;
    static constexpr int kSlice = kTurns ? 64 : 32;             // columns that a warp stores at a time
    static constexpr int kAnswersBytes = 8 * 4 * 16 * sums_pitch(kSlice);  // of eight warps
    static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + kAnswersBytes;
    static constexpr int kReaders = kTurns ? 4 : 8;             // warps that empty one
    static constexpr int kFillRegisters = 40, kMultiplyRegisters = 232;
};

// Stages and their barriers in shared memory, by the running number of a stage.
template <class I>
struct Stages {
    uint32 base;

    __device__ __forceinline__ uint32 rows(int32 slot) const { return base + slot * I::kStageBytes; }
    __device__ __forceinline__ uint32 weights(int32 slot) const { return rows(slot) + I::kRowsBytes; }
    __device__ __forceinline__ uint32 full(int32 slot) const {
        return base + I::kStages * I::kStageBytes + I::kAnswersBytes + 16 * slot;
    }
    __device__ __forceinline__ uint32 empty(int32 slot) const { return full(slot) + 8; }
};

// A place in the ring that moves on.
template <class I>
struct Place {
    int32 slot = 0;
    uint32 parity = 0;

    __device__ __forceinline__ void next() {
        if (++slot == I::kStages) slot = 0, parity ^= 1;
    }
    __device__ __forceinline__ void skip(int32 steps) {
        const int32 at = slot + steps;
        slot = at % I::kStages, parity ^= at / I::kStages & 1;
    }
};

// The tiles of a block: every gridDim.x-th, in the order of find_tile.
struct Walk {
    int32 block;

    // Read again for every tile: it lies in the first-level cache, and registers are for sums.
    static __device__ __forceinline__ int32 live_tiles(const GemmArguments& p) { return min(*p.tile_count, p.capacity); }
    __device__ __forceinline__ bool more(const GemmArguments& p) const { return block < live_tiles(p) * p.column_tiles; }
    __device__ __forceinline__ BlockTile tile(const GemmArguments& p) const {
        const int32 live = live_tiles(p);
        const int32 area = kTilesAtOnce * p.column_tiles, first = block / area * kTilesAtOnce, rest = block % area;
        const int32 height = min(kTilesAtOnce, live - first);
        const int4 t = p.tiles[first + rest % height];
        return {t.x, t.y, t.z, rest / height};
    }
};

// All tiles of the block, by one thread.
template <class I>
__device__ __forceinline__ void fill_all(const MappedArguments& p, const Stages<I>& ring) {
    const bool halves = p.gemm.activated && p.gemm.activation.layout == GateLayout::kHalves;
    Place<I> at;
    for (Walk walk = {static_cast<int32>(blockIdx.x)}; walk.more(p.gemm); walk.block += gridDim.x) {
        const BlockTile tile = walk.tile(p.gemm);
        const int32 n = tile.column_tile * (halves ? I::kColumns / 2 : I::kColumns);
        const int32 second = n + (halves ? p.gemm.width : I::kColumns / 2);
        const bool both = tile.rows > 64;
        for (int32 k = 0; k < p.gemm.K; k += I::kDepth, at.next()) {
            const uint32 full = ring.full(at.slot), rows = ring.rows(at.slot), weights = ring.weights(at.slot);
            ptx::mbarrier_wait(ring.empty(at.slot), at.parity ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, I::kWeightsBytes + (both ? I::kRowsBytes : I::kRowsBytes / 2));
            ptx::cp_async_bulk_tensor(weights, &p.weights, full, k, n, tile.expert);
            ptx::cp_async_bulk_tensor(weights + I::kWeightsBytes / 2, &p.weights, full, k, second, tile.expert);
            ptx::cp_async_bulk_tensor(rows, &p.rows, full, k, tile.first_row);
            if (both)
                ptx::cp_async_bulk_tensor(rows + I::kRowsBytes / 2, &p.rows, full, k, tile.first_row + 64);
        }
    }
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

// The sums of the first kLive blocks of 64 rows; `first`: the warpgroup's first row of the tile.
template <class I, int kLive>
__device__ __forceinline__ void multiply_tile(float (&sums)[I::kBlocks][I::kColumns / 2], const Stages<I>& ring,
                                              Place<I>& at, const Turns& turns, int32 first, int32 steps) {
    int32 before = 0;
    if (I::kTurns) turns.wait();
#pragma unroll 1
    for (int32 s = 0; s < steps; ++s) {
        ptx::mbarrier_wait(ring.full(at.slot), at.parity);
        ptx::wgmma_fence();
        const uint64 a = operand(ring.rows(at.slot) + first * 128), b = operand(ring.weights(at.slot));
#pragma unroll
        for (int k = 0; k < I::kDepth / 16; ++k) {
#pragma unroll
            for (int m = 0; m < kLive; ++m) {
                const uint64 rows = a + (m * 64 * 128 + k * 32 >> 4), weights = b + (k * 32 >> 4);
                if constexpr (I::kFormat == Format::kBF16) {
                    ptx::wgmma_m64k16_bf16(sums[m], rows, weights, s > 0 || k > 0);
                } else {
                    ptx::wgmma_m64k16_fp16(sums[m], rows, weights, s > 0 || k > 0);
                }
            }
        }
        ptx::wgmma_commit();
        if (I::kTurns && s + 1 == steps) turns.pass_on();
        ptx::wgmma_wait<1>();  // the stage before
        if (s > 0 && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring.empty(before));
        before = at.slot;
        at.next();
    }
    ptx::wgmma_wait<0>();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(ring.empty(before));
}

// Sums of 16 rows of a warp to the epilogue's rows in shared memory: slice kSlice of them, of halves the gate's part and
// then the up's.
template <class I, bool kHalves>
__device__ __forceinline__ void spread_slice(float* sums, const float (&t)[I::kColumns / 2], int slice) {
    constexpr int kGroups = I::kSlice / 8, kAll = I::kColumns / 8;  // of eight columns
    const int32 g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
        const int from = kHalves ? slice * (kGroups / 2) + j % (kGroups / 2) + j / (kGroups / 2) * (kAll / 2)
                                 : slice * kGroups + j;
        float* at = sums + g * sums_pitch(I::kSlice) + 8 * j + 2 * c;
        *reinterpret_cast<float2*>(at) = make_float2(t[4 * from], t[4 * from + 1]);
        *reinterpret_cast<float2*>(at + 8 * sums_pitch(I::kSlice)) = make_float2(t[4 * from + 2], t[4 * from + 3]);
    }
}

// Stores 16 rows of a warp, from row `row` of the tile on, slice by slice: registers are for sums.
template <class I>
__device__ __forceinline__ void store_rows(const GemmArguments& p, const BlockTile& tile, int32 row, float* sums,
                                           const float (&t)[I::kColumns / 2]) {
    constexpr int kSlices = I::kColumns / I::kSlice;
    const bool halves = p.activated && p.activation.layout == GateLayout::kHalves;
    BlockTile part = {tile.expert, tile.first_row + row, min(tile.rows - row, 16), tile.column_tile * kSlices};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice, ++part.column_tile) {
        if (halves) {
            spread_slice<I, true>(sums, t, slice);
        } else {
            spread_slice<I, false>(sums, t, slice);
        }
        __syncwarp();
        store_tile<I::kSlice, 32>(p, part, sums, nullptr, threadIdx.x % 32);
        __syncwarp();
    }
}

// All tiles of one of the two warpgroups that multiply.
template <class I>
__device__ __forceinline__ void multiply_all(const GemmArguments& p, const Stages<I>& ring, int32 group,
                                             float* answers) {
    const int32 steps = (p.K + I::kDepth - 1) / I::kDepth, warp = threadIdx.x % 128 / 32;
    const int32 first = I::kTurns ? 0 : 64 * group;
    Place<I> at;
    const Turns turns = {group};
    if (I::kTurns && group == 1) turns.pass_on();
    if (I::kTurns && group == 1) at.skip(steps);
    const int32 start = blockIdx.x + (I::kTurns ? group * gridDim.x : 0);
    for (Walk walk = {start}; walk.more(p); walk.block += (I::kTurns ? 2 : 1) * gridDim.x) {
        const BlockTile tile = walk.tile(p);
        float sums[I::kBlocks][I::kColumns / 2] = {};
        const int32 live = tile.rows - first;
        if (I::kBlocks == 2 && live > 64) {
            multiply_tile<I, I::kBlocks>(sums, ring, at, turns, first, steps);
        } else if (I::kTurns || live > 0) {
            multiply_tile<I, 1>(sums, ring, at, turns, first, steps);
        } else {
            multiply_tile<I, 0>(sums, ring, at, turns, first, steps);
        }
#pragma unroll
        for (int m = 0; m < I::kBlocks; ++m) {
            const int32 row = first + 64 * m + 16 * warp;
            if (row < tile.rows) store_rows<I>(p, tile, row, answers, sums[m]);
        }
        if (I::kTurns) at.skip(steps);  // the other's tile
    }
}

template <Format kFormat, bool kTurns>
__global__ void __launch_bounds__(384, 1) grouped_gemm_sm90_kernel(const __grid_constant__ MappedArguments p) {
    using I = Sm90Instance<kFormat, kTurns>;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const Stages<I> ring = {ptx::shared_address(shared_memory)};
    if (ptx::dynamic_shared_bytes() < I::kSharedBytes || ring.base % 1024 != 0) __trap();
    if (threadIdx.x == 0) {
        for (int32 s = 0; s < I::kStages; ++s) {
            ptx::mbarrier_init(ring.full(s), 1);
            ptx::mbarrier_init(ring.empty(s), I::kReaders);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    const int32 warpgroup = threadIdx.x / 128;
    if (warpgroup == 0) {
        ptx::setmaxnreg_dec<I::kFillRegisters>();
        if (threadIdx.x == 0) fill_all<I>(p, ring);
    } else {
        ptx::setmaxnreg_inc<I::kMultiplyRegisters>();
        float* answers = reinterpret_cast<float*>(shared_memory + I::kStages * I::kStageBytes) +
                         (threadIdx.x / 32 - 4) * 16 * sums_pitch(I::kSlice);
        multiply_all<I>(p.gemm, ring, warpgroup - 1, answers);
    }
}

}  // namespace pymoe
