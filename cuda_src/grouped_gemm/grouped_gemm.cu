// Grouped GEMM on tensor cores, sm_80 and later: out[r] = sum_k a[gather[r], k] * b[expert of r, :, k].
//
// A block computes kRows x kColumns of one expert's rows; a ring of kStages pieces of kDepth columns hides the memory.
// No sum is split, and k runs in one order, so the bits of a row depend on the row and its expert alone.
#include "grouped_gemm/epilogue.cuh"
#include "grouped_gemm/operands.cuh"
#include "grouped_gemm/scales.cuh"

namespace pymoe {

#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr bool kHasFp8Mma = true;
#else
constexpr bool kHasFp8Mma = false;  // elsewhere the instruction decodes to float16 itself, for every fragment again
#endif

template <bool kInteger>
struct SumType {
    using Type = float;
};
template <>
struct SumType<true> {
    using Type = int32;
};

// Everything about an instance that its template arguments decide.
template <Format kA_, Format kB_, Scaling kScaling_, int kSpan_, int kRows_, int kColumns_, int kDepth_, int kStages_,
          int kWarpsM_, int kWarpsN_>
struct Instance {
    static constexpr Format kA = kA_, kB = kB_;
    static constexpr Scaling kScaling = kScaling_;
    static constexpr int kSpan = kSpan_, kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_, kStages = kStages_;
    static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kThreads = 32 * kWarpsM * kWarpsN;
    static constexpr int kM = kRows / kWarpsM / 16, kN = kColumns / kWarpsN / 8;  // fragments of a warp

    static constexpr bool kInteger = kA == Format::kS8;
    static constexpr bool kNativeFp8 = kHasFp8Mma && kA == Format::kE4M3 && kB == Format::kE4M3;
    static constexpr bool kBytes = kInteger || kNativeFp8;  // the mma multiplies bytes, 32 k at a time
    static constexpr Format kInto = kInteger        ? Format::kS8
                                    : kNativeFp8    ? Format::kE4M3
                                    : kA == Format::kBF16 ? Format::kBF16
                                                          : Format::kFP16;
    static constexpr bool kScaledSums = kScaling == Scaling::kSums || kScaling == Scaling::kBlocks;
    static constexpr bool kSmallSums = kScaledSums && kSpan <= 32;   // partial sums of one 32-k block or half of it
    // Partial sums of a stage.  An fp8 mma keeps fewer bits than float32, so its sums leave it every 128 k.
    static constexpr bool kStageSums = kScaledSums ? !kSmallSums : kNativeFp8;
    static constexpr bool kSixteens = kScaledSums && kSpan == 16;
    static_assert(!kStageSums || kDepth == 128, "a stage is the span of its scale");

    static constexpr bool kRaw = kBytes || (kA == kInto && kB == kInto);  // nothing to decode on either side
    static constexpr int kSteps = kBytes ? 1 : 2;                         // mma steps of a 32-k block
    using A = OperandTile<kA, kRows, kDepth, kRaw>;
    using B = OperandTile<kB, kColumns, kDepth, kRaw>;
    static constexpr int kUnits = kScaling == Scaling::kNone ? 1 : kDepth / kSpan;
    static constexpr bool kKeep = kRows <= 16;  // registers are free where few sums are kept
    using CopyA = OperandCopy<A, kRows, kThreads, kKeep>;
    using CopyB = OperandCopy<B, kColumns, kThreads, kKeep>;
    using Scales = StageScales<kScaling, kB, kInto, kUnits, kRows, kColumns, kThreads>;
    using Sum = typename SumType<kInteger>::Type;
    using Total = typename SumType<kInteger && !kScaledSums>::Type;

