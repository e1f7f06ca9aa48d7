// Unpermute: out[t] = round(sum over slots j of weights[t, j] * rows[slot_to_row[t, j]]), in slot order, in float32;
// pymoe/ops/unpermute/_numpy.py defines the bits.  A block takes COUNT columns a thread of one token; slots without a
// row are not read, and neither are their weights.
#include "common/reduce.cuh"

namespace pymoe {

// out (M, K), rows (any, K), both aligned to COUNT elements; weights (M, topk) or null; slot_to_row (M, topk).
template <typename Elem, typename Out, int COUNT>
__global__ void unpermute_kernel(Out* out, const Elem* rows, const float* weights, const int32* slot_to_row, int topk,
                                 int K) {
    int64 token = blockIdx.x;
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * COUNT;
    if (column >= K) return;
    const int32* mine = slot_to_row + token * topk;
    float total[COUNT] = {};
    add_slots(total, rows, weights == nullptr ? nullptr : weights + token * topk,
              [&](int j) -> int64 { return mine[j]; }, topk, K, column);
    store_rounded(out + token * K + column, total);
}

// Where rows are added to their tokens in any order, nothing is left but to zero the sums before, and to round them
// after.  A thread takes COUNT of `size` numbers; arrays are aligned to as many elements.
template <int COUNT>
__global__ void zero_sums_kernel(float* sums, int64 size) {
    const int64 first = (static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x) * COUNT;
    const float zeros[COUNT] = {};
    if (first < size) store_rounded(sums + first, zeros);
}

template <typename Out, int COUNT>
__global__ void round_sums_kernel(Out* out, const float* sums, int64 size) {
    const int64 first = (static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x) * COUNT;
    if (first >= size) return;
    const auto part = *reinterpret_cast<const Pack<float, COUNT>*>(sums + first);
    store_rounded(out + first, part.at);
}

}  // namespace pymoe
