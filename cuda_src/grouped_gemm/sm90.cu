// Grouped GEMM of 16-bit floats on sm_90a: the sums of grouped_gemm.cu, by wgmma from a ring that copies fill by themselves.
//
// One block a multiprocessor takes one tile of kTileRows x kColumns after the other.  A thread of warpgroup 0 fills the
// ring by tensor copies.  The other two warpgroups multiply, in turns (a tile each, so that one stores while the other
// multiplies) or together (half a tile each).  Two blocks are a cluster: they take neighbouring tiles, and where these
// have the same weights each brings half of them to both.  Rows of `a` are in one piece: a gather by cp.async costs as
// much as a copy of the rows beforehand where the answer is narrow, and more elsewhere (benchmarks/notes.md).
#include "grouped_gemm/sm90_epilogue.cuh"
#include "grouped_gemm/sm90_ring.cuh"

namespace pymoe {

// pymoe/ops/grouped_gemm/_sm90.py writes the same fields.
struct MappedArguments {
    GemmArguments gemm;
    TensorMap weights;  // (E, N, K), boxes of (1, kColumns / 2, kDepth)
    TensorMap rows;     // (rows, K), boxes of (64, kDepth)
};

template <Format kFormat_, bool kTurns_, bool kGated_>
struct Sm90Instance {
    static constexpr Format kFormat = kFormat_;
    static constexpr bool kTurns = kTurns_, kGated = kGated_;
    // As many columns as a warpgroup's registers hold sums of: two blocks of 64 rows by 192, or one by 256.
    static constexpr int kColumns = kTurns ? 192 : 256, kStages = 4;
    static constexpr int kTileRows = 128, kDepth = 64;          // a row of a stage is 128 bytes, the span of the swizzle
    static constexpr int kBlocks = kTurns ? 2 : 1;              // of 64 rows that a warpgroup multiplies
    static constexpr int kRowsBytes = kTileRows * 128, kWeightsBytes = kColumns * 128;
    static constexpr int kStageBytes = kRowsBytes + kWeightsBytes;
    static constexpr int kSlice = 32;                           // columns that a warp stores at a time
    static constexpr int kSpareBytes = (kTurns ? 2048 : 4 * 16 * sums_pitch(kSlice)) + 16;  // of a warp
    static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + 8 * kSpareBytes;
    static constexpr int kReaders = kTurns ? 8 : 16;            // warps of both blocks that empty one
};

// Brings the weights of a stage, by one thread; blocks whose tiles have the same bring each other half of them.
template <class I>
struct WeightCopies {
    int32 first, expert;  // weight row of the first half
    bool shared;

