// Routing: weights and ids of the topk best experts of every token; pymoe/ops/route/_numpy.py defines the bits.
//
// Many tokens: one warp each.  Few: a block each, whose warps share the scores, since float64 steps take long one after
// another; one warp selects.  It takes the largest key topk times: a reduction finds the value, a vote the lowest id.
// The definition adds up a softmax denominator in 32 partial sums, lane l the experts e with e % 32 == l, and folds
// halves, so a butterfly gives its bits.
//
// Shared memory of a token, `shared_bytes` in _cuda.py: the weights in float64 and the chosen ids, the scores (logits,
// where they decide) and keys of all experts, two numbers a group, and a number a warp.
#include "common/elements.cuh"
#include "route/scores.cuh"

namespace pymoe {

constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;
constexpr int32 CLOSED = -0x7fffffff - 1;  // below the order of every float

enum Scoring { SOFTMAX, SIGMOID, SQRTSOFTPLUS, CHOSEN, LOGIT };

// _cuda.py packs both.
struct Sizes {
    int logits_kind;  // float32, float16, bfloat16, float64
    int M, E;
};
struct Rule {  // the fields of pymoe/ops/route/_rule.py
    int topk, scoring, renormalize, groups, topk_group, group_best;
    double epsilon, scale;
};

extern __shared__ unsigned char shared_memory[];

// All threads of a token have come here; a token has one warp, or a block of its own.
__device__ __forceinline__ void token_barrier() {
    if (blockDim.y > 1)
        __syncthreads();
    else
        __syncwarp();
}

// Writes the cleaned logits of a row to `x` and returns the order of the largest that this warp saw.
template <typename Elem>
__device__ __forceinline__ int32 load_row(float* x, const void* logits, int64 start, int E, int first, int step) {
    const Elem* row = static_cast<const Elem*>(logits) + start;
    int32 best = CLOSED;
#pragma unroll 4
    for (int e = first; e < E; e += step) {
        float v = clean(to_float(row[e]));
        x[e] = v;
        best = max(best, ordered(v));
    }
    return __reduce_max_sync(FULL, best);
}

// Denominator of the softmax over all experts.
__device__ __forceinline__ double softmax_total(const float* x, double top, int E, int lane) {
    double sum = 0.0;
#pragma unroll 4
    for (int e = lane; e < E; e += WARP) sum = __dadd_rn(sum, exp_of(__dsub_rn(x[e], top)));
#pragma unroll
    for (int half = WARP / 2; half > 0; half /= 2) sum = __dadd_rn(sum, __shfl_xor_sync(FULL, sum, half));
    return sum;
}

__device__ __forceinline__ float score_of(float x, int scoring, double top, double total) {
    switch (scoring) {
        case SOFTMAX: return __double2float_rn(__ddiv_rn(exp_of(__dsub_rn(x, top)), total));
        case SIGMOID: return sigmoid_of(x);
        case SQRTSOFTPLUS: return sqrtsoftplus_of(x);
        default: return x;
    }
}

// Sets the keys of experts outside the topk_group best groups to CLOSED; `scratch` has room for two numbers a group.
// Ends with a barrier.
__device__ void close_groups(int32* key, int32* scratch, int E, const Rule& rule, int first, int step) {
    int groups = rule.groups;
    int32 *group_key = scratch, *kept = scratch + groups;
    int width = E / groups;
    // The lanes that share a group: a power of two, so that a butterfly joins their two best.
    int shift = 0;
    while (shift < 5 && groups << (shift + 1) <= step) ++shift;
    int team = 1 << shift, member = first & (team - 1);
    for (int base = 0; base < groups; base += step >> shift) {
        int g = base + (first >> shift);
        int32 best = CLOSED, second = CLOSED;
        if (g < groups) {
            for (int i = member; i < width; i += team) {
                int32 k = key[g * width + i];
                second = max(second, min(best, k));
                best = max(best, k);
            }
        }
        for (int half = team / 2; half > 0; half /= 2) {
            int32 other_best = __shfl_xor_sync(FULL, best, half), other_second = __shfl_xor_sync(FULL, second, half);
            second = max(min(best, other_best), max(second, other_second));
            best = max(best, other_best);
        }
        if (g < groups && member == 0) {
            float sum = rule.group_best == 2 ? __fadd_rn(unordered(best), unordered(second)) : unordered(best);
            group_key[g] = ordered(sum);
        }
    }
    token_barrier();
    // A group stays if fewer than topk_group others are larger, or as large with a lower number.
    for (int g = first; g < groups; g += step) {
        int32 mine = group_key[g];
        int ahead = 0;
#pragma unroll 8
        for (int other = 0; other < groups; ++other) {
            int32 k = group_key[other];
            ahead += k > mine || (k == mine && other < g);
        }
        kept[g] = ahead < rule.topk_group;
    }
    token_barrier();
    for (int e = first; e < E; e += step)
        if (!kept[e / width]) key[e] = CLOSED;
    token_barrier();
}

// Writes the ids of the largest keys in descending order, ties to the lowest id.
// Lane l holds the experts from l * ITEMS on, so the first lane that has the largest key has the lowest id.
template <int ITEMS>
__device__ __forceinline__ void choose(int32* chosen, const int32* keys, int E, int topk, int lane) {
    int32 key[ITEMS], best = CLOSED;
    int place = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        key[i] = lane * ITEMS + i < E ? keys[lane * ITEMS + i] : CLOSED;
        if (key[i] > best) best = key[i], place = i;
    }
    for (int j = 0; j < topk; ++j) {
        int32 top = __reduce_max_sync(FULL, best);
        unsigned owners = __ballot_sync(FULL, best == top);
        if (lane == __ffs(owners) - 1) {
            chosen[j] = lane * ITEMS + place;
            int taken = place;
            best = CLOSED, place = 0;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                if (i == taken) key[i] = CLOSED;
                if (key[i] > best) best = key[i], place = i;
            }
        }
    }
    __syncwarp();
}

