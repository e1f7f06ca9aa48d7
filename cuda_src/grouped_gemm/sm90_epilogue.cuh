// From a warp's sums in registers to rows of the answer: bias, activation, one rounding, stores.  Only biases and rare
// quotients go by way of shared memory.
//
// A lane's sum 4 j + 2 h + i is that of row lane / 4 + 8 h and column 8 j + lane % 4 * 2 + i of 16 rows.  So a lane has
// gate and up of an output side by side (alternating columns), or kColumns / 2 columns apart (halves).
#pragma once

#include "grouped_gemm/epilogue.cuh"

namespace pymoe {

// Whether answers go from registers to their rows; pymoe/ops/grouped_gemm/_sm90.py decides by the same rule.
template <Format kFormat>
__device__ __forceinline__ bool is_direct(const GemmArguments& p) {
    if (!p.vector_store || p.slots_of_token || p.row_scale || p.a_scale_kind != RowScale::kNone) return false;
    if (!p.activated) return p.out_format == kFormat || p.out_format == Format::kF32;
    const bool silu = kOwnActivation || p.activation.kind == Activation::kSilu;
    return silu && p.activation.layout != GateLayout::kPlain && p.out_format == kFormat;
}

// What a warp stores: 16 rows of a tile, of which `rows` are live, from column `column` of the answer on.
struct WarpRows {
    int32 first_row, rows, column;
};

// Two neighbours of a row as bits of the 16-bit format kOut.
template <Format kOut>
__device__ __forceinline__ uint32 pair_of(float x, float y) {
    if constexpr (kOut == Format::kBF16) return bits(__floats2bfloat162_rn(x, y));
    return bits(__floats2half2_rn(x, y));
}

// Lanes c and c ^ kApart give each other the word that is not theirs: the lower one returns with the low words of both,
// the higher one with the high words, in order of the lanes.
template <int kApart>
__device__ __forceinline__ uint2 exchange_words(uint32 low, uint32 high) {
    const bool upper = threadIdx.x & kApart;
    const uint32 got = __shfl_xor_sync(0xffffffffu, upper ? low : high, kApart);
    return upper ? make_uint2(got, high) : make_uint2(low, got);
}

template <typename Word>
__device__ __forceinline__ void store_words(const GemmArguments& p, int64 at, int32 bytes, Word words) {
    *reinterpret_cast<Word*>(static_cast<unsigned char*>(p.out) + at * bytes) = words;
}

// Columns 8 j + 2 c and the next of groups j and j + 1: four neighbours a lane, and 32 bytes a row, in one store.
template <Format kOut>
__device__ __forceinline__ void store_pairs(const GemmArguments& p, const WarpRows& w, int32 j, int h,
                                            const float (&y)[2][2]) {
    const int32 c = threadIdx.x % 4, row = threadIdx.x % 32 / 4 + 8 * h;
    if constexpr (kOut == Format::kF32) {
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            const int32 column = w.column + 8 * (j + group) + 2 * c;
            if (row < w.rows && column < p.width)
                store_words(p, int64(w.first_row + row) * p.width + column, 4, make_float2(y[group][0], y[group][1]));
        }
    } else {
        const uint2 words = exchange_words<1>(pair_of<kOut>(y[0][0], y[0][1]), pair_of<kOut>(y[1][0], y[1][1]));
        const int32 column = w.column + 8 * (j + c % 2) + c / 2 * 4;
        if (row < w.rows && column < p.width) store_words(p, int64(w.first_row + row) * p.width + column, 2, words);
    }
}

