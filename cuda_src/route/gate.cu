// The router's gate: logits (M, E) = x (M, K) weight (E, K)^T + bias, in float32.
//
// Few tokens stream the weights, so the work is split along K: SLICES partial sums, slice s the chunks of CHUNK columns
// c with c % SLICES == s in ascending order, joined s with s + 8 and then in ascending order.  The split depends on
// nothing else, so a token's bits depend neither on M nor on the tile that its row falls into.
//
// A warp multiplies 16 MT tokens by 8 NT experts on the tensor cores.  It reads both operands straight from global
// memory: lane (g, t) loads the 8 neighbours 8 t .. 8 t + 7 of a chunk of row g, and since both sides agree on which
// column is which, a sum over the chunk needs no other order.  Numbers of more than 8 significant bits are sums of
// bfloat16 pieces (float16: 2, float32: 3), each nearest to what is left; products of pieces are exact, and those
// below 2^-25 of the whole are left out (float32 times float32, and float16 times float32, alone).
//
// Shared memory: 512 MT NT bytes a warp, the warp's partial sums.
#include "common/elements.cuh"
#include "common/ptx.cuh"

namespace pymoe {

constexpr int SLICES = 16, CHUNK = 32, EACH = 8;

template <typename Elem>
struct Pieces;
template <>
struct Pieces<bf16> {
    static constexpr int COUNT = 1;
};
template <>
struct Pieces<fp16> {
    static constexpr int COUNT = 2;
};
template <>
struct Pieces<float> {
    static constexpr int COUNT = 3;
};

__device__ __forceinline__ uint32 bits_of(bf16 x) { return __float_as_uint(to_float(x)) >> 16; }

// The 8 numbers as COUNT sets of 4 pairs of bfloat16.
template <typename Elem>
__device__ __forceinline__ void split(uint32 (&pairs)[Pieces<Elem>::COUNT][4], const Pack<Elem, EACH>& x) {
    if constexpr (sizeof(Elem) == 2 && Pieces<Elem>::COUNT == 1) {
        const uint32* words = reinterpret_cast<const uint32*>(&x);
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[0][i] = words[i];
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float low = to_float(x.at[2 * i]), high = to_float(x.at[2 * i + 1]);
#pragma unroll
            for (int p = 0; p < Pieces<Elem>::COUNT; ++p) {
                uint32 first = bits_of(from_float<bf16>(low)), second = bits_of(from_float<bf16>(high));
                pairs[p][i] = first | second << 16;
                // An infinity or a NaN has no rest.
                low = (first & 0x7f80u) == 0x7f80u ? 0.0f : __fsub_rn(low, __uint_as_float(first << 16));
                high = (second & 0x7f80u) == 0x7f80u ? 0.0f : __fsub_rn(high, __uint_as_float(second << 16));
            }
        }
    }
}

// 8 neighbours of a row, zeros from column K on.  No branch: a load behind one would wait for the load before it.
template <bool ALIGNED, typename Elem>
__device__ __forceinline__ Pack<Elem, EACH> load_each(const Elem* row, int column, int K) {
    Pack<Elem, EACH> x;
    if constexpr (ALIGNED) {
        // Columns come in eights, so the last eight stand in for those that are not there.
        x = *reinterpret_cast<const Pack<Elem, EACH>*>(row + min(column, K - EACH));
        if (column >= K) x = {};
    } else {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            Elem value = row[min(column + i, K - 1)];
            x.at[i] = column + i < K ? value : from_float<Elem>(0.0f);
        }
    }
    return x;
}

// sum += a chunk of 16 tokens (rows g and g + 8) times 8 experts.
template <typename X, typename W>
__device__ __forceinline__ void multiply(float (&sum)[4], const uint32 (&low)[Pieces<X>::COUNT][4],
                                         const uint32 (&high)[Pieces<X>::COUNT][4],
                                         const uint32 (&w)[Pieces<W>::COUNT][4]) {
#pragma unroll
    for (int order = 2; order >= 0; --order) {  // the small products first
#pragma unroll
        for (int i = 0; i < Pieces<X>::COUNT; ++i) {
            int j = order - i;
            if (j < 0 || j >= Pieces<W>::COUNT) continue;
#pragma unroll
            for (int half = 0; half < 4; half += 2) {
                uint32 a[4] = {low[i][half], high[i][half], low[i][half + 1], high[i][half + 1]};
                uint32 b[2] = {w[j][half], w[j][half + 1]};
                ptx::mma_m16n8k16_bf16(sum, a, b);
            }
        }
    }
}

