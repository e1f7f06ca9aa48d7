// The smallest unit that includes the shared headers: `doctor` and the tests compile it.
#include "common/ptx.cuh"

namespace pymoe {

// out[i] = value for i < count.
template <typename T>
__global__ void probe_kernel(T* out, T value, int64 count) {
    int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) out[i] = value;
}

}  // namespace pymoe
