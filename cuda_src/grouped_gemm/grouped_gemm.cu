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
                                    : kA == Format::kTF32 ? Format::kTF32
                                                          : Format::kFP16;
    static constexpr bool kRaw = kBytes || (kA == kInto && kB == kInto);  // nothing to decode on either side
    static constexpr bool kScaledSums = kScaling == Scaling::kSums || kScaling == Scaling::kBlocks;
    // One factor of weights for all columns of a warp: a partial sum then costs no more than its own addition.
    static constexpr bool kUniform = kScaling == Scaling::kBlocks && kSpan == 128 && !kInteger;
    static constexpr bool kSmallSums = kScaledSums && kSpan <= 32;  // partial sums of 32 k, or of 16
    // Partial sums of a stage.  An fp8 mma keeps fewer bits than float32, so its sums leave it every 128 k.
    static constexpr bool kStageSums = kScaledSums ? !kSmallSums : kNativeFp8;
    static constexpr bool kSixteens = kScaledSums && kSpan == 16;
    static_assert(!kStageSums || kDepth == 128, "a stage is the span of its scale");
    // Where two blocks fit the registers of a multiprocessor only if the compiler is told so.
    static constexpr int kBlocks = kThreads == 256 && kRaw && !kScaledSums && !kStageSums ? 2 : 1;
    // Blocks of 32 k side by side in the code; more of them would be decoded ahead than registers can hold.
    static constexpr int kBlocksAtOnce = kSmallSums && kRows > 16 ? 1 : kDepth / 32;
    // Half of the warps fill the next stage after the first block of 32 k, half after the third: so tensor cores have
    // work meanwhile.
    static constexpr bool kFillApart = kUniform && !kRaw && kRows > 16;
    // Copies of the next stage wait until the first multiplies are under way, where those are few.
    static constexpr bool kFillLate = (kRaw && !kStageSums && kRows == 64) || kFillApart;

    using A = OperandTile<kA, kRows, kDepth, kRaw>;
    using B = OperandTile<kB, kColumns, kDepth, kRaw>;
    static constexpr int kUnits = kScaling == Scaling::kNone ? 1 : kDepth / kSpan;
    static constexpr bool kKeep = kRows <= 16 || kUniform;  // where registers are free, or instructions short
    using CopyA = OperandCopy<A, kRows, kThreads, kKeep, kRows <= 16>;
    using CopyB = OperandCopy<B, kColumns, kThreads, kKeep, false>;
    using Scales = StageScales<kScaling, kB, kInto, kUnits, kRows, kColumns, kThreads, kUniform>;
    using Sum = typename SumType<kInteger>::Type;
    using Total = typename SumType<kInteger && !kScaledSums>::Type;

    static constexpr int kStageBytes = A::kBytes + B::kBytes + Scales::kBytes;
    static constexpr int kSumsBytes = 4 * kRows * sums_pitch(kColumns);
    static constexpr int kRingBytes = kStages * kStageBytes > kSumsBytes ? kStages * kStageBytes : kSumsBytes;
    static constexpr int kSharedBytes = kRingBytes + 4 * (kRows + 2 * kColumns) + sizeof(BlockTile);
};

// d += one step of 16 k (32 of bytes, 8 of TF32); `fresh`: d is the step alone.
template <class I>
__device__ __forceinline__ void multiply_step(typename I::Sum (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2],
                                              bool fresh) {
    const typename I::Sum c[4] = {fresh ? 0 : d[0], fresh ? 0 : d[1], fresh ? 0 : d[2], fresh ? 0 : d[3]};
    if constexpr (I::kInteger) {
        ptx::mma_m16n8k32_s8(d, a, b, c);
    } else if constexpr (I::kInto == Format::kBF16) {
        ptx::mma_m16n8k16_bf16(d, a, b, c);
    } else if constexpr (I::kInto == Format::kFP16) {
        ptx::mma_m16n8k16_fp16(d, a, b, c);
    } else if constexpr (I::kInto == Format::kTF32) {
        ptx::mma_m16n8k8_tf32(d, a, b, c);
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
        ptx::mma_m16n8k32_e4m3(d, a, b, c);
#endif
    }
}

