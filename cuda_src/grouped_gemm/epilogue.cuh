// From sums in shared memory to rows of the answer: scales, bias, activation or router weight, one rounding, coalesced
// stores.
#pragma once

#include "grouped_gemm/arguments.cuh"

namespace pymoe {

// Floats between two rows of sums in shared memory: a warp's fragments then touch every bank once.
__host__ __device__ constexpr int sums_pitch(int columns) { return columns + 8; }

// The factor and the bias of one weight row.
struct ColumnTerms {
    float scale, bias;
};

__device__ __forceinline__ ColumnTerms column_terms(const GemmArguments& p, int32 expert, int32 n) {
    const int64 at = static_cast<int64>(expert) * p.N + n;
    const bool inside = n < p.N;
    return {p.row_scale && inside ? p.row_scale[at] : 1.0f, p.bias && inside ? p.bias[at] : 0.0f};
}

__device__ __forceinline__ float row_factor(const GemmArguments& p, int32 source) {
    if (p.a_scale_kind == RowScale::kOne) return static_cast<const float*>(p.a_scale)[0];
    return p.a_scale_kind == RowScale::kRow ? static_cast<const float*>(p.a_scale)[source] : 1.0f;
}

// First the row's scale, then the weight's, then the bias, each rounded by itself.
__device__ __forceinline__ float finish_sum(float sum, float row_scale, ColumnTerms column) {
    return __fadd_rn(__fmul_rn(__fmul_rn(sum, row_scale), column.scale), column.bias);
}

__device__ __forceinline__ void store_four(const GemmArguments& p, int32 row, int32 column, const float (&y)[4]) {
    const int64 at = static_cast<int64>(row) * p.width + column;
    if (p.vector_store) {
        write_four(p.out, at, p.out_format, y);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (column + i < p.width) write_element(p.out, at + i, p.out_format, y[i]);
    }
}

// The order of such sums is that of the blocks' ends: the caller has asked for it.
__device__ __forceinline__ void add_four(const GemmArguments& p, int32 row, int32 column, const float (&y)[4]) {
    float* to = static_cast<float*>(p.out) + static_cast<int64>(row) * p.width + column;
    if (p.vector_store) {
        ptx::red_add_f32x4(to, y);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (column + i < p.width) ptx::red_add_f32(to + i, y[i]);
    }
}

// Which row of the answer a row of the tile is for, and what it is multiplied by.
struct RowTerms {
    int32 row;
    float weight;
};

__device__ __forceinline__ RowTerms row_terms(const GemmArguments& p, int32 row, bool inside) {
    if (!p.row_to_slot || !inside) return {row, 1.0f};
    const int32 slot = __ldg(p.row_to_slot + row);
    const uint32 token = p.slots_of_token ? static_cast<uint32>(slot) / static_cast<uint32>(p.slots_of_token) : row;
    return {static_cast<int32>(token), p.topk_weights ? __ldg(p.topk_weights + slot) : 1.0f};
}

// GEMM2, and every GEMM without activation.  A thread keeps its four columns and takes every so-manieth row.  A weight is
// two reads away: lanes read the terms of their warp's rows, 32 at most, beforehand, one row each.
template <int kColumns, int kThreads>
__device__ __forceinline__ void store_plain(const GemmArguments& p, const BlockTile& tile, const float* sums,
                                            const int32* sources, int32 own) {
    constexpr int kQuads = kColumns / 4, kStep = kThreads / kQuads;
    constexpr int kAtOnce = kQuads < 32 ? 32 / kQuads : 1;  // rows that a warp stores at a time
    const int32 thread = ptx::afresh(own);                  // sm_90a has no registers to keep these numbers in
    const int32 quad = thread % kQuads, column = tile.column_tile * kColumns + 4 * quad;
    const int32 lane = thread % 32, among = lane / kQuads, base = thread / kQuads - among;
    const int32 known = base + lane / kAtOnce * kStep + lane % kAtOnce;
    const RowTerms own_row = row_terms(p, tile.first_row + known, known < tile.rows);
    ColumnTerms terms[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) terms[i] = column_terms(p, tile.expert, column + i);
    for (int32 step = 0; base + step * kStep < tile.rows; ++step) {
        const int32 r = base + step * kStep + among;
        const float weight = __shfl_sync(0xffffffffu, own_row.weight, step * kAtOnce + among);
        const int32 row = __shfl_sync(0xffffffffu, own_row.row, step * kAtOnce + among);
        if (r >= tile.rows || column >= p.width) continue;
        const float scale = row_factor(p, sources ? sources[r] : 0);
        const float4 sum = *reinterpret_cast<const float4*>(sums + r * sums_pitch(kColumns) + 4 * quad);
        const float y[4] = {__fmul_rn(finish_sum(sum.x, scale, terms[0]), weight),
                            __fmul_rn(finish_sum(sum.y, scale, terms[1]), weight),
                            __fmul_rn(finish_sum(sum.z, scale, terms[2]), weight),
                            __fmul_rn(finish_sum(sum.w, scale, terms[3]), weight)};
        if (p.slots_of_token) {
            add_four(p, row, column, y);
        } else {
            store_four(p, row, column, y);
        }
    }
}

// GEMM1 with its activation.
template <int kColumns, int kThreads>
__device__ __forceinline__ void store_activated(const GemmArguments& p, const BlockTile& tile, const float* sums,
                                                const int32* sources, int32 thread) {
    const ActivationParameters act = p.activation;
    const bool gated = act.layout != GateLayout::kPlain;
    // Constants on both sides: division by a number known at run time only is long, and a call.
    constexpr int kHalf = kColumns / 8, kWhole = kColumns / 4;
    const int32 step = gated ? kThreads / kHalf : kThreads / kWhole;
    const int32 quad = gated ? thread % kHalf : thread % kWhole;
    const int32 first = gated ? thread / kHalf : thread / kWhole;
    const int32 column = 4 * (tile.column_tile * (gated ? kHalf : kWhole) + quad);
    if (column >= p.width) return;
    const int32 stride = act.layout == GateLayout::kInterleaved ? 2 : 1;
    const int32 to_up = act.layout == GateLayout::kInterleaved ? 1 : kColumns / 2;
    ColumnTerms gate_terms[4], up_terms[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int32 n = (column + i) * stride;
        gate_terms[i] = column_terms(p, tile.expert, n);
        up_terms[i] = column_terms(p, tile.expert, act.layout == GateLayout::kInterleaved ? n + 1 : n + p.width);
    }
    for (int32 r = first; r < tile.rows; r += step) {
        const float scale = row_factor(p, sources ? sources[r] : 0);
        const float* row = sums + r * sums_pitch(kColumns) + 4 * quad * stride;
        float g[4], u[4], y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            g[i] = finish_sum(row[i * stride], scale, gate_terms[i]);
            u[i] = gated ? finish_sum(row[i * stride + to_up], scale, up_terms[i]) : 0.0f;
        }
        activate_four(g, u, act, y);
        store_four(p, tile.first_row + r, column, y);
    }
}

// `sources` is the row of `a` of each row of the tile, null where no scale depends on it; `thread` one of kThreads.
template <int kColumns, int kThreads>
__device__ __forceinline__ void store_tile(const GemmArguments& p, const BlockTile& tile, const float* sums,
                                           const int32* sources, int32 thread) {
    if (kOwnActivation || p.activated) {
        store_activated<kColumns, kThreads>(p, tile, sums, sources, thread);
    } else {
        store_plain<kColumns, kThreads>(p, tile, sums, sources, thread);
    }
}

}  // namespace pymoe
