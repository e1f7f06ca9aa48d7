// Quantize and dequantize: code = encode(x / scale) group by group; common/quantize.cuh has the arithmetic, and
// pymoe/ops/quantize/_numpy.py and _rules.py define the bits.
//
// quantize_groups   groups of 8 to 256 columns, a power of two: a thread holds 8 neighbours, the threads of a group find
//                   the largest by shuffles; x is read once.
// quantize_rows     any other group along a row, a whole row included: a block a group, x is kept in registers.
// find_largest, quantize_tensor   one scale for all live rows, in two launches.
// scale_blocks, encode_blocks     any blocks of any scheme, weights above all; not tuned.
#include "common/quantize.cuh"
#include "common/reduce.cuh"

namespace pymoe {

constexpr unsigned FULL = 0xffffffffu;
constexpr int COUNT = 8;  // neighbours of a thread

// _cuda.py packs it.
struct Matrix {
    int64 rows;       // of all matrices, one below the other
    int columns;
    int group;        // columns that share a scale
    int64 slab_rows;  // rows r with r % slab_rows < counts[r / slab_rows] are live, where counts are given
    int scale_columns;
};

// Which rows take part: all, those of a mask, or the first ones of each slab.
__device__ __forceinline__ bool is_live(const int32* counts, int64 row, const Matrix& n) {
    return counts == nullptr || row % n.slab_rows < counts[row / n.slab_rows];
}

template <typename Elem, int N>
__device__ __forceinline__ void load(float (&v)[N], const Elem* x) {
    Pack<Elem, N> part = *reinterpret_cast<const Pack<Elem, N>*>(x);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = to_float(part.at[k]);
}

template <int N>
__device__ __forceinline__ uint32 largest_of(const float (&v)[N], int poisons) {
    uint32 largest = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) largest = max(largest, size_bits(v[k], poisons));
    return largest;
}

// Writes the codes of N neighbours from element `at` on.
template <Code CODE, int N>
__device__ __forceinline__ void store_codes(uint8* codes, int64 at, const float (&v)[N], float factor,
                                            const Recipe& recipe) {
    float y[N];
#pragma unroll
    for (int k = 0; k < N; ++k) y[k] = scaled(v[k], factor, recipe.divides);
    if constexpr (CODE == E2M1) {
        Pack<uint8, N / 2> out;
#pragma unroll
        for (int k = 0; k < N; k += 2)
            out.at[k / 2] = static_cast<uint8>(encode_e2m1(y[k]) | encode_e2m1(y[k + 1]) << 4);
        *reinterpret_cast<Pack<uint8, N / 2>*>(codes + at / 2) = out;
    } else if constexpr (CODE == E4M3 && N % 2 == 0) {
        Pack<uint16, N / 2> out;
#pragma unroll
        for (int k = 0; k < N; k += 2) out.at[k / 2] = static_cast<uint16>(encode_e4m3_pair(y[k], y[k + 1]));
        *reinterpret_cast<Pack<uint16, N / 2>*>(codes + at) = out;
    } else {
        Pack<uint8, N> out;
#pragma unroll
        for (int k = 0; k < N; ++k)
            out.at[k] = CODE == E4M3 ? encode_e4m3(y[k]) : static_cast<uint8>(encode_integer(y[k], 0.0f, recipe));
        *reinterpret_cast<Pack<uint8, N>*>(codes + at) = out;
    }
}