// Two steps of 16 k of 16 rows, decoded, in the order of the instruction's registers.
template <class I>
struct RowsFragment {
    uint32 step[2][4];

    __device__ __forceinline__ void read(const uint8* a, int32 row, int32 block) {
        const int32 lane = threadIdx.x % 32;
        // The sum with a zero that the compiler cannot see as one: else it would copy the registers of a load into the
        // order of the instruction once more for every instruction.
        const uint32 zero = I::kA == I::kInto ? threadIdx.y : 0;
        uint32 raw[4], low[4], high[4];
        I::A::template read<I::kSixteens>(a, row, lane / 4, block, lane % 4, raw);
        decode<I::kA, I::kInto>(raw, 0, low);
        I::A::template read<I::kSixteens>(a, row + 8, lane / 4, block, lane % 4, raw);
        decode<I::kA, I::kInto>(raw, 0, high);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            step[s][0] = low[2 * s] | zero, step[s][1] = high[2 * s] | zero;
            step[s][2] = low[2 * s + 1] | zero, step[s][3] = high[2 * s + 1] | zero;
        }
    }
};

// Two steps of 16 k of 8 weight rows, decoded, with a folded scale.
template <class I>
struct WeightFragment {
    uint32 step[2][2];

    __device__ __forceinline__ void read(const uint8* b, const uint32* scales, int32 first, int32 block) {
        // int4's largest tile takes every register there is: nothing that follows from the lane may be kept.
        const int32 own = threadIdx.x % 32, lane = I::kB == Format::kU4 ? ptx::afresh(own) : own, c = lane % 4;
        uint32 raw[4], word = 0, pairs[4];
        I::B::template read<I::kSixteens>(b, first, lane / 4, block, c, raw);
        constexpr int kPerBlock = 32 / I::kSpan;  // one scale for 32 columns, or two
        if constexpr (I::Scales::kHasWords)
            word = I::Scales::word(scales, block * kPerBlock + (kPerBlock == 2 ? c / 2 : 0), first + lane / 4);
        decode<I::kB, I::kInto>(raw, word, pairs);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            step[i / 2][i % 2] = I::kScaling == Scaling::kFold ? multiply_pairs<I::kInto>(pairs[i], word) : pairs[i];
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

// totals += the partial sums of a stage, scaled where it has scales.
template <class I>
__device__ __forceinline__ void add_stage(typename I::Total (&totals)[I::kM][I::kN][4],
                                          const typename I::Sum (&parts)[I::kM][I::kN][4], const uint32* scales,
                                          int32 row, int32 column) {
#pragma unroll
    for (int m = 0; m < I::kM; ++m) {
        float factors[2] = {1.0f, 1.0f};  // of rows g and g + 8 of the fragment
        if constexpr (I::kUniform) {
            const float factor = I::Scales::uniform_factor(scales, column);
            const int32 g = row + 16 * m + threadIdx.x % 32 / 4;
            factors[0] = factor * I::Scales::row_factor(scales, 0, g);
            factors[1] = factor * I::Scales::row_factor(scales, 0, g + 8);
        }
#pragma unroll
        for (int n = 0; n < I::kN; ++n) {
            if constexpr (I::kScaledSums && !I::kUniform) {
                add_scaled<I>(totals[m][n], parts[m][n], scales, 0, row + 16 * m, column + 8 * n);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    totals[m][n][i] = fmaf(static_cast<float>(parts[m][n][i]), factors[i / 2], totals[m][n][i]);
            }
        }
    }
}

// The sums that the multiplies of a stage go to: the totals themselves, partial sums of the stage, or of a few steps.
template <class I>
struct StageSums {
    using Totals = typename I::Total[I::kM][I::kN][4];

    Totals& totals;
    const uint32* scales;
    int32 row, column;  // where the warp's tile starts
    typename I::Sum parts[I::kStageSums ? I::kM : 1][I::kStageSums ? I::kN : 1][4];
    typename I::Sum small[I::kM][4];

    // One multiply of fragment (m, n); `begins` the stage, `fresh`: begins a small sum.
    __device__ __forceinline__ void multiply(int m, int n, const uint32 (&a)[4], const uint32 (&b)[2], bool begins,
                                             bool fresh) {
        if constexpr (I::kSmallSums) {
            multiply_step<I>(small[m], a, b, fresh);
        } else if constexpr (I::kStageSums) {
            multiply_step<I>(parts[m][n], a, b, begins);
        } else {
            multiply_step<I>(totals[m][n], a, b, false);
        }
    }

    // The small sums of column n are complete, of unit `unit`.
    __device__ __forceinline__ void add_small(int n, int32 unit) {
        if constexpr (I::kSmallSums) {
#pragma unroll
            for (int m = 0; m < I::kM; ++m)
                add_scaled<I>(totals[m][n], small[m], scales, unit, row + 16 * m, column + 8 * n);
        }
    }

    __device__ __forceinline__ void end_stage() {
        if constexpr (I::kStageSums) add_stage<I>(totals, parts, scales, row, column);
    }
};

// Float32 to the nearest TF32, where the instruction would cut the rest off.
template <class I, int kCount>
__device__ __forceinline__ void round_operand(uint32 (&registers)[kCount]) {
    if constexpr (I::kInto == Format::kTF32) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) registers[i] = ptx::cvt_rna_tf32(registers[i]);
    }
}

