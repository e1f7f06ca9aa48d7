// Grouped GEMM of 16-bit floats on sm_90a where experts have few rows: the sums of sm90.cu, with operands swapped.
//
// One block a multiprocessor takes one tile after the other: 128 weight rows by the rows of a tile of the work list.
// Weights are the first operand of the multiplies, whose 64 rows they always fill, and rows of `a` the second, whose
// number need only be a multiple of eight: an expert's rows fit one tile where sm90.cu would fill up half of a second.
// A thread of warpgroup 0 fills the ring by tensor copies.  The other two warpgroups take turns, a tile each, so that one
// stores while the other multiplies.  Two blocks are a cluster: they take neighbouring weights and, nearly everywhere, the
// same rows, of which each brings half to both.
#include "grouped_gemm/sm90_swapped_epilogue.cuh"

namespace pymoe {

// pymoe/ops/grouped_gemm/_sm90.py writes the same fields.
struct MappedArguments {
    GemmArguments gemm;
    TensorMap weights;  // (E, parts, columns, K), boxes of (1, parts, 128 / parts, kDepth); parts: gate and up, or one
    TensorMap rows;     // (rows, K), boxes of (kBoxRows, kDepth)
};

// kGated: SiLU of gate and up, else sums; kTileRows: 96, or as many as a warpgroup's registers hold sums of twice 64
// weight rows each.
template <Format kFormat_, bool kGated_, int kTileRows_>
struct Sm90SwappedInstance {
    static constexpr Format kFormat = kFormat_;
    static constexpr bool kGated = kGated_;
    static constexpr int kTileRows = kTileRows_, kWeightRows = 128, kBoxRows = 32;
    static constexpr int kStages = kTileRows == 192 ? 5 : 7;  // as many as there is memory for
    static constexpr int kDepth = 64;                         // a row of a stage is 128 bytes, the span of the swizzle
    static constexpr int kRowsBytes = kTileRows * 128, kWeightsBytes = kWeightRows * 128;
    static constexpr int kStageBytes = kRowsBytes + kWeightsBytes;
    static constexpr int kColumns = kGated ? kWeightRows / 2 : kWeightRows;  // of the answer
    // Of a warp: what activate_eight takes or the router weights of all rows, 32 biases, and the tile.
    static constexpr int kSpareFloats = (kGated ? 512 : 192) + 32, kSpareBytes = 4 * (kSpareFloats + 4);
    static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + 8 * kSpareBytes;
    static constexpr int kReaders = 8;  // warps of both blocks that empty a stage
};

// All tiles of the block, by one thread.
template <class I>
__device__ __forceinline__ void fill_all(const MappedArguments& p, const Stages<I>& ring) {
    const int32 half = blockIdx.x % 2;
    Place<I> at;
    for (Walk<true> walk = {static_cast<int32>(blockIdx.x)}; walk.more(p.gemm); walk.block += gridDim.x) {
        const BlockTile tile = walk.tile(p.gemm), other = walk.neighbour(p.gemm);
        const bool shared = tile.first_row == other.first_row && tile.rows == other.rows;
        const int32 boxes = (tile.rows + I::kBoxRows - 1) / I::kBoxRows;
        const int32 bytes = boxes > 0 ? I::kWeightsBytes + boxes * I::kBoxRows * 128 : 0;
        for (int32 k = 0; k < p.gemm.K; k += I::kDepth, ++at.number) {
            const uint32 full = ring.full(at.slot()), rows = ring.rows(at.slot());
            ptx::mbarrier_wait(ring.empty(at.slot()), at.parity() ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, bytes);
            if (boxes == 0) continue;
            ptx::cp_async_bulk_tensor(ring.weights(at.slot()), &p.weights, full, k, tile.column_tile * I::kColumns, 0,
                                      tile.expert);
            for (int32 box = shared ? half : 0; box < boxes; box += shared ? 2 : 1) {
                const uint32 to = rows + box * (I::kBoxRows * 128);
                const int32 from = tile.first_row + box * I::kBoxRows;
                if (shared) {
                    ptx::cp_async_bulk_tensor_multicast(to, &p.rows, full, k, from, 3);
                } else {
                    ptx::cp_async_bulk_tensor(to, &p.rows, full, k, from);
                }
            }
        }
    }
}

// The sums of a tile of at most kRows rows, by both blocks of 64 weight rows.
template <class I, int kRows>
__device__ __forceinline__ void multiply_tile(float (&sums)[2][I::kTileRows / 2], const Stages<I>& ring, Place<I>& at,
                                              const Turns& turns, int32 steps) {
    // Rows are stored by sixteen, and nothing beyond them is read.
#pragma unroll
    for (int i = 0; i < (kRows + 15) / 16 * 8; ++i) sums[0][i] = sums[1][i] = 0.0f;
    multiply_stages<I, true>(ring, at, turns, steps, [&](int32 slot, bool first_stage) {
        const uint64 weights = operand(ring.weights(slot)), rows = operand(ring.rows(slot));
#pragma unroll
        for (int k = 0; k < I::kDepth / 16; ++k) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const uint64 a = weights + (m * 64 * 128 + k * 32 >> 4), b = rows + (k * 32 >> 4);
                if constexpr (I::kFormat == Format::kBF16) {
                    ptx::wgmma_m64k16_bf16(ptx::Columns<kRows>(), sums[m], a, b, !first_stage || k > 0);
                } else {
                    ptx::wgmma_m64k16_fp16(ptx::Columns<kRows>(), sums[m], a, b, !first_stage || k > 0);
                }
            }
        }
    });
}