    static constexpr int kStageBytes = A::kBytes + B::kBytes + Scales::kBytes;
    static constexpr int kSumsBytes = 4 * kRows * sums_pitch(kColumns);
    static constexpr int kRingBytes = kStages * kStageBytes > kSumsBytes ? kStages * kStageBytes : kSumsBytes;
    static constexpr int kSharedBytes = kRingBytes + 4 * (kRows + kColumns);
};

// d += one step of 16 k (32 for bytes).
template <class I>
__device__ __forceinline__ void multiply_step(typename I::Sum (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    if constexpr (I::kInteger) {
        ptx::mma_m16n8k32_s8(d, a, b);
    } else if constexpr (I::kInto == Format::kBF16) {
        ptx::mma_m16n8k16_bf16(d, a, b);
    } else if constexpr (I::kInto == Format::kFP16) {
        ptx::mma_m16n8k16_fp16(d, a, b);
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
        ptx::mma_m16n8k32_e4m3(d, a, b);
#endif
    }
}

// One 32-k block of 16 rows: what each step takes, in the order of the instruction's registers.
template <class I>
struct RowsFragment {
    uint32 step[I::kSteps][4];

    __device__ __forceinline__ void read(const uint8* a, int32 row, int32 block) {
        const int32 lane = threadIdx.x % 32;
        if constexpr (I::kRaw) {
            const int32 chunk = block * I::kSteps * 2 + lane / 16;
#pragma unroll
            for (int s = 0; s < I::kSteps; ++s)
                ptx::ldmatrix_x4(step[s], ptx::shared_address(a + I::A::offset(row + lane % 16, chunk + 2 * s)));
        } else {
            // The sum with a zero that the compiler cannot see as one: else it would copy the registers of a load into
            // the order of the instruction once more for every instruction.
            const uint32 zero = threadIdx.y;
            uint32 raw[4], low[4], high[4];
            I::A::template read<I::kSixteens>(a, row + lane / 4, block, lane % 4, raw);
            decode<I::kA, I::kInto>(raw, 0, low);
            I::A::template read<I::kSixteens>(a, row + 8 + lane / 4, block, lane % 4, raw);
            decode<I::kA, I::kInto>(raw, 0, high);
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                step[s][0] = I::kA == I::kInto ? low[2 * s] | zero : low[2 * s];
                step[s][1] = I::kA == I::kInto ? high[2 * s] | zero : high[2 * s];
                step[s][2] = I::kA == I::kInto ? low[2 * s + 1] | zero : low[2 * s + 1];
                step[s][3] = I::kA == I::kInto ? high[2 * s + 1] | zero : high[2 * s + 1];
            }
        }
    }
};

// One 32-k block of 8 weight rows, decoded, with a folded scale.
template <class I>
struct WeightFragment {
    uint32 step[I::kSteps][2];

