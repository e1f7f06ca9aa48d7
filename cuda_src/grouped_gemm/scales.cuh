// Scales and zero points that change along k, in shared memory beside the codes of the same stage.  Float32 scales of
// partial sums are copied there like the codes; bytes pass through registers, where they become numbers.
#pragma once

#include "common/ptx.cuh"
#include "grouped_gemm/arguments.cuh"

namespace pymoe {

// Where scales that change along k enter.
enum class Scaling : int32 {
    kNone,    // nowhere: all scales leave the sum
    kFold,    // one-byte scales of weights multiply the decoded code, which stays exact in 16 bits
    kSums,    // weights' scales multiply partial sums
    kBlocks   // scales of both sides multiply partial sums
};

// One stage of kDepth columns has kUnits scales a row; a unit is the span of k that one scale is applied to at once.
// kInto is what codes are decoded to, kColumns and kRows the extents of the tile.
template <Scaling kScaling, Format kB, Format kInto, int kUnits, int kRows, int kColumns, int kThreads>
struct StageScales {
    static constexpr bool kHasZeros = kB == Format::kU8 || kB == Format::kU4;
    static constexpr bool kHasFactors = kScaling == Scaling::kSums || kScaling == Scaling::kBlocks;
    static constexpr bool kHasRowFactors = kScaling == Scaling::kBlocks;
    static constexpr bool kHasWords = kHasZeros || kScaling == Scaling::kFold;
    static constexpr int kPitch = kColumns + 8, kRowPitch = kRows + 8;
    static constexpr int kWords = kHasWords ? kUnits * kPitch : 0;
    static constexpr int kFactors = kHasFactors ? kUnits * kPitch : 0;
    static constexpr int kRowFactors = kHasRowFactors ? kUnits * kRowPitch : 0;
    static constexpr int kBytes = 4 * (kWords + kFactors + kRowFactors);
    static constexpr int kItems = kBytes ? (kUnits * kColumns + kThreads - 1) / kThreads : 0;
    static constexpr int kRowItems = kHasRowFactors ? (kUnits * kRows + kThreads - 1) / kThreads : 0;

    static constexpr int kStep = kThreads / kUnits;  // lines that all threads take at once
    static_assert(kThreads % kUnits == 0, "a thread keeps to its unit");

    uint32 factors[kItems + 1], zeros[kHasZeros ? kItems : 1], row_factors[kRowItems + 1];
    const int32* weight_rows;
    const int32* sources;  // both -1 outside
    int32 expert;
    int64 first_line;

    __device__ __forceinline__ void start(const GemmArguments& p, int32 expert_, const int32* weight_rows_,
                                          const int32* sources_) {
        weight_rows = weight_rows_, sources = sources_, expert = expert_;
        first_line = static_cast<int64>(expert) * ((p.N + p.scale_rows - 1) / p.scale_rows);
    }

    // Starts reading the scales of columns `k`..; `span` columns are a unit.
    __device__ __forceinline__ void fetch(const GemmArguments& p, uint32* stage, int32 k, int32 span) {
        if constexpr (kBytes > 0) {
            const int32 unit = threadIdx.x % kUnits, line = threadIdx.x / kUnits;
            const int32 start = k + unit * span;
            // Exact below 2^22 columns: the half keeps the quotient away from whole numbers.
            const int32 g = static_cast<int32>((static_cast<float>(start) + 0.5f) * p.inverse_group);
            const bool inside = start < p.K;
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                const int32 j = line + i * kStep;
                if (kUnits * kColumns % kThreads != 0 && j >= kColumns) break;
                const int32 n = weight_rows[j];
                const bool valid = inside && n >= 0;
                const int64 row = first_line + (p.scale_rows == 1 ? n : n / p.scale_rows);
                const int64 at = valid ? row * p.groups + g : 0;
                if (kHasFactors && p.group_scale_format == ScaleFormat::kF32) {
                    ptx::cp_async_4(ptx::shared_address(stage + kWords + unit * kPitch + j),
                                    static_cast<const float*>(p.group_scale) + at, valid);
                } else {
                    factors[i] = valid ? scale_bits(p.group_scale, at, p.group_scale_format) : 0;
                }
                if constexpr (kHasZeros) zeros[i] = valid ? zero_point(p, kB, expert, n, g) : 0;
            }
#pragma unroll
            for (int i = 0; i < kRowItems; ++i) {
                const int32 r = line + i * kStep;
                if (kUnits * kRows % kThreads != 0 && r >= kRows) break;
                const bool valid = inside && sources[r] >= 0;
                const int64 at = valid ? static_cast<int64>(sources[r]) * p.groups + g : 0;
                if (p.a_scale_format == ScaleFormat::kF32) {
                    ptx::cp_async_4(ptx::shared_address(stage + kWords + kFactors + unit * kRowPitch + r),
                                    static_cast<const float*>(p.a_scale) + at, valid);
                } else {
                    row_factors[i] = valid ? scale_bits(p.a_scale, at, p.a_scale_format) : 0;
                }
            }
        }
    }

    // Writes what `fetch` has in registers to the stage at `stage`.
    __device__ __forceinline__ void store(const GemmArguments& p, uint32* stage) const {
        if constexpr (kBytes > 0) {
            const int32 unit = threadIdx.x % kUnits, line = threadIdx.x / kUnits;
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                const int32 j = line + i * kStep;
                if (kUnits * kColumns % kThreads != 0 && j >= kColumns) break;
                uint32* word = stage + unit * kPitch + j;
                if constexpr (kScaling == Scaling::kFold)
                    *word = twice<kInto>(scale_value(factors[i], p.group_scale_format));
                if constexpr (kHasZeros) *word = zero_point_word<kB, kInto>(static_cast<float>(zeros[i]));
                if (kHasFactors && p.group_scale_format != ScaleFormat::kF32)
                    word[kWords] = __float_as_uint(scale_value(factors[i], p.group_scale_format));
            }
#pragma unroll
            for (int i = 0; i < kRowItems; ++i) {
                const int32 r = line + i * kStep;
                if (kUnits * kRows % kThreads != 0 && r >= kRows) break;
                if (p.a_scale_format != ScaleFormat::kF32)
                    stage[kWords + kFactors + unit * kRowPitch + r] =
                        __float_as_uint(scale_value(row_factors[i], p.a_scale_format));
            }
        }
    }

    // Word of weight column j: twice the folded scale, or the zero point.
    static __device__ __forceinline__ uint32 word(const uint32* stage, int32 unit, int32 j) {
        return stage[unit * kPitch + j];
    }

    // Factors of weight columns j and j + 1, j even.
    static __device__ __forceinline__ float2 factor_pair(const uint32* stage, int32 unit, int32 j) {
        return *reinterpret_cast<const float2*>(stage + kWords + unit * kPitch + j);
    }

    static __device__ __forceinline__ float row_factor(const uint32* stage, int32 unit, int32 r) {
        return __uint_as_float(stage[kWords + kFactors + unit * kRowPitch + r]);
    }
};

}  // namespace pymoe
