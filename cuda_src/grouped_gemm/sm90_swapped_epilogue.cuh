// From a warp's sums in registers to rows of the answer where operands are swapped: bias, activation or router weight, one
// rounding, stores.
//
// A lane's sum m, 4 j + 2 h + i is that of weight row lane / 4 + 8 h of the warp's 16 of block m, and of row 8 j + lane % 4
// * 2 + i of the tile.  Gate and up of an output are in the same place of both blocks.  Eight weight rows by eight rows
// are transposed across the warp, so that a lane has neighbouring columns of the answer.
#pragma once

#include "grouped_gemm/sm90_epilogue.cuh"
#include "grouped_gemm/sm90_ring.cuh"

namespace pymoe {

// The first of the 16 columns of block 0 that are this warp's.
template <class I>
__device__ __forceinline__ int32 first_column(const BlockTile& tile) {
    return tile.column_tile * I::kColumns + ptx::afresh(threadIdx.x) % 128 / 32 * 16;
}

// The bias of a lane's weight row of the warp's 32, block by block; without one zero, so that no sum is -0.
template <class I>
__device__ __forceinline__ float lane_bias(const GemmArguments& p, const BlockTile& tile) {
    const int32 lane = threadIdx.x % 32, m = lane / 16;
    const int32 column = first_column<I>(tile) + (I::kGated ? 0 : 64 * m) + lane % 16;
    if (!p.bias || column >= p.width) return 0.0f;
    int32 n = column;
    if (I::kGated) n = p.activation.layout == GateLayout::kHalves ? m * p.width + column : 2 * column + m;
    return p.bias[static_cast<int64>(tile.expert) * p.N + n];
}

// Notes the router weights of all rows: they are two reads away, so all lanes' first ones go before the second ones.
template <class I>
__device__ __forceinline__ void note_weights(const GemmArguments& p, const BlockTile& tile, float* spare) {
    const int32 lane = threadIdx.x % 32;
    int32 slots[I::kTileRows / 32];
#pragma unroll
    for (int i = 0; i < I::kTileRows / 32; ++i) {
        const bool inside = p.row_to_slot && 32 * i + lane < tile.rows;
        slots[i] = inside ? __ldg(p.row_to_slot + tile.first_row + 32 * i + lane) : -1;
    }
    float weights[I::kTileRows / 32];
#pragma unroll
    for (int i = 0; i < I::kTileRows / 32; ++i)
        weights[i] = p.topk_weights && slots[i] >= 0 ? __ldg(p.topk_weights + slots[i]) : 1.0f;
#pragma unroll
    for (int i = 0; i < I::kTileRows / 32; ++i) spare[32 * i + lane] = weights[i];
}

// Notes what the end of a tile will take from memory.
template <class I>
__device__ __forceinline__ void note_terms(const GemmArguments& p, const BlockTile& tile) {
    float* spare = spare_of<I>();
    spare[I::kSpareFloats - 32 + threadIdx.x % 32] = lane_bias<I>(p, tile);
    if constexpr (!I::kGated) note_weights<I>(p, tile, spare);
}

// Of a lane's two weight rows of block m.
template <class I>
struct LaneBias {
    float low, high;

    __device__ __forceinline__ explicit LaneBias(int m) {
        const float* own = spare_of<I>() + I::kSpareFloats - 32 + 16 * m + threadIdx.x % 32 / 4;
        low = own[0], high = own[8];
    }
    __device__ __forceinline__ float added(float sum, int i) const { return __fadd_rn(sum, i & 2 ? high : low); }
};

// Where a lane stores its part of eight rows of the tile by the warp's 16 columns: four neighbours and 32 bytes a row in
// one store, or, of float32, elements of two rows and of two columns, 32 bytes a row in each of four.
template <class I, Format kOut>
struct LaneRows {
    static constexpr bool kWide = kOut == Format::kF32;
    static constexpr int32 kBytes = kWide ? 4 : 2;
    unsigned char* at;
    int32 left, columns;  // rows from here to the tile's end, and columns to the answer's