    __device__ __forceinline__ void read(const uint8* b, const uint32* scales, int32 first, int32 block) {
        const int32 lane = threadIdx.x % 32, c = lane % 4;
        if constexpr (I::kRaw && I::kBytes) {
            ptx::ldmatrix_x2(step[0], ptx::shared_address(b + I::B::offset(first + lane % 8, block * 2 + lane / 8 % 2)));
        } else if constexpr (I::kRaw) {
            uint32 pairs[4];
            ptx::ldmatrix_x4(pairs, ptx::shared_address(b + I::B::offset(first + lane % 8, block * 4 + lane / 8)));
            step[0][0] = pairs[0], step[0][1] = pairs[1], step[1][0] = pairs[2], step[1][1] = pairs[3];
        } else {
            uint32 raw[4], word = 0, pairs[4];
            I::B::template read<I::kSixteens>(b, first + lane / 4, block, c, raw);
            constexpr int kPerBlock = 32 / I::kSpan;  // one scale for 32 columns, or two
            if constexpr (I::Scales::kHasWords)
                word = I::Scales::word(scales, block * kPerBlock + (kPerBlock == 2 ? c / 2 : 0), first + lane / 4);
            decode<I::kB, I::kInto>(raw, word, pairs);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                step[i / 2][i % 2] = I::kScaling == Scaling::kFold ? multiply_pairs<I::kInto>(pairs[i], word) : pairs[i];
        }
    }
};

// totals += partial sums times the scales of their columns, and of their rows where both sides have them.
template <class I>
__device__ __forceinline__ void add_scaled(typename I::Total (&total)[4], const typename I::Sum (&part)[4],
                                           const uint32* scales, int32 unit, int32 row, int32 column) {
    const int32 g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    float2 low = I::Scales::factor_pair(scales, unit, column + 2 * c), high = low;
    if constexpr (I::kScaling == Scaling::kBlocks) {
        const float row_low = I::Scales::row_factor(scales, unit, row + g);
        const float row_high = I::Scales::row_factor(scales, unit, row + 8 + g);
        low = make_float2(low.x * row_low, low.y * row_low);
        high = make_float2(high.x * row_high, high.y * row_high);
    }
    total[0] = fmaf(static_cast<float>(part[0]), low.x, total[0]);
    total[1] = fmaf(static_cast<float>(part[1]), low.y, total[1]);
    total[2] = fmaf(static_cast<float>(part[2]), high.x, total[2]);
    total[3] = fmaf(static_cast<float>(part[3]), high.y, total[3]);
}

// Adds one stage to the sums of this warp, whose tile starts at (row, column).
template <class I>
__device__ __forceinline__ void multiply_stage(typename I::Total (&totals)[I::kM][I::kN][4], const uint8* a,
                                               const uint8* b, const uint32* scales, int32 row, int32 column) {
    typename I::Sum parts[I::kStageSums ? I::kM : 1][I::kStageSums ? I::kN : 1][4] = {};
#pragma unroll
    for (int block = 0; block < I::kDepth / 32; ++block) {
        RowsFragment<I> rows[I::kM];
#pragma unroll
        for (int m = 0; m < I::kM; ++m) rows[m].read(a, row + 16 * m, block);
#pragma unroll
        for (int n = 0; n < I::kN; ++n) {
            WeightFragment<I> weight;
            weight.read(b, scales, column + 8 * n, block);
#pragma unroll
            for (int m = 0; m < I::kM; ++m) {
                typename I::Sum part[4] = {};
#pragma unroll
                for (int s = 0; s < I::kSteps; ++s) {
                    if constexpr (I::kSmallSums) {
                        multiply_step<I>(part, rows[m].step[s], weight.step[s]);
                        if (!I::kSixteens && s + 1 < I::kSteps) continue;
                        const int32 unit = I::kSixteens ? 2 * block + s : block;
                        add_scaled<I>(totals[m][n], part, scales, unit, row + 16 * m, column + 8 * n);
                        part[0] = part[1] = part[2] = part[3] = 0;
                    } else if constexpr (I::kStageSums) {
                        multiply_step<I>(parts[m][n], rows[m].step[s], weight.step[s]);
                    } else {
                        multiply_step<I>(totals[m][n], rows[m].step[s], weight.step[s]);
                    }
                }
            }
        }
    }
    if constexpr (I::kStageSums) {
#pragma unroll
        for (int n = 0; n < I::kN; ++n)
#pragma unroll
            for (int m = 0; m < I::kM; ++m) {
                if constexpr (I::kScaledSums) {
                    add_scaled<I>(totals[m][n], parts[m][n], scales, 0, row + 16 * m, column + 8 * n);
                } else {
#pragma unroll
                    for (int i = 0; i < 4; ++i) totals[m][n][i] += parts[m][n][i];
                }
            }
    }
}

// The ring of stages in shared memory, and what a thread remembers of the stage it is filling.
template <class I>
struct Ring {
    uint8* shared;
    typename I::CopyA copy_a;
    typename I::CopyB copy_b;
    typename I::Scales scales;

    __device__ __forceinline__ uint8* a(int32 slot) const { return shared + slot * I::kStageBytes; }
    __device__ __forceinline__ uint8* b(int32 slot) const { return a(slot) + I::A::kBytes; }
    __device__ __forceinline__ uint32* stage_scales(int32 slot) const {
        return reinterpret_cast<uint32*>(b(slot) + I::B::kBytes);
    }

    __device__ __forceinline__ Ring(const GemmArguments& p, const BlockTile& tile, uint8* ring, const int32* sources,
                                    const int32* weight_rows)
        : shared(ring) {
        const int64 a_bytes = static_cast<int64>(p.K) * bits_of(I::kA) / 8;
        const int64 b_bytes = static_cast<int64>(p.K) * bits_of(I::kB) / 8;
        copy_a.start(p.a, sources, a_bytes);
        copy_b.start(static_cast<const uint8*>(p.b) + static_cast<int64>(tile.expert) * p.N * b_bytes, weight_rows,
                     b_bytes);
        scales.start(p, tile.expert, weight_rows, sources);
    }