// codes (rows, columns) or (rows, columns / 2), scales (rows, scale_columns); columns % 8 == 0, x aligned to 16 bytes.
// A block is (threads along a row, rows); threads along a row are a power of two and at least those of a group.
template <typename Elem, Code CODE>
__global__ void quantize_groups_kernel(uint8* codes, void* scales, const Elem* x, const int32* counts,
                                       const float* global_scale, Matrix n, Recipe recipe) {
    int team = n.group / COUNT;
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * COUNT;
    float global = global_scale == nullptr ? 1.0f : *global_scale;
    int64 stride = static_cast<int64>(gridDim.y) * blockDim.y;
    for (int64 base = static_cast<int64>(blockIdx.y) * blockDim.y; base < n.rows; base += stride) {
        int64 row = base + threadIdx.y;
        bool mine = row < n.rows && column < n.columns && is_live(counts, row, n);
        float v[COUNT] = {};
        if (mine) load(v, x + row * n.columns + column);
        uint32 largest = largest_of(v, recipe.poisons);
        for (int half = team / 2; half > 0; half /= 2) largest = max(largest, __shfl_xor_sync(FULL, largest, half));
        if (mine) {
            float amax = magnitude_from(largest);
            Scaled s = scale_of(recipe, -amax, amax, global);
            if (column % n.group == 0) store_scale(scales, row * n.scale_columns + column / n.group, s, recipe);
            store_codes<CODE>(codes, row * n.columns + column, v, s.factor, recipe);
        }
    }
}

// A block a row (x) and group (y).  N is 8 where columns and groups are multiples of 8 and x is aligned, else 1.
template <typename Elem, Code CODE, int N>
__global__ void quantize_rows_kernel(uint8* codes, void* scales, const Elem* x, const int32* counts, Matrix n,
                                     Recipe recipe) {
    constexpr int KEPT = 4;  // pieces of a thread that stay in registers
    __shared__ uint32 scratch[32];
    int64 row = blockIdx.x;
    if (!is_live(counts, row, n)) return;
    int first = blockIdx.y * n.group, last = min(first + n.group, n.columns);
    const Elem* mine = x + row * n.columns;
    float kept[KEPT][N] = {};
    uint32 largest = 0;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        int column = first + (i * blockDim.x + threadIdx.x) * N;
        if (column < last) load(kept[i], mine + column);
        largest = max(largest, largest_of(kept[i], recipe.poisons));
    }
    for (int column = first + (KEPT * blockDim.x + threadIdx.x) * N; column < last; column += blockDim.x * N) {
        float v[N];
        load(v, mine + column);
        largest = max(largest, largest_of(v, recipe.poisons));
    }
    float amax = magnitude_from(block_max(largest, scratch));
    Scaled s = scale_of(recipe, -amax, amax, 1.0f);
    if (threadIdx.x == 0) store_scale(scales, row * n.scale_columns + blockIdx.y, s, recipe);
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        int column = first + (i * blockDim.x + threadIdx.x) * N;
        if (column < last) store_codes<CODE>(codes, row * n.columns + column, kept[i], s.factor, recipe);
    }
    for (int column = first + (KEPT * blockDim.x + threadIdx.x) * N; column < last; column += blockDim.x * N) {
        float v[N];
        load(v, mine + column);
        store_codes<CODE>(codes, row * n.columns + column, v, s.factor, recipe);
    }
}

// largest (blocks of the grid): the bits of the largest magnitude that each block saw in the live rows.
template <typename Elem, int N>
__global__ void find_largest_kernel(uint32* largest, const Elem* x, const uint8* live, const int32* counts, Matrix n) {
    __shared__ uint32 scratch[32];
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    int64 stride = static_cast<int64>(gridDim.y) * blockDim.y;
    uint32 found = 0;
    for (int64 row = static_cast<int64>(blockIdx.y) * blockDim.y + threadIdx.y; row < n.rows; row += stride) {
        if (column >= n.columns || !is_live(counts, row, n) || (live != nullptr && !live[row])) continue;
        float v[N];
        load(v, x + row * n.columns + column);
        found = max(found, largest_of(v, 0));
    }
    found = block_max(found, scratch);
    if (threadIdx.x == 0 && threadIdx.y == 0) largest[blockIdx.y * gridDim.x + blockIdx.x] = found;
}

