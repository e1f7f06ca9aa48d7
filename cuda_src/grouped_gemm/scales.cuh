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
// kInto is what codes are decoded to, kColumns and kRows the extents of the tile.  kUniform: 16 neighbouring columns
// share their scales.
template <Scaling kScaling, Format kB, Format kInto, int kUnits, int kRows, int kColumns, int kThreads, bool kUniform>
struct StageScales {
    static constexpr bool kHasZeros = kB == Format::kU8 || kB == Format::kU4;
    static constexpr bool kHasFactors = kScaling == Scaling::kSums || kScaling == Scaling::kBlocks;
    static constexpr bool kHasRowFactors = kScaling == Scaling::kBlocks;
    static constexpr bool kHasWords = kHasZeros || kScaling == Scaling::kFold;
    static constexpr int kEach = kUniform ? 16 : 1, kLines = kColumns / kEach;  // columns of a line of scales, and lines
    static constexpr int kPitch = kLines + 8, kRowPitch = kRows + 8;
    static constexpr int kWords = kHasWords ? kUnits * kPitch : 0;
    static constexpr int kFactors = kHasFactors ? kUnits * kPitch : 0;
    static constexpr int kRowFactors = kHasRowFactors ? kUnits * kRowPitch : 0;
    static constexpr int kBytes = 4 * (kWords + kFactors + kRowFactors);
    static constexpr int kItems = kBytes ? (kUnits * kLines + kThreads - 1) / kThreads : 0;
    static constexpr int kRowItems = kHasRowFactors ? (kUnits * kRows + kThreads - 1) / kThreads : 0;

    static constexpr int kStep = kThreads / kUnits;  // lines that all threads take at once
    static_assert(kThreads % kUnits == 0, "a thread keeps to its unit");

    uint32 factors[kItems + 1], zeros[kHasZeros ? kItems : 1], row_factors[kRowItems + 1];
    const uint8* own[kUniform ? 2 : 1];  // kUniform: the line of scales of weights and that of a row that a thread reads

    static __device__ __forceinline__ uint32 bytes_of(ScaleFormat format) { return format == ScaleFormat::kF32 ? 4 : 1; }

    // Arguments as for `fetch`.
    __device__ __forceinline__ void start(const GemmArguments& p, int32 expert, const int32* sources, const int32* lines) {
        if constexpr (kUniform) {
            static_assert(kUnits == 1 && kLines <= kThreads && kRows <= kThreads, "a thread has one scale of each side");
            const int32 line = threadIdx.x < kLines ? lines[threadIdx.x * kEach] : 0;
            const int32 row = threadIdx.x < kRows ? sources[threadIdx.x] : -1;
            own[0] = static_cast<const uint8*>(p.group_scale) +
                     (static_cast<int64>(expert) * p.scale_lines + line) * p.groups * bytes_of(p.group_scale_format);
            own[1] = row < 0 ? nullptr
                             : static_cast<const uint8*>(p.a_scale) +
                                   static_cast<int64>(row) * p.groups * bytes_of(p.a_scale_format);
        }
    }

    // Starts reading the scales of columns `k`.. of an expert; `span` columns are a unit.  `sources` are rows of a, -1
    // where there is none; `lines` of scales belong to the `rows` of weights.
    __device__ __forceinline__ void fetch(const GemmArguments& p, int32 expert, uint32* stage, int32 k, int32 span,
                                          const int32* sources, const int32* rows, const int32* lines) {
        if constexpr (kBytes > 0) {
            const int32 unit = threadIdx.x % kUnits, line = threadIdx.x / kUnits;
            const int32 start = k + unit * span;
            const bool inside = start < p.K;
            // Exact below 2^22 columns: the half keeps the quotient away from whole numbers.
            const int32 g = inside ? static_cast<int32>((static_cast<float>(start) + 0.5f) * p.inverse_group) : 0;
            if constexpr (kUniform) {
                if (threadIdx.x < kLines)
                    take(stage + threadIdx.x, own[0] + g * bytes_of(p.group_scale_format), inside, p.group_scale_format, true,
                         factors[0]);
                if (kRows == kThreads || threadIdx.x < kRows)
                    take(stage + kFactors + threadIdx.x, own[1] + g * bytes_of(p.a_scale_format), inside && own[1],
                         p.a_scale_format, true, row_factors[0]);
                return;
            }
            const uint32 each = bytes_of(p.group_scale_format), pitch = p.groups * each;
            const uint8* const scales = ptx::opaque(static_cast<const uint8*>(p.group_scale) +
                                                    static_cast<int64>(expert) * p.scale_lines * pitch + g * each);
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                const int32 j = line + i * kStep;
                if (kUnits * kLines % kThreads != 0 && j >= kLines) break;
                const uint8* const at = scales + static_cast<uint64>(static_cast<uint32>(lines[j * kEach])) * pitch;
                take(stage + kWords + unit * kPitch + j, at, inside, p.group_scale_format, kHasFactors, factors[i]);
                if constexpr (kHasZeros) zeros[i] = inside ? zero_point(p, expert, rows[j], g) : 0;
            }
            const uint32 row_each = bytes_of(p.a_scale_format), row_pitch = p.groups * row_each;
            const uint8* const row_scales = ptx::opaque(static_cast<const uint8*>(p.a_scale) + g * row_each);
#pragma unroll
            for (int i = 0; i < kRowItems; ++i) {
                const int32 r = line + i * kStep;
                if (kUnits * kRows % kThreads != 0 && r >= kRows) break;
                const int32 source = sources[r];
                const uint8* const at = row_scales + static_cast<uint64>(max(source, 0)) * row_pitch;
                take(stage + kWords + kFactors + unit * kRowPitch + r, at, inside && source >= 0, p.a_scale_format, true,
                     row_factors[i]);
            }
        }
    }

    // One scale at `at`, 0 where it is not valid: on its way to `place`, or its bits in `pending`, for `store`.
    static __device__ __forceinline__ void take(uint32* place, const uint8* at, bool valid, ScaleFormat format, bool plain,
                                                uint32& pending) {
        if (plain && format == ScaleFormat::kF32) {
            ptx::cp_async_4(ptx::shared_address(place), at, valid);
        } else {
            const uint32 found = valid ? scale_bits(at, 0, format) : 0;
            if (kUniform) {  // byte scales of blocks are rare, and registers short: this waits for the memory
                *place = __float_as_uint(scale_value(found, format));
            } else {
                pending = found;
            }
        }
    }

    // Zero point of weight row `n` of an expert in group `g`.
    static __device__ __forceinline__ uint32 zero_point(const GemmArguments& p, int32 expert, int32 n, int32 g) {
        return pymoe::zero_point(p, kB, expert, n, g);
    }

    // Writes what `fetch` has in registers to the stage at `stage`.
    __device__ __forceinline__ void store(const GemmArguments& p, uint32* stage) const {
        if constexpr (kBytes > 0 && !kUniform) {
            const int32 unit = threadIdx.x % kUnits, line = threadIdx.x / kUnits;
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                const int32 j = line + i * kStep;
                if (kUnits * kLines % kThreads != 0 && j >= kLines) break;
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

    // The factor of weight column j and all others of its warp.
    static __device__ __forceinline__ float uniform_factor(const uint32* stage, int32 j) {
        return __uint_as_float(stage[kWords + j / kEach]);
    }

    static __device__ __forceinline__ float row_factor(const uint32* stage, int32 unit, int32 r) {
        return __uint_as_float(stage[kWords + kFactors + unit * kRowPitch + r]);
    }
};

}  // namespace pymoe