// Column 4 j + c of groups j to j + 3, a lane having one of each.
template <Format kOut>
__device__ __forceinline__ void store_singles(const GemmArguments& p, const WarpRows& w, int32 j, int h,
                                              const float (&y)[4]) {
    const int32 c = threadIdx.x % 4, row = threadIdx.x % 32 / 4 + 8 * h;
    uint32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(y[i]);
    const uint2 low = exchange_words<1>(words[0], words[1]), high = exchange_words<1>(words[2], words[3]);
    const uint2 first = exchange_words<2>(low.x, high.x), second = exchange_words<2>(low.y, high.y);
    // Lane c has four neighbours of group j + c, in the order of the lanes that had them.
    const float z[4] = {__uint_as_float(first.x), __uint_as_float(second.x), __uint_as_float(first.y),
                        __uint_as_float(second.y)};
    const int32 column = w.column + 4 * (j + c);
    if (row >= w.rows || column >= p.width) return;
    const int64 at = int64(w.first_row + row) * p.width + column;
    if constexpr (kOut == Format::kF32) {
        store_words(p, at, 4, make_float4(z[0], z[1], z[2], z[3]));
    } else {
        store_words(p, at, 2, make_uint2(pair_of<kOut>(z[0], z[1]), pair_of<kOut>(z[2], z[3])));
    }
}

// Adds the bias to all sums, by way of `spare`; without one zero, so that none of them is -0.
template <int kColumns>
__device__ __forceinline__ void add_bias(const GemmArguments& p, const BlockTile& tile, float* spare,
                                         float (&t)[kColumns / 2]) {
    if (!p.bias) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) t[i] = __fadd_rn(t[i], 0.0f);
        return;
    }
    const float* bias = p.bias + static_cast<int64>(tile.expert) * p.N;
    const int32 lane = threadIdx.x % 32;
#pragma unroll 1
    for (int32 i = lane; i < kColumns; i += 32) {
        const int32 row = weight_row<kColumns>(p, tile.column_tile, i);
        spare[i] = row >= 0 ? bias[row] : 0.0f;
    }
    __syncwarp();
    const float2* terms = reinterpret_cast<const float2*>(spare) + lane % 4;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
        const float2 term = terms[4 * j];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            t[4 * j + 2 * h] = __fadd_rn(t[4 * j + 2 * h], term.x);
            t[4 * j + 2 * h + 1] = __fadd_rn(t[4 * j + 2 * h + 1], term.y);
        }
    }
    __syncwarp();
}

// SiLU of gate times up, or a user's function of them; `spare` as in activate_eight.
template <int kColumns, Format kOut>
__device__ __forceinline__ void store_gated(const GemmArguments& p, const WarpRows& w, float* spare,
                                            const float (&t)[kColumns / 2]) {
    constexpr int kUp = kColumns / 4;  // from a gate's sum to that of its up, in halves
    float y[8];
    if (p.activation.layout == GateLayout::kHalves) {
#pragma unroll
        for (int j = 0; j < kColumns / 16; j += 2) {
            activate_eight(p.activation, [&](int i) { return t[4 * j + i]; },
                           [&](int i) { return t[4 * j + kUp + i]; }, spare, y);
#pragma unroll
            for (int h = 0; h < 2; ++h)
                store_pairs<kOut>(p, w, j, h, {{y[2 * h], y[2 * h + 1]}, {y[4 + 2 * h], y[5 + 2 * h]}});
        }
    } else {
#pragma unroll
        for (int j = 0; j < kColumns / 8; j += 4) {
            activate_eight(p.activation, [&](int i) { return t[4 * j + 2 * i]; },
                           [&](int i) { return t[4 * j + 2 * i + 1]; }, spare, y);
#pragma unroll
            for (int h = 0; h < 2; ++h) store_singles<kOut>(p, w, j, h, {y[h], y[2 + h], y[4 + h], y[6 + h]});
        }
    }
}

// Sums as they are, times the router weights of a lane's two rows.
template <int kColumns, Format kOut>
__device__ __forceinline__ void store_plain_sums(const GemmArguments& p, const WarpRows& w, const float (&weights)[2],
                                                 const float (&t)[kColumns / 2]) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float* x = t + 4 * j + 2 * h;
            store_pairs<kOut>(p, w, j, h, {{__fmul_rn(x[0], weights[h]), __fmul_rn(x[1], weights[h])},
                                           {__fmul_rn(x[4], weights[h]), __fmul_rn(x[5], weights[h])}});
        }
}

}  // namespace pymoe
