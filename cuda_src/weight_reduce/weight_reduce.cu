// Weight and reduce: out[t] = round(sum over slots j of weights[t, j] * slots[t, j]), in slot order, in float32;
// pymoe/ops/weight_reduce/_numpy.py defines the bits.  A block takes COUNT columns a thread of one token; slots of a
// negative id are not read, and neither are their weights.
#include "common/reduce.cuh"

namespace pymoe {

// out (M, K), slots (M, topk, K), both aligned to COUNT elements; weights (M, topk) or null; ids (M, topk) or null.
template <typename Elem, typename Out, int COUNT>
__global__ void weight_reduce_kernel(Out* out, const Elem* slots, const float* weights, const void* ids, int ids_kind,
                                     int topk, int K) {
    int64 token = blockIdx.x;
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * COUNT;
    if (column >= K) return;
    float total[COUNT] = {};
    auto row_of = [&](int j) -> int64 {
        int64 slot = token * topk + j;
        // No unsigned id is negative, even one that int64 cannot hold.
        bool absent = ids != nullptr && ids_kind % 2 == 0 && load_integer(ids, slot, ids_kind) < 0;
        return absent ? -1 : slot;
    };
    add_slots(total, slots, weights == nullptr ? nullptr : weights + token * topk, row_of, topk, K, column);
    store_rounded(out + token * K + column, total);
}

}  // namespace pymoe
