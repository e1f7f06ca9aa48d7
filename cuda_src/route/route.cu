// Routing: weights and ids of the topk best experts of every token; pymoe/ops/route/_numpy.py defines the bits.
//
// One warp a token.  Lane l holds the logits of the experts e with e % 32 == l, which is also the order in which the
// definition adds up a softmax denominator: 32 partial sums, then halves folded, so a butterfly gives its bits.
// Selection takes the largest key of the warp topk times: one reduction finds the value, one the lowest id that has it.
//
// Shared memory of a warp: 12 topk + 8 E + 8 groups bytes, `shared_bytes` in _cuda.py: the weights in float64 and the
// chosen ids, the scores (logits, where they decide) and keys of all experts, two numbers a group.
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

// Writes the cleaned logits of a row to `x` and returns the largest.
template <typename Elem>
__device__ __forceinline__ float load_row(float* x, const void* logits, int64 start, int E, int lane) {
    const Elem* row = static_cast<const Elem*>(logits) + start;
    int32 best = CLOSED;
#pragma unroll 8
    for (int e = lane; e < E; e += WARP) {
        float v = clean(to_float(row[e]));
        x[e] = v;
        best = max(best, ordered(v));
    }
    return unordered(__reduce_max_sync(FULL, best));
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
__device__ void close_groups(int32* key, int32* scratch, int E, const Rule& rule, int lane) {
    int groups = rule.groups;
    int32 *group_key = scratch, *kept = scratch + groups;
    int width = E / groups;
    // The lanes that share a group: a power of two, so that a butterfly joins their two best.
    int team = 1;
    while (team * 2 * groups <= WARP) team *= 2;
    __syncwarp();
    for (int base = 0; base < groups; base += WARP / team) {
        int g = base + lane / team;
        int32 first = CLOSED, second = CLOSED;
        if (g < groups) {
            for (int i = lane % team; i < width; i += team) {
                int32 k = key[g * width + i];
                second = max(second, min(first, k));
                first = max(first, k);
            }
        }
        for (int half = team / 2; half > 0; half /= 2) {
            int32 other_first = __shfl_xor_sync(FULL, first, half), other_second = __shfl_xor_sync(FULL, second, half);
            second = max(min(first, other_first), max(second, other_second));
            first = max(first, other_first);
        }
        if (g < groups && lane % team == 0) {
            float sum = rule.group_best == 2 ? __fadd_rn(unordered(first), unordered(second)) : unordered(first);
            group_key[g] = ordered(sum);
        }
    }
    __syncwarp();
    // A group stays if fewer than topk_group others are larger, or as large with a lower number.
    for (int g = lane; g < groups; g += WARP) {
        int32 mine = group_key[g];
        int ahead = 0;
        for (int other = 0; other < groups; ++other) {
            int32 k = group_key[other];
            ahead += k > mine || (k == mine && other < g);
        }
        kept[g] = ahead < rule.topk_group;
    }
    __syncwarp();
    for (int e = lane; e < E; e += WARP)
        if (!kept[e / width]) key[e] = CLOSED;
}

// Writes the ids of the largest keys in descending order, ties to the lowest id.
template <int ITEMS>
__device__ __forceinline__ void choose(int32* chosen, const int32* keys, int E, int topk, int lane) {
    int32 key[ITEMS], best = CLOSED, place = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        key[i] = i * WARP + lane < E ? keys[i * WARP + lane] : CLOSED;
        if (key[i] > best) best = key[i], place = i;
    }
    for (int j = 0; j < topk; ++j) {
        int32 top = __reduce_max_sync(FULL, best);
        int32 e = __reduce_min_sync(FULL, best == top ? place * WARP + lane : 0x7fffffff);
        if (lane == 0) chosen[j] = e;
        if (e % WARP == lane) {
            int taken = e / WARP;
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

template <int ITEMS>
__global__ void route_kernel(float* weights, int32* ids, const void* logits, const float* bias, Sizes n, Rule rule) {
    int lane = threadIdx.x, E = n.E, topk = rule.topk, groups = rule.groups, scoring = rule.scoring;
    int64 row = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= n.M) return;
    bool by_logit = bias == nullptr && groups == 0;
    int bytes = 12 * topk + 8 * E + 8 * groups;
    unsigned char* mine = shared_memory + static_cast<int>(threadIdx.y) * ((bytes + 15) / 16 * 16);
    double* w = reinterpret_cast<double*>(mine);
    int32* chosen = reinterpret_cast<int32*>(w + topk);
    float* score = reinterpret_cast<float*>(chosen + topk);
    int32* key = reinterpret_cast<int32*>(score + E);

    float top;
    switch (n.logits_kind) {
        case 0: top = load_row<float>(score, logits, row * E, E, lane); break;
        case 1: top = load_row<fp16>(score, logits, row * E, E, lane); break;
        case 2: top = load_row<bf16>(score, logits, row * E, E, lane); break;
        default: top = load_row<double>(score, logits, row * E, E, lane); break;
    }
    weights += row * topk;
    ids += row * topk;
    if (!(top > __uint_as_float(MINUS_INFINITY))) {
        for (int j = lane; j < topk; j += WARP) ids[j] = j, weights[j] = 0.0f;
        return;
    }
    double total = scoring == SOFTMAX ? softmax_total(score, top, E, lane) : 1.0;
#pragma unroll 2
    for (int e = lane; e < E; e += WARP) {
        float s = score[e];
        if (!by_logit) score[e] = s = score_of(s, scoring, top, total);
        key[e] = ordered(bias == nullptr ? s : __fadd_rn(s, bias[e]));
    }
    if (groups > 0 && rule.topk_group < groups) close_groups(key, key + E, E, rule, lane);
    choose<ITEMS>(chosen, key, E, topk, lane);

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
    if (divides)
        for (int j = 0; j < topk; ++j) sum = __dadd_rn(sum, w[j]);
    for (int j = lane; j < topk; j += WARP) {
        double v = w[j];
        if (divides) v = sum > 0.0 ? __ddiv_rn(v, __dadd_rn(sum, rule.epsilon)) : 0.0;
        weights[j] = __double2float_rn(__dmul_rn(v, rule.scale));
        ids[j] = chosen[j];
    }
}

}  // namespace pymoe