    __device__ __forceinline__ LaneRows(const GemmArguments& p, int32 first) {
        const BlockTile tile = noted_tile<I>();
        const int32 lane = ptx::afresh(threadIdx.x) % 32, g = lane / 4, c = lane % 4;
        const int32 row = first + (kWide ? 2 * c : g);
        const int32 column = first_column<I>(tile) + (kWide ? g : c % 2 * 8 + c / 2 * 4);
        left = tile.rows - row, columns = p.width - column;
        at = static_cast<unsigned char*>(p.out) + (static_cast<int64>(tile.first_row + row) * p.width + column) * kBytes;
    }
    // y[2 h + i] as sums are; `apart`: columns from those of block 0.
    __device__ __forceinline__ void store(const GemmArguments& p, int32 apart, const float* y) const {
        if constexpr (kWide) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int32 row = i % 2, column = apart + i / 2 * 8;
                if (row < left && column < columns)
                    reinterpret_cast<float*>(at)[static_cast<int64>(row) * p.width + column] = y[i];
            }
        } else {
            const uint2 words = exchange_words<1>(ptx::movmatrix_trans(pair_of<kOut>(y[0], y[1])),
                                                  ptx::movmatrix_trans(pair_of<kOut>(y[2], y[3])));
            if (left > 0 && apart < columns) *reinterpret_cast<uint2*>(at + apart * kBytes) = words;
        }
    }
    __device__ __forceinline__ void next(const GemmArguments& p) {
        at += static_cast<int64>(p.width) * (8 * kBytes), left -= 8;
    }
};

// Calls store(first) for every kPieceRows rows with their sums at the front of both blocks, so that their code is the same.
constexpr int kPieceRows = 96;

template <class I, class Store>
__device__ __forceinline__ void for_pieces(float (&t)[2][I::kTileRows / 2], Store store) {
#pragma unroll 1
    for (int32 first = 0; first < noted_tile<I>().rows; first += kPieceRows) {
        store(first);
#pragma unroll
        for (int i = 0; i < (I::kTileRows - kPieceRows) / 2; ++i)
            t[0][i] = t[0][i + kPieceRows / 2], t[1][i] = t[1][i + kPieceRows / 2];
    }
}

// SiLU of gate times up, or a user's function of them.
template <class I>
__device__ __forceinline__ void store_swapped_gated(const GemmArguments& p, float (&t)[2][I::kTileRows / 2]) {
    for_pieces<I>(t, [&](int32 first) {
        const LaneBias<I> gate(0), up(1);
        LaneRows<I, I::kFormat> rows(p, first);
#pragma unroll
        for (int j = 0; j < kPieceRows / 8; j += 2) {
            if (first + 8 * j >= noted_tile<I>().rows) break;
            float y[8];
            activate_eight(p.activation, [&](int i) { return gate.added(t[0][4 * j + i], i); },
                           [&](int i) { return up.added(t[1][4 * j + i], i); }, spare_of<I>(), y);
#pragma unroll
            for (int i = 0; i < 2; ++i) rows.store(p, 0, y + 4 * i), rows.next(p);
        }
    });
}

// Sums times the router weights of their rows.
template <class I, Format kOut>
__device__ __forceinline__ void store_swapped_sums(const GemmArguments& p, float (&t)[2][I::kTileRows / 2]) {
    for_pieces<I>(t, [&](int32 first) {
        const LaneBias<I> bias[2] = {LaneBias<I>(0), LaneBias<I>(1)};
        const float2* weights = reinterpret_cast<const float2*>(spare_of<I>() + first) + threadIdx.x % 4;
        LaneRows<I, kOut> rows(p, first);
#pragma unroll
        for (int j = 0; j < kPieceRows / 8; j += 2) {
            if (first + 8 * j >= noted_tile<I>().rows) break;
            const float2 weight[2] = {weights[4 * j], weights[4 * j + 4]};
#pragma unroll
            for (int i = 0; i < 2; ++i, rows.next(p))
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const float* x = t[m] + 4 * (j + i);
                    const float y[4] = {__fmul_rn(bias[m].added(x[0], 0), weight[i].x),
                                        __fmul_rn(bias[m].added(x[1], 1), weight[i].y),
                                        __fmul_rn(bias[m].added(x[2], 2), weight[i].x),
                                        __fmul_rn(bias[m].added(x[3], 3), weight[i].y)};
                    rows.store(p, 64 * m, y);
                }
        }
    });
}

// Stores the sums of a warp's part of the noted tile.
template <class I>
__device__ __forceinline__ void store_swapped(const GemmArguments& p, float (&t)[2][I::kTileRows / 2]) {
    if constexpr (I::kGated) {
        store_swapped_gated<I>(p, t);
    } else if (p.out_format == I::kFormat) {
        store_swapped_sums<I, I::kFormat>(p, t);
    } else {
        store_swapped_sums<I, Format::kF32>(p, t);
    }
}

}  // namespace pymoe