    static __device__ __forceinline__ bool halves(const GemmArguments& p) {
        return p.activated && p.activation.layout == GateLayout::kHalves;
    }
    __device__ __forceinline__ WeightCopies(const GemmArguments& p, const Walk<false>& walk, const BlockTile& tile) {
        const BlockTile other = walk.neighbour(p);
        first = tile.column_tile * (halves(p) ? I::kColumns / 2 : I::kColumns), expert = tile.expert;
        shared = other.expert == tile.expert && other.column_tile == tile.column_tile;
    }
    __device__ __forceinline__ void queue(const MappedArguments& p, uint32 weights, uint32 full, int32 k) const {
        const int32 second = first + (halves(p.gemm) ? p.gemm.width : I::kColumns / 2);
        if (shared) {
            const int32 half = blockIdx.x % 2;
            ptx::cp_async_bulk_tensor_multicast(weights + half * (I::kWeightsBytes / 2), &p.weights, full, k,
                                                half ? second : first, expert, 3);
        } else {
            ptx::cp_async_bulk_tensor(weights, &p.weights, full, k, first, expert);
            ptx::cp_async_bulk_tensor(weights + I::kWeightsBytes / 2, &p.weights, full, k, second, expert);
        }
    }
};

// All tiles of the block, by one thread.
template <class I>
__device__ __forceinline__ void fill_all(const MappedArguments& p, const Stages<I>& ring) {
    Place<I> at;
    for (Walk<false> walk = {static_cast<int32>(blockIdx.x)}; walk.more(p.gemm); walk.block += gridDim.x) {
        const BlockTile tile = walk.tile(p.gemm);
        const WeightCopies<I> copies(p.gemm, walk, tile);
        const bool both = tile.rows > 64;
        for (int32 k = 0; k < p.gemm.K; k += I::kDepth, ++at.number) {
            const uint32 full = ring.full(at.slot()), rows = ring.rows(at.slot());
            ptx::mbarrier_wait(ring.empty(at.slot()), at.parity() ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, I::kWeightsBytes + (both ? I::kRowsBytes : I::kRowsBytes / 2));
            copies.queue(p, ring.weights(at.slot()), full, k);
            ptx::cp_async_bulk_tensor(rows, &p.rows, full, k, tile.first_row);
            if (both)
                ptx::cp_async_bulk_tensor(rows + I::kRowsBytes / 2, &p.rows, full, k, tile.first_row + 64);
        }
    }
}

// The sums of the first kLive blocks of 64 rows; `first`: the warpgroup's first row of the tile.
template <class I, int kLive>
__device__ __forceinline__ void multiply_tile(float (&sums)[I::kBlocks][I::kColumns / 2], const Stages<I>& ring,
                                              Place<I>& at, const Turns& turns, int32 first, int32 steps) {
    multiply_stages<I, I::kTurns>(ring, at, turns, steps, [&](int32 slot, bool first_stage) {
        const uint64 a = operand(ring.rows(slot) + first * 128), b = operand(ring.weights(slot));
#pragma unroll
        for (int k = 0; k < I::kDepth / 16; ++k) {
#pragma unroll
            for (int m = 0; m < kLive; ++m) {
                const uint64 rows = a + (m * 64 * 128 + k * 32 >> 4), weights = b + (k * 32 >> 4);
                if constexpr (I::kFormat == Format::kBF16) {
                    ptx::wgmma_m64k16_bf16(ptx::Columns<I::kColumns>(), sums[m], rows, weights, !first_stage || k > 0);
                } else {
                    ptx::wgmma_m64k16_fp16(ptx::Columns<I::kColumns>(), sums[m], rows, weights, !first_stage || k > 0);
                }
            }
        }
    });
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

template <class I, bool kHalves, int kSliceAt = 0>
__device__ __forceinline__ void spread_one(float* sums, const float (&t)[I::kColumns / 2], int32 slice) {
    if (slice == kSliceAt) return spread_slice<I, kHalves>(sums, t, kSliceAt);
    if constexpr ((kSliceAt + 1) * I::kSlice < I::kColumns) spread_one<I, kHalves, kSliceAt + 1>(sums, t, slice);
}

// By way of shared memory, slice by slice, for what registers do not do: odd widths, other activations than SiLU of a
// gate, activated answers in another format than the operands, and rows that are added to their tokens.
template <class I>
__device__ __forceinline__ void store_slices(const GemmArguments& p, BlockTile part, float* answers,
                                             const float (&t)[I::kColumns / 2]) {
    const bool halves = p.activated && p.activation.layout == GateLayout::kHalves;
#pragma unroll 1
    for (int32 slice = 0; slice < I::kColumns / I::kSlice; ++slice, ++part.column_tile) {
        if (halves) {
            spread_one<I, true>(answers, t, slice);
        } else {
            spread_one<I, false>(answers, t, slice);
        }
        __syncwarp();
        store_tile<I::kSlice, 32>(p, part, answers, nullptr, threadIdx.x % 32);
        __syncwarp();
    }
}

// Stores 16 rows of a warp, from row `row` of the tile on.
template <class I>
__device__ __forceinline__ void store_rows(const GemmArguments& p, const BlockTile& tile, int32 row, float* spare,
                                           float (&t)[I::kColumns / 2]) {
    const bool gated = p.activated && p.activation.layout != GateLayout::kPlain;
    const int32 column = tile.column_tile * (gated ? I::kColumns / 2 : I::kColumns), live = min(tile.rows - row, 16);
    const WarpRows rows = {tile.first_row + row, live, column};
    if constexpr (!I::kTurns) {
        if (!is_direct<I::kFormat>(p)) {
            const BlockTile part = {tile.expert, rows.first_row, live, tile.column_tile * (I::kColumns / I::kSlice)};
            return store_slices<I>(p, part, spare, t);
        }
    }
    add_bias<I::kColumns>(p, tile, spare, t);
    if (I::kTurns ? I::kGated : gated) {
        store_gated<I::kColumns, I::kFormat>(p, rows, spare, t);
        return;
    }
    const int32 own = threadIdx.x % 32 / 4;  // and the eighth from there
    const float weights[2] = {row_terms(p, rows.first_row + own, own < live).weight,
                              row_terms(p, rows.first_row + own + 8, own + 8 < live).weight};
    if (p.out_format == I::kFormat) {
        store_plain_sums<I::kColumns, I::kFormat>(p, rows, weights, t);
    } else {
        store_plain_sums<I::kColumns, Format::kF32>(p, rows, weights, t);
    }
}

// All tiles of one of the two warpgroups that multiply.
template <class I>
__device__ __forceinline__ void multiply_all(const GemmArguments& p, const Stages<I>& ring, int32 group) {
    const int32 steps = (p.K + I::kDepth - 1) / I::kDepth;
    const int32 first = I::kTurns ? 0 : 64 * group;
    Place<I> at;
    const Turns turns = {group};
    if (I::kTurns && group == 1) turns.pass_on();
    if (I::kTurns && group == 1) at.number += steps;
    const int32 start = blockIdx.x + (I::kTurns ? group * gridDim.x : 0);
    for (Walk<false> walk = {start}; walk.more(p); walk.block += (I::kTurns ? 2 : 1) * gridDim.x) {
        int32 live;
        {
            const BlockTile tile = walk.tile(p);
            live = tile.rows - first;
            note_tile<I>(tile);
        }
        float sums[I::kBlocks][I::kColumns / 2] = {};
        if (I::kBlocks == 2 && live > 64) {
            multiply_tile<I, I::kBlocks>(sums, ring, at, turns, first, steps);
        } else if (I::kTurns || live > 0) {
            multiply_tile<I, 1>(sums, ring, at, turns, first, steps);
        } else {
            multiply_tile<I, 0>(sums, ring, at, turns, first, steps);
        }
        __syncwarp();
        const BlockTile tile = noted_tile<I>();
        __syncwarp();
#pragma unroll 1
        for (int32 row = first + ptx::afresh(threadIdx.x) % 128 / 32 * 16; row < first + 64 * I::kBlocks; row += 64) {
            if (row < tile.rows) store_rows<I>(p, tile, row, spare_of<I>(), sums[0]);
            // The next block's sums to the same registers, so that its code is the same.
#pragma unroll
            for (int i = 0; i < I::kColumns / 2; ++i) sums[0][i] = sums[I::kBlocks - 1][i];
        }
        if (I::kTurns) at.number += steps;  // the other's tile
    }
}

template <Format kFormat, bool kTurns, bool kGated>
__global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
    grouped_gemm_sm90_kernel(const __grid_constant__ MappedArguments p) {
    using I = Sm90Instance<kFormat, kTurns, kGated>;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const Stages<I> ring = {ptx::shared_address(shared_memory)};
    if (ptx::dynamic_shared_bytes() < I::kSharedBytes || ring.base % 1024 != 0) __trap();
    if (kTurns && (!is_direct<kFormat>(p.gemm) || p.gemm.activated != kGated)) __trap();
    share_out(ring, [&] { fill_all<I>(p, ring); }, [&](int32 group) { multiply_all<I>(p.gemm, ring, group); });
}

}  // namespace pymoe