    // Starts the copies of stage `step`; what of its scales comes through registers is still to be stored.
    __device__ __forceinline__ void fill(const GemmArguments& p, int32 slot, int32 step) {
        const int32 k = step * I::kDepth;
        copy_a.fill(ptx::shared_address(a(slot)), k);
        copy_b.fill(ptx::shared_address(b(slot)), k);
        scales.fetch(p, stage_scales(slot), k, I::kSpan);
    }
};

template <class I>
__device__ __forceinline__ void multiply_tile(const GemmArguments& p, Ring<I>& ring,
                                              typename I::Total (&totals)[I::kM][I::kN][4]) {
    const int32 steps = (p.K + I::kDepth - 1) / I::kDepth, warp = threadIdx.x / 32;
    const int32 row = warp / I::kWarpsN * (16 * I::kM), column = warp % I::kWarpsN * (8 * I::kN);
#pragma unroll
    for (int s = 0; s < I::kStages - 1; ++s) {
        if (s < steps) {
            ring.fill(p, s, s);
            ring.scales.store(p, ring.stage_scales(s));
        }
        ptx::cp_async_commit();
    }
    int32 slot = 0, free = I::kStages - 1;
    bool fetched = false;
    for (int32 step = 0; step < steps; ++step) {
        ptx::cp_async_wait<I::kStages - 2>();
        __syncthreads();
        // Scales fetched a step ago have arrived by now; their stage is read two barriers from here at the earliest.
        if (fetched) ring.scales.store(p, ring.stage_scales(free == 0 ? I::kStages - 1 : free - 1));
        fetched = step + I::kStages - 1 < steps;
        if (fetched) ring.fill(p, free, step + I::kStages - 1);
        ptx::cp_async_commit();
        multiply_stage<I>(totals, ring.a(slot), ring.b(slot), ring.stage_scales(slot), row, column);
        slot = slot + 1 == I::kStages ? 0 : slot + 1;
        free = free + 1 == I::kStages ? 0 : free + 1;
    }
}

// Sums from fragments to rows in shared memory, where the ring was.
template <class I>
__device__ __forceinline__ void spread_sums(float* sums, const typename I::Total (&totals)[I::kM][I::kN][4]) {
    const int32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const int32 row = warp / I::kWarpsN * (16 * I::kM) + g, column = warp % I::kWarpsN * (8 * I::kN) + 2 * c;
#pragma unroll
    for (int m = 0; m < I::kM; ++m)
#pragma unroll
        for (int n = 0; n < I::kN; ++n) {
            const auto& t = totals[m][n];
            float* at = sums + (row + 16 * m) * sums_pitch(I::kColumns) + column + 8 * n;
            *reinterpret_cast<float2*>(at) = make_float2(static_cast<float>(t[0]), static_cast<float>(t[1]));
            *reinterpret_cast<float2*>(at + 8 * sums_pitch(I::kColumns)) =
                make_float2(static_cast<float>(t[2]), static_cast<float>(t[3]));
        }
}

template <Format kA, Format kB, Scaling kScaling, int kSpan, int kRows, int kColumns, int kDepth, int kStages,
          int kWarpsM, int kWarpsN>
__global__ void __launch_bounds__(32 * kWarpsM * kWarpsN)
    grouped_gemm_kernel(const __grid_constant__ GemmArguments p) {
    using I = Instance<kA, kB, kScaling, kSpan, kRows, kColumns, kDepth, kStages, kWarpsM, kWarpsN>;
    extern __shared__ __align__(128) uint8 shared[];
    if (ptx::dynamic_shared_bytes() < I::kSharedBytes) __trap();  // the launch was planned for another shape
    BlockTile tile;
    if (!find_tile(p, tile)) return;
    int32* sources = reinterpret_cast<int32*>(shared + I::kRingBytes);
    int32* weight_rows = sources + I::kRows;
    for (int32 r = threadIdx.x; r < I::kRows; r += I::kThreads)
        sources[r] = r < tile.rows ? source_row(p, tile.first_row + r) : -1;
    for (int32 j = threadIdx.x; j < I::kColumns; j += I::kThreads)
        weight_rows[j] = weight_row<I::kColumns>(p, tile.column_tile, j);
    __syncthreads();
    typename I::Total totals[I::kM][I::kN][4] = {};
    Ring<I> ring(p, tile, shared, sources, weight_rows);
    multiply_tile<I>(p, ring, totals);
    ptx::cp_async_wait<0>();
    __syncthreads();  // all have read the last stage
    float* sums = reinterpret_cast<float*>(shared);
    spread_sums<I>(sums, totals);
    __syncthreads();
    store_tile<I::kColumns, I::kThreads>(p, tile, sums, sources);
}

}  // namespace pymoe