// Adds a stage of codes that the instruction multiplies as they are; `between` runs under the first multiplies.
template <class I, class Between>
__device__ __forceinline__ void multiply_raw(StageSums<I>& sums, const uint8* a, const uint8* b,
                                             const Between& between) {
    constexpr int kSteps = I::A::kRowBytes / 32;
    const int32 lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        uint32 x[I::kM][4];
#pragma unroll
        for (int m = 0; m < I::kM; ++m) {
            const int32 place = I::A::offset(sums.row + 16 * m + lane % 16, 2 * s + lane / 16);
            ptx::ldmatrix_x4(x[m], ptx::shared_address(a + place));
            round_operand<I>(x[m]);
        }
#pragma unroll
        for (int n = 0; n < I::kN; n += 2) {
            uint32 w[2][2];
            const int32 line = sums.column + 8 * n + lane / 16 * 8 + lane % 8;
            ptx::ldmatrix_x4(w, ptx::shared_address(b + I::B::offset(line, 2 * s + lane / 8 % 2)));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                round_operand<I>(w[i]);
#pragma unroll
                for (int m = 0; m < I::kM; ++m) sums.multiply(m, n + i, x[m], w[i], s == 0, true);
                sums.add_small(n + i, s);
            }
        }
        if (I::kFillLate && s == kSteps / 2 - 1) between();
    }
    sums.end_stage();
}

// Adds a stage of codes that are decoded; `between` runs after each block of 32 k.
template <class I, class Between>
__device__ __forceinline__ void multiply_decoded(StageSums<I>& sums, const uint8* a, const uint8* b,
                                                 const Between& between) {
    // Two columns of fragments at a time: as many sums again between two multiplies into the same one.
    constexpr int kPair = I::kSmallSums ? 1 : 2;
#pragma unroll(I::kBlocksAtOnce)
    for (int block = 0; block < I::kDepth / 32; ++block) {
        RowsFragment<I> rows[I::kM];
#pragma unroll
        for (int m = 0; m < I::kM; ++m) rows[m].read(a, sums.row + 16 * m, block);
#pragma unroll
        for (int n = 0; n < I::kN; n += kPair) {
            WeightFragment<I> weights[kPair];
#pragma unroll
            for (int i = 0; i < kPair; ++i) weights[i].read(b, sums.scales, sums.column + 8 * (n + i), block);
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
                for (int i = 0; i < kPair; ++i)
#pragma unroll
                    for (int m = 0; m < I::kM; ++m)
                        sums.multiply(m, n + i, rows[m].step[s], weights[i].step[s], block + s == 0,
                                      s == 0 || I::kSixteens);
                if (s == 1 || I::kSixteens) sums.add_small(n, I::kSixteens ? 2 * block + s : block);
            }
        }
        between(block);
    }
    sums.end_stage();
}