// Writes the weights and ids of the chosen experts; one warp.
__device__ __forceinline__ void weigh(float* weights, int32* ids, double* w, const int32* chosen, const float* score,
                                      double top, double total, bool by_logit, const Rule& rule, int lane) {
    int topk = rule.topk, scoring = rule.scoring;
    for (int j = lane; j < topk; j += WARP) {
        float s = score[chosen[j]];
        if (scoring == CHOSEN) {
            w[j] = exp_of(__dsub_rn(s, score[chosen[0]]));
        } else if (scoring == LOGIT) {
            w[j] = s > __uint_as_float(MINUS_INFINITY) ? s : 0.0;
        } else {
            w[j] = by_logit ? score_of(s, scoring, top, total) : s;
        }
    }
    __syncwarp();
    bool divides = rule.renormalize || scoring == CHOSEN;
    double sum = 0.0;
    if (divides) {
#pragma unroll 8
        for (int j = 0; j < topk; ++j) sum = __dadd_rn(sum, w[j]);
    }
    for (int j = lane; j < topk; j += WARP) {
        double v = w[j];
        if (divides) v = sum > 0.0 ? __ddiv_rn(v, __dadd_rn(sum, rule.epsilon)) : 0.0;
        weights[j] = __double2float_rn(__dmul_rn(v, rule.scale));
        ids[j] = chosen[j];
    }
}

// Blocks are (32, warps of a token, tokens); one of the last two is 1.
template <int ITEMS>
__global__ void __launch_bounds__(256, 1)
    route_kernel(float* weights, int32* ids, const void* logits, const float* bias, Sizes n, Rule rule) {
    int lane = threadIdx.x, E = n.E, topk = rule.topk, groups = rule.groups, scoring = rule.scoring;
    int first = threadIdx.y * WARP + lane, step = blockDim.y * WARP;
    int64 row = static_cast<int64>(blockIdx.x) * blockDim.z + threadIdx.z;
    if (row >= n.M) return;
    bool by_logit = bias == nullptr && groups == 0;
    int bytes = 12 * topk + 8 * E + 8 * groups + 8 * WARP;
    unsigned char* mine = shared_memory + static_cast<int>(threadIdx.z) * ((bytes + 15) / 16 * 16);
    double* w = reinterpret_cast<double*>(mine);
    int32* chosen = reinterpret_cast<int32*>(w + topk);
    float* score = reinterpret_cast<float*>(chosen + topk);
    int32* key = reinterpret_cast<int32*>(score + E);
    int32* warp_best = key + E + 2 * groups;

    int32 best;
    switch (n.logits_kind) {
        case 0: best = load_row<float>(score, logits, row * E, E, first, step); break;
        case 1: best = load_row<fp16>(score, logits, row * E, E, first, step); break;
        case 2: best = load_row<bf16>(score, logits, row * E, E, first, step); break;
        default: best = load_row<double>(score, logits, row * E, E, first, step); break;
    }
    if (blockDim.y > 1) {
        if (lane == 0) warp_best[threadIdx.y] = best;
        __syncthreads();
        best = __reduce_max_sync(FULL, lane < static_cast<int>(blockDim.y) ? warp_best[lane] : CLOSED);
    } else {
        __syncwarp();
    }
    float top = unordered(best);
    weights += row * topk;
    ids += row * topk;
    if (!(top > __uint_as_float(MINUS_INFINITY))) {
        for (int j = first; j < topk; j += step) ids[j] = j, weights[j] = 0.0f;
        return;
    }
    // Every warp adds up the denominator for itself, before a score takes the place of a logit.
    double total = scoring == SOFTMAX ? softmax_total(score, top, E, lane) : 1.0;
    if (!by_logit && scoring == SOFTMAX) token_barrier();
#pragma unroll 2
    for (int e = first; e < E; e += step) {
        float s = score[e];
        if (!by_logit) score[e] = s = score_of(s, scoring, top, total);
        key[e] = ordered(bias == nullptr ? s : __fadd_rn(s, bias[e]));
    }
    token_barrier();
    if (groups > 0 && rule.topk_group < groups) close_groups(key, key + E, E, rule, first, step);
    if (threadIdx.y > 0) return;
    choose<ITEMS>(chosen, key, E, topk, lane);
    weigh(weights, ids, w, chosen, score, top, total, by_logit, rule, lane);
}

}  // namespace pymoe