// One scale for all: `given`, or that of the largest of `partials` numbers.  Rows beyond the counts are left out.
template <typename Elem, Code CODE, int N>
__global__ void quantize_tensor_kernel(uint8* codes, float* scale, const Elem* x, const float* given,
                                       const uint32* largest, int partials, const int32* counts, Matrix n,
                                       Recipe recipe) {
    __shared__ uint32 scratch[32];
    Scaled s;
    if (given != nullptr) {
        s = given_scale(given, 0, recipe);
    } else {
        uint32 found = 0;
        int threads = blockDim.x * blockDim.y;
        for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < partials; i += threads) found = max(found, largest[i]);
        float amax = magnitude_from(block_max(found, scratch));
        s = scale_of(recipe, -amax, amax, 1.0f);
    }
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0 && threadIdx.y == 0) *scale = s.stored;
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    int64 stride = static_cast<int64>(gridDim.y) * blockDim.y;
    for (int64 row = static_cast<int64>(blockIdx.y) * blockDim.y + threadIdx.y; row < n.rows; row += stride) {
        if (column >= n.columns || !is_live(counts, row, n)) continue;
        float v[N];
        load(v, x + row * n.columns + column);
        store_codes<CODE>(codes, row * n.columns + column, v, s.factor, recipe);
    }
}

// Blocks of any shape over matrices (B, R, K).
struct Grid {
    int64 matrices;
    int R, K;
    int block_rows, block_columns;
    int grid_rows, grid_columns;  // blocks of a matrix
};

// One block of threads a block of elements.  Writes what is stored, and for encode_blocks the factors (float32) and the
// offsets (float32), each (B, grid_rows, grid_columns).  `amaxes`, if given, gets the largest magnitudes instead.
template <typename Elem>
__global__ void scale_blocks_kernel(void* scales, float* factors, float* offsets, float* amaxes, const Elem* x,
                                    const void* given, const float* global_scales, Grid n, Recipe recipe) {
    __shared__ uint32 scratch[32];
    int64 cell = blockIdx.x;
    int64 matrix = cell / (static_cast<int64>(n.grid_rows) * n.grid_columns);
    Scaled s;
    if (recipe.rule == GIVEN) {
        s = given_scale(given, cell, recipe);
    } else {
        int block_row = static_cast<int>(cell / n.grid_columns % n.grid_rows);
        int first_row = block_row * n.block_rows, last_row = min(first_row + n.block_rows, n.R);
        int first = static_cast<int>(cell % n.grid_columns) * n.block_columns;
        int width = min(n.block_columns, n.K - first);
        int64 count = static_cast<int64>(last_row - first_row) * width;
        uint32 below = 0, above = 0, poison = 0;
        for (int64 i = threadIdx.x; i < count; i += blockDim.x) {
            int64 row = first_row + i / width;
            float v = to_float(x[(matrix * n.R + row) * n.K + first + i % width]);
            uint32 size = __float_as_uint(v) & MAGNITUDE;
            if (size > INFINITY_BITS)
                poison = 1;
            else if ((__float_as_uint(v) & ~MAGNITUDE) != 0)
                below = max(below, size);
            else
                above = max(above, size);
        }
        below = block_max(below, scratch);
        above = block_max(above, scratch);
        poison = block_max(poison, scratch);
        float low = -magnitude_from(below), high = magnitude_from(above);
        if (poison && recipe.poisons) low = high = __uint_as_float(NAN_BITS);
        if (amaxes != nullptr) {
            if (threadIdx.x == 0) amaxes[cell] = fabsf(larger(-low, high));
            return;
        }
        s = scale_of(recipe, low, high, global_scales == nullptr ? 1.0f : global_scales[matrix]);
    }
    if (threadIdx.x == 0) {
        store_scale(scales, cell, s, recipe);
        factors[cell] = s.factor;
        offsets[cell] = s.offset;
    }
}