// The block's tile in shared memory, after the ring: registers are for sums.
template <class I>
struct TileRows {
    BlockTile tile;
    int32 sources[I::kRows];         // rows of a; -1 where there is none and copies may leave it out
    int32 weights[I::kColumns];      // rows of the expert's weights
    int32 scale_lines[I::kColumns];  // lines of group scales that they belong to

    __device__ __forceinline__ void find(const GemmArguments& p, const BlockTile& found) {
        if (threadIdx.x == 0) tile = found;
        for (int32 r = threadIdx.x; r < I::kRows; r += I::kThreads) {
            const bool there = r < found.rows;
            sources[r] = there || I::kRows > 16 ? source_row(p, found.first_row + (there ? r : 0)) : -1;
        }
        for (int32 j = threadIdx.x; j < I::kColumns; j += I::kThreads) {
            // What comes of a column that is not there, nobody stores.
            const int32 n = max(weight_row<I::kColumns>(p, found.column_tile, j), 0);
            weights[j] = n;
            scale_lines[j] = p.scale_rows == 1 ? n : n / p.scale_rows;
        }
    }
};

// The ring of stages in shared memory, and what a thread remembers of the stage it is filling.
template <class I>
struct Ring {
    uint8* shared;
    int32 kept_expert;  // the tile's, where registers are free
    typename I::CopyA copy_a;
    typename I::CopyB copy_b;
    typename I::Scales scales;

    __device__ __forceinline__ uint8* a(int32 slot) const { return shared + slot * I::kStageBytes; }
    __device__ __forceinline__ uint8* b(int32 slot) const { return a(slot) + I::A::kBytes; }
    __device__ __forceinline__ uint32* stage_scales(int32 slot) const {
        return reinterpret_cast<uint32*>(b(slot) + I::B::kBytes);
    }

    __device__ __forceinline__ const TileRows<I>& rows() const {
        return *reinterpret_cast<const TileRows<I>*>(shared + I::kRingBytes);
    }

    static __device__ __forceinline__ uint32 row_bytes(const GemmArguments& p, Format format) {
        return static_cast<uint32>(static_cast<int64>(p.K) * bits_of(format) / 8);
    }

    __device__ __forceinline__ int32 expert() const { return I::kKeep ? kept_expert : rows().tile.expert; }

    __device__ __forceinline__ const uint8* weights(const GemmArguments& p) const {
        return static_cast<const uint8*>(p.b) + static_cast<int64>(expert()) * p.N * row_bytes(p, I::kB);
    }

    __device__ __forceinline__ Ring(const GemmArguments& p, uint8* ring, int32 expert) : shared(ring), kept_expert(expert) {
        copy_a.start(static_cast<const uint8*>(p.a), rows().sources, row_bytes(p, I::kA));
        copy_b.start(weights(p), rows().weights, row_bytes(p, I::kB));
        scales.start(p, expert, rows().sources, rows().scale_lines);
    }

