// Grouped GEMM without tensor cores: float32 fused multiply-adds, k ascending, from operands in any format.
//
// The exact path of float32, and the path of every pair of formats and every K, stride and group of columns that the
// tensor-core instances do not take.  Here scales enter as docs/numerics defines them: value by value, or by blocks.
#include "grouped_gemm/epilogue.cuh"

namespace pymoe {

constexpr int kSimtThreads = 256, kSimtColumns = 64, kSimtDepth = 32;

__device__ __noinline__ float zero_point_apart(const GemmArguments& p, int32 expert, int32 n, int32 g) {
    return static_cast<float>(zero_point(p, p.b_format, expert, n, g));
}

// A thread sums kRows / 16 rows by 4 columns.  kAnyFormat: formats and scales are looked up at run time; else float32.
template <bool kAnyFormat, int kRows>
struct SimtTile {
    static constexpr int kPerThread = kRows / 16;
    static constexpr int kAItems = kRows * kSimtDepth / kSimtThreads, kBItems = kSimtColumns * kSimtDepth / kSimtThreads;

    const GemmArguments& p;
    const BlockTile& tile;
    const int32* sources;
    const int32* weight_rows;
    float a_next[kAItems], b_next[kBItems];

    // Values of columns first..end-1 of the rows that this thread copies; zeros elsewhere.
    __device__ __forceinline__ void fetch(int32 first, int32 end) {
        const int32 k = first + static_cast<int32>(threadIdx.x) % kSimtDepth;
#pragma unroll
        for (int i = 0; i < kAItems; ++i) {
            const int32 source = sources[threadIdx.x / kSimtDepth + i * (kSimtThreads / kSimtDepth)];
            a_next[i] = k < end && source >= 0 ? activation_value(source, k) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kBItems; ++i) {
            const int32 n = weight_rows[threadIdx.x / kSimtDepth + i * (kSimtThreads / kSimtDepth)];
            b_next[i] = k < end && n >= 0 ? weight_value(n, k) : 0.0f;
        }
    }

    __device__ __forceinline__ float activation_value(int32 source, int32 k) const {
        const int64 at = static_cast<int64>(source) * p.K + k;
        if constexpr (!kAnyFormat) return static_cast<const float*>(p.a)[at];
        const float value = read_element_apart(p.a, at, p.a_format);
        if (p.a_scale_kind != RowScale::kGroup || !p.scales_before_sum) return value;
        return value * group_scale_of_row(source, k / p.group);
    }

    __device__ __forceinline__ float weight_value(int32 n, int32 k) const {
        const int64 at = (static_cast<int64>(tile.expert) * p.N + n) * p.K + k;
        if constexpr (!kAnyFormat) return static_cast<const float*>(p.b)[at];
        float value = read_element_apart(p.b, at, p.b_format);
        if (!p.group_scale || !p.scales_before_sum) return value;
        const int32 g = k / p.group;
        if (p.b_format == Format::kU8 || p.b_format == Format::kU4) value -= zero_point_apart(p, tile.expert, n, g);
        return value * group_scale(n, g);
    }

    __device__ __forceinline__ float group_scale(int32 n, int32 g) const {
        const int64 line = static_cast<int64>(tile.expert) * p.scale_lines + n / p.scale_rows;
        const int64 at = line * p.groups + g;
        return read_scale_apart(p.group_scale, at, p.group_scale_format);
    }

    __device__ __forceinline__ float group_scale_of_row(int32 source, int32 g) const {
        const int64 at = static_cast<int64>(source) * p.groups + g;
        return read_scale_apart(p.a_scale, at, p.a_scale_format);
    }

    __device__ __forceinline__ void store(float* a, float* b) const {
        const int32 k = threadIdx.x % kSimtDepth, line = threadIdx.x / kSimtDepth;
        constexpr int kLines = kSimtThreads / kSimtDepth;
#pragma unroll
        for (int i = 0; i < kAItems; ++i) a[k * (kRows + 4) + line + i * kLines] = a_next[i];
#pragma unroll
        for (int i = 0; i < kBItems; ++i) b[k * (kSimtColumns + 4) + line + i * kLines] = b_next[i];
    }
};

// Where a chunk of columns that starts at `first` ends: never in the middle of a group.
__device__ __forceinline__ int32 chunk_end(const GemmArguments& p, int32 first) {
    const int32 end = min(first + kSimtDepth, p.K);
    return p.group_scale ? min(end, first / p.group * p.group + p.group) : end;
}

// Sums of one thread.  Integers: chunks of at most 32 products of bytes are exact in float32, their sum in int32.
template <int kPerThread>
struct SimtSums {
    float chunk[kPerThread][4] = {}, total[kPerThread][4] = {};
    int32 whole[kPerThread][4] = {};