// WARPS is 8 or 16: with 8, a warp sums two slices.  ALIGNED: K % 8 == 0, and both operands to 16 bytes.
template <typename X, typename W, int MT, int NT, int WARPS, bool ALIGNED>
__global__ void __launch_bounds__(WARPS * 32, 1)
    gate_kernel(float* logits, const X* x, const W* weight, const float* bias, int M, int E, int K) {
    constexpr int TOKENS = 16 * MT, EXPERTS = 8 * NT, TILE = TOKENS * EXPERTS;
    // Chunks in flight, as far as 128 registers go.
    constexpr int AHEAD = MT * NT > 1 || !ALIGNED ? 1 : sizeof(X) + sizeof(W) > 4 ? 2 : 4;
    extern __shared__ unsigned char shared_memory[];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    float* partial = reinterpret_cast<float*>(shared_memory) + warp * TILE;
    int expert_tiles = (E + EXPERTS - 1) / EXPERTS;
    int64 token = static_cast<int64>(blockIdx.x) / expert_tiles * TOKENS;
    int expert = static_cast<int>(blockIdx.x % expert_tiles) * EXPERTS;
    // Rows that are not there repeat the last one; what comes of them is not stored.
    const X* tokens[MT][2];
    const W* experts[NT];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            tokens[m][half] = x + min(token + 16 * m + 8 * half + g, static_cast<int64>(M - 1)) * K;
#pragma unroll
    for (int n = 0; n < NT; ++n) experts[n] = weight + static_cast<int64>(min(expert + 8 * n + g, E - 1)) * K;

#pragma unroll 1
    for (int slice = warp; slice < SLICES; slice += WARPS) {
        float sum[MT][NT][4] = {};
#pragma unroll 1
        for (int base = slice * CHUNK; base < K; base += AHEAD * SLICES * CHUNK) {
            Pack<X, EACH> rows[AHEAD][MT][2];
            Pack<W, EACH> columns[AHEAD][NT];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                int column = base + i * SLICES * CHUNK + t * EACH;
#pragma unroll
                for (int n = 0; n < NT; ++n) columns[i][n] = load_each<ALIGNED>(experts[n], column, K);
#pragma unroll
                for (int m = 0; m < MT; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half) rows[i][m][half] = load_each<ALIGNED>(tokens[m][half], column, K);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                uint32 w[NT][Pieces<W>::COUNT][4];
#pragma unroll
                for (int n = 0; n < NT; ++n) split(w[n], columns[i][n]);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    uint32 low[Pieces<X>::COUNT][4], high[Pieces<X>::COUNT][4];
                    split(low, rows[i][m][0]);
                    split(high, rows[i][m][1]);
#pragma unroll
                    for (int n = 0; n < NT; ++n) multiply<X, W>(sum[m][n], low, high, w[n]);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float* place = partial + (16 * m + g + 8 * (i / 2)) * EXPERTS + 8 * n + 2 * t + i % 2;
                    *place = slice == warp ? sum[m][n][i] : __fadd_rn(*place, sum[m][n][i]);
                }
    }
    __syncthreads();
    const float* partials = reinterpret_cast<const float*>(shared_memory);
    for (int i = threadIdx.x; i < TILE; i += WARPS * 32) {
        int64 row = token + i / EXPERTS;
        int e = expert + i % EXPERTS;
        float total = 0.0f;
#pragma unroll
        for (int s = 0; s < SLICES / 2; ++s) {
            float pair = partials[s * TILE + i];
            if (WARPS == SLICES) pair = __fadd_rn(pair, partials[(s + SLICES / 2) * TILE + i]);
            total = __fadd_rn(total, pair);
        }
        if (row < M && e < E) logits[row * E + e] = bias == nullptr ? total : __fadd_rn(total, bias[e]);
    }
}

}  // namespace pymoe