    // Starts the copies of columns `k`..; what of their scales comes through registers is still to be stored.
    __device__ __forceinline__ void fill(const GemmArguments& p, int32 slot, int32 k) {
        copy_a.fill(ptx::shared_address(a(slot)), k, static_cast<const uint8*>(p.a), rows().sources,
                    row_bytes(p, I::kA));
        copy_b.fill(ptx::shared_address(b(slot)), k, weights(p), rows().weights, row_bytes(p, I::kB));
        scales.fetch(p, expert(), stage_scales(slot), k, I::kSpan, rows().sources, rows().weights,
                     rows().scale_lines);
    }
};

template <class I>
__device__ __forceinline__ void multiply_tile(const GemmArguments& p, int32 live_rows, Ring<I>& ring,
                                              typename I::Total (&totals)[I::kM][I::kN][4]) {
    constexpr int kAhead = I::kStages - 1;  // stages that are filled before they are multiplied
    const int32 warp = threadIdx.x / 32;
    const int32 row = warp / I::kWarpsN * (16 * I::kM), column = warp % I::kWarpsN * (8 * I::kN);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
        if (s * I::kDepth < p.K) {
            ring.fill(p, s, s * I::kDepth);
            ring.scales.store(p, ring.stage_scales(s));
        }
        ptx::cp_async_commit();
    }
    const bool busy = row < live_rows;  // the others of a short tile only help to fill
    bool fetched = false;
    int32 slot = 0;
    for (int32 k = 0; k < p.K; k += I::kDepth) {
        ptx::cp_async_wait<kAhead - 1>();
        __syncthreads();
        const auto fill = [&] {
            // Scales fetched a step ago have arrived by now; their stage is read two barriers from here at the earliest.
            const int32 free = slot == 0 ? kAhead : slot - 1;
            if (fetched) ring.scales.store(p, ring.stage_scales(free == 0 ? kAhead : free - 1));
            fetched = k + kAhead * I::kDepth < p.K;
            if (fetched) ring.fill(p, free, k + kAhead * I::kDepth);
            ptx::cp_async_commit();
        };
        if (!I::kFillLate) fill();
        if (I::kWarpsM == 1 || busy) {
            StageSums<I> sums = {totals, ring.stage_scales(slot), row, column};
            if constexpr (I::kRaw) {
                multiply_raw<I>(sums, ring.a(slot), ring.b(slot), fill);
            } else {
                multiply_decoded<I>(sums, ring.a(slot), ring.b(slot), [&](int block) {
                    if (I::kFillApart && block == warp / (I::kThreads / 64) * 2) fill();
                });
            }
        } else if (I::kFillLate) {
            fill();
        }
        slot = slot == kAhead ? 0 : slot + 1;
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
__global__ void __launch_bounds__(
    32 * kWarpsM * kWarpsN,
    Instance<kA, kB, kScaling, kSpan, kRows, kColumns, kDepth, kStages, kWarpsM, kWarpsN>::kBlocks)
    grouped_gemm_kernel(const __grid_constant__ GemmArguments p) {
    using I = Instance<kA, kB, kScaling, kSpan, kRows, kColumns, kDepth, kStages, kWarpsM, kWarpsN>;
    extern __shared__ __align__(128) unsigned char shared_memory[];
    if (ptx::dynamic_shared_bytes() < I::kSharedBytes) __trap();  // the launch was planned for another shape
    BlockTile tile;
    if (!find_tile<I::kRows>(p, tile)) return;
    TileRows<I>& rows = *reinterpret_cast<TileRows<I>*>(shared_memory + I::kRingBytes);
    rows.find(p, tile);
    __syncthreads();
    typename I::Total totals[I::kM][I::kN][4] = {};
    Ring<I> ring(p, shared_memory, tile.expert);
    multiply_tile<I>(p, tile.rows, ring, totals);
    ptx::cp_async_wait<0>();
    __syncthreads();  // all have read the last stage
    float* sums = reinterpret_cast<float*>(shared_memory);
    spread_sums<I>(sums, totals);
    __syncthreads();
    store_tile<I::kColumns, I::kThreads>(p, rows.tile, sums, rows.sources, threadIdx.x);
}

}  // namespace pymoe