    __device__ __forceinline__ void add_chunk(bool integers) {
        if (!integers) return;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                whole[i][j] += static_cast<int32>(chunk[i][j]);
                chunk[i][j] = 0.0f;
            }
    }

    // The sum since the last call, once.
    __device__ __forceinline__ float take(int i, int j, bool integers) {
        const float sum = integers ? static_cast<float>(whole[i][j]) : chunk[i][j];
        chunk[i][j] = 0.0f;
        whole[i][j] = 0;
        return sum;
    }
};

// At least one block a multiprocessor is asked for by name: left to itself, the assembler for sm_100 and sm_120 aims at
// 64 registers and spills two words.
template <bool kAnyFormat, int kRows>
__global__ void __launch_bounds__(kSimtThreads, 1) grouped_gemm_simt_kernel(const __grid_constant__ GemmArguments p) {
    using Tile = SimtTile<kAnyFormat, kRows>;
    constexpr int kAPitch = kRows + 4, kBPitch = kSimtColumns + 4, kPerThread = Tile::kPerThread;
    constexpr int kRing = kSimtDepth * (kAPitch + kBPitch), kSums = kRows * sums_pitch(kSimtColumns);
    __shared__ __align__(16) float shared[kRing > kSums ? kRing : kSums];
    __shared__ int32 sources[kRows], weight_rows[kSimtColumns];
    BlockTile tile;
    if (!find_tile<kRows>(p, tile)) return;
    for (int32 r = threadIdx.x; r < kRows; r += kSimtThreads)
        sources[r] = r < tile.rows ? source_row(p, tile.first_row + r) : -1;
    for (int32 j = threadIdx.x; j < kSimtColumns; j += kSimtThreads)
        weight_rows[j] = weight_row<kSimtColumns>(p, tile.column_tile, j);
    __syncthreads();

    float* a = shared;
    float* b = shared + kSimtDepth * kAPitch;
    const int32 row = threadIdx.x / 16 * kPerThread, column = threadIdx.x % 16 * 4;
    const bool integers = kAnyFormat && p.a_format == Format::kS8;
    const bool blocks = kAnyFormat && p.group_scale && !p.scales_before_sum;
    SimtSums<kPerThread> sums;
    Tile loader = {p, tile, sources, weight_rows};
    int32 first = 0, end = chunk_end(p, 0);
    loader.fetch(first, end);
    while (first < p.K) {
        __syncthreads();
        loader.store(a, b);
        __syncthreads();
        const int32 next = end;
        if (next < p.K) loader.fetch(next, chunk_end(p, next));
#pragma unroll 4
        for (int k = 0; k < kSimtDepth; ++k) {
            const float4 w = *reinterpret_cast<const float4*>(b + k * kBPitch + column);
#pragma unroll
            for (int i = 0; i < kPerThread; ++i) {
                const float x = a[k * kAPitch + row + i];
                sums.chunk[i][0] = fmaf(x, w.x, sums.chunk[i][0]);
                sums.chunk[i][1] = fmaf(x, w.y, sums.chunk[i][1]);
                sums.chunk[i][2] = fmaf(x, w.z, sums.chunk[i][2]);
                sums.chunk[i][3] = fmaf(x, w.w, sums.chunk[i][3]);
            }
        }
        if (kAnyFormat) sums.add_chunk(integers);
        if (blocks && (end == p.K || end % p.group == 0)) {
            const int32 g = first / p.group;
            float scales[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int32 n = weight_rows[column + j];
                scales[j] = n < 0 ? 0.0f : loader.group_scale(n, g);
            }
#pragma unroll
            for (int i = 0; i < kPerThread; ++i) {
                const int32 source = sources[row + i];
                const float scale = source < 0 ? 0.0f : loader.group_scale_of_row(source, g);
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    sums.total[i][j] = fmaf(sums.take(i, j, integers), scales[j] * scale, sums.total[i][j]);
            }
        }
        first = next;
        end = next < p.K ? chunk_end(p, next) : next;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
            shared[(row + i) * sums_pitch(kSimtColumns) + column + j] =
                blocks ? sums.total[i][j] : sums.take(i, j, integers);
    __syncthreads();
    store_tile<kSimtColumns, kSimtThreads>(p, tile, shared, sources, threadIdx.x);
}

}  // namespace pymoe
