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

}  // namespace pymoe