// globals (matrices): nvfp4's scale of a matrix from the largest magnitudes of its groups, poisoned ones left out.
__global__ void global_scales_kernel(float* globals, const float* amaxes, int64 groups) {
    constexpr float GLOBAL_FLOOR = 1.0f / (1ull << 62) / (1ull << 55);  // 2^-117
    __shared__ uint32 scratch[32];
    uint32 largest = 0;
    for (int64 i = threadIdx.x; i < groups; i += blockDim.x)
        largest = max(largest, size_bits(amaxes[blockIdx.x * groups + i], 0));
    float amax = magnitude_from(block_max(largest, scratch));
    if (threadIdx.x == 0)
        globals[blockIdx.x] = amax == 0.0f ? 1.0f : larger(__fdiv_rn(amax, 448.0f * 6.0f), GLOBAL_FLOOR);
}

// Two neighbours of a row a thread.
template <typename Elem>
__global__ void encode_blocks_kernel(uint8* codes, const Elem* x, const float* factors, const float* offsets, Grid n,
                                     Recipe recipe) {
    int64 pairs = (n.K + 1) / 2, total = n.matrices * n.R * pairs;
    int64 stride = static_cast<int64>(gridDim.x) * blockDim.x;
    for (int64 p = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; p < total; p += stride) {
        int64 row = p / pairs;
        int column = static_cast<int>(p % pairs) * 2;
        int64 cell = (row / n.R * n.grid_rows + row % n.R / n.block_rows) * n.grid_columns;
        uint32 code[2] = {};
        for (int k = 0; k < 2 && column + k < n.K; ++k) {
            int64 here = cell + (column + k) / n.block_columns;
            float y = scaled(to_float(x[row * n.K + column + k]), factors[here], recipe.divides);
            code[k] = recipe.code == E4M3   ? encode_e4m3(y)
                      : recipe.code == E2M1 ? encode_e2m1(y)
                                            : static_cast<uint32>(encode_integer(y, offsets[here], recipe));
            if (!recipe.packed) codes[row * n.K + column + k] = static_cast<uint8>(code[k]);
        }
        if (recipe.packed) codes[row * (n.K / 2) + column / 2] = static_cast<uint8>(code[0] | code[1] << 4);
    }
}

// out (B, R, K) = ((code - zero point) * scale) [* or / global scale], each a float32 operation, rounded once to Out.
template <typename Out>
__global__ void dequantize_kernel(Out* out, const uint8* codes, const void* scales, const uint8* zero_points,
                                  const float* global_scales, Grid n, Recipe recipe) {
    int64 total = n.matrices * n.R * n.K;
    int64 stride = static_cast<int64>(gridDim.x) * blockDim.x;
    for (int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += stride) {
        int64 row = i / n.K;
        int column = static_cast<int>(i % n.K);
        int64 cell = (row / n.R * n.grid_rows + row % n.R / n.block_rows) * n.grid_columns + column / n.block_columns;
        uint32 code = recipe.packed ? codes[i / 2] >> (i % 2 * 4) & 15u : codes[i];
        float value;
        if (recipe.code == E4M3)
            value = decode_e4m3(code);
        else if (recipe.code == E2M1)
            value = decode_e2m1(code);
        else
            value = recipe.low < 0 ? static_cast<float>(static_cast<int8>(code))
                                   : static_cast<float>(static_cast<int>(code) - recipe.middle);
        if (zero_points != nullptr) value = __fsub_rn(value, zero_points[cell]);
        float scale = recipe.storage == E8M0        ? decode_e8m0(static_cast<const uint8*>(scales)[cell])
                      : recipe.storage == E4M3_BYTE ? decode_e4m3(static_cast<const uint8*>(scales)[cell])
                                                    : static_cast<const float*>(scales)[cell];
        value = __fmul_rn(value, scale);
        if (global_scales != nullptr) {
            float global = global_scales[row / n.R];
            value = recipe.rule == NVFP4_STATIC ? __fmul_rn(value, global) : __fdiv_rn(value, global);
        }
        out[i] = from_float<Out>(value);
    }
}

}  // namespace pymoe