// The same by the least multiple of eight that holds the tile's rows.
template <class I, int kRows = 8>
__device__ __forceinline__ void multiply_rows(int32 rows, float (&sums)[2][I::kTileRows / 2], const Stages<I>& ring,
                                              Place<I>& at, const Turns& turns, int32 steps) {
    if constexpr (kRows < I::kTileRows) {
        if (rows > kRows) return multiply_rows<I, kRows + 8>(rows, sums, ring, at, turns, steps);
    }
    multiply_tile<I, kRows>(sums, ring, at, turns, steps);
}

// All tiles of one of the two warpgroups that multiply.
template <class I>
__device__ __forceinline__ void multiply_all(const GemmArguments& p, const Stages<I>& ring, int32 group) {
    const int32 steps = (p.K + I::kDepth - 1) / I::kDepth;
    Place<I> at;
    const Turns turns = {group};
    if (group == 1) turns.pass_on(), at.number += steps;
    const int32 start = blockIdx.x + group * gridDim.x;
    for (Walk<true> walk = {start}; walk.more(p); walk.block += 2 * gridDim.x) {
        int32 rows;
        {
            const BlockTile tile = walk.tile(p);
            rows = tile.rows;
            note_tile<I>(tile);
            note_terms<I>(p, tile);
        }
        float sums[2][I::kTileRows / 2];
        multiply_rows<I>(rows, sums, ring, at, turns, steps);
        __syncwarp();
        store_swapped<I>(p, sums);
        __syncwarp();
        at.number += steps;  // the other's tile
    }
}

template <Format kFormat, bool kGated, int kTileRows>
__global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
    grouped_gemm_sm90_swapped_kernel(const __grid_constant__ MappedArguments p) {
    using I = Sm90SwappedInstance<kFormat, kGated, kTileRows>;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    const Stages<I> ring = {ptx::shared_address(shared_memory)};
    if (ptx::dynamic_shared_bytes() < I::kSharedBytes || ring.base % 1024 != 0) __trap();
    if (!is_direct<kFormat>(p.gemm) || p.gemm.activated != kGated) __trap();
    share_out(ring, [&] { fill_all<I>(p, ring); }, [&](int32 group) { multiply_all<I>(p.gemm, ring, group); });
}

}  // namespace pymoe
