// What every grouped GEMM is given, and which part of it a block computes.
#pragma once

#include "activation/activation.cuh"
#include "common/convert.cuh"
#include "common/types.cuh"

namespace pymoe {

// Scales of activations: none, one for all rows, one a row, or one a group of columns of a row.
enum class RowScale : int32 { kNone, kOne, kRow, kGroup };

// One parameter by value; pymoe/ops/grouped_gemm/_cuda_arguments.py writes the same fields in the same order.
struct GemmArguments {
    const void* a;             // (rows, K) in a_format
    const void* b;             // (E, N, K) in b_format
    void* out;                 // (P, width) in out_format
    const int4* tiles;         // {expert, first row, rows, 0}, `capacity` of them, *tile_count live
    const int32* tile_count;
    const int32* gather;       // (P,): row r reads gather[r] / gather_div of a; null: row r itself
    const void* a_scale;
    const void* group_scale;   // (E, ceil(N / scale_rows), groups)
    const float* row_scale;    // (E, N) or null
    const float* bias;         // (E, N) or null
    const uint8* zero_points;  // (E, N, groups), or (E, N / 2, groups) two a byte; null: the middle of the codes
    const int32* row_to_slot;  // (P,), or null where rows of out are neither weighed nor added
    const float* topk_weights;  // of slots: row r is multiplied by that of slot row_to_slot[r]; or null
    int32 K, N, width;         // width: columns of out, N or half of it
    int32 capacity, column_tiles, gather_div;
    int32 slots_of_token;      // 0; else row r is added to row row_to_slot[r] / slots_of_token of out, which is float32
    int32 group, groups, scale_rows, scale_lines;  // scale_lines: ceil(N / scale_rows)
    float inverse_group;       // 1 / group
    int32 scales_before_sum;   // whether group scales multiply weights and activations, not partial sums
    int32 vector_store;        // whether rows of out start at multiples of four elements and of 16 bytes
    int32 activated;
    int32 parts;               // blocks along the rows of one of `tiles`
    RowScale a_scale_kind;
    ScaleFormat a_scale_format, group_scale_format;
    Format a_format, b_format, out_format;
    ActivationParameters activation;
};

// The rows and weight columns of one block.
struct BlockTile {
    int32 expert, first_row, rows, column_tile;
};

// Work in groups of eight row tiles by all column tiles: the activations of eight tiles stay in the second-level cache,
// and neighbouring blocks of one expert read the same weights.
constexpr int32 kTilesAtOnce = 8;

// False where there is no work for this block, whose tile has kRows rows.
template <int kRows>
__device__ __forceinline__ bool find_tile(const GemmArguments& p, BlockTile& found) {
    const int32 block = blockIdx.x, area = kTilesAtOnce * p.column_tiles;
    const int32 first = block / area * kTilesAtOnce, rest = block % area;
    const int32 height = min(kTilesAtOnce, p.capacity * p.parts - first);
    const int32 part = first + rest % height, index = part / p.parts, skipped = part % p.parts * kRows;
    const int4 tile = p.tiles[index];  // what lies beyond the live tiles is read, not used
    if (index >= *p.tile_count || tile.z <= skipped) return false;
    found = {tile.x, tile.y + skipped, min(tile.z - skipped, kRows), rest / height};
    return true;
}

// Weight row that column j of the tile stands for, -1 outside.  Halves: the gate rows first, then their up rows;
// alternating rows are each other's neighbours already.
template <int kColumns>
__device__ __forceinline__ int32 weight_row(const GemmArguments& p, int32 column_tile, int32 j) {
    if (p.activated && p.activation.layout == GateLayout::kHalves) {
        constexpr int kHalf = kColumns / 2;
        const int32 column = column_tile * kHalf + j % kHalf;
        return column < p.width ? column + (j < kHalf ? 0 : p.width) : -1;
    }
    const int32 n = column_tile * kColumns + j;
    return n < p.N ? n : -1;
}

// Row of `a` that row `row` of the answer reads.
__device__ __forceinline__ int32 source_row(const GemmArguments& p, int32 row) {
    return p.gather ? static_cast<int32>(static_cast<uint32>(p.gather[row]) / static_cast<uint32>(p.gather_div)) : row;
}

// Zero point of weight row `n` in group `g`.
__device__ __forceinline__ uint32 zero_point(const GemmArguments& p, Format format, int32 expert, int32 n, int32 g) {
    if (!p.zero_points) return format == Format::kU4 ? 8 : 128;
    if (format == Format::kU8) return p.zero_points[(static_cast<int64>(expert) * p.N + n) * p.groups + g];
    const int64 line = static_cast<int64>(expert) * (p.N / 2) + n / 2;
    return (p.zero_points[line * p.groups + g] >> (4 * (n & 1))) & 15;
}

}  // namespace pymoe
