// The activation alone, for GEMMs whose epilogue does not hold it: x (rows, N) -> y (rows, I), one rounding.
#include "activation/activation.cuh"
#include "common/convert.cuh"

namespace pymoe {

// `rows` live rows; a thread takes elements a grid apart.
__global__ void activation_kernel(const void* x, void* y, int64 rows, int32 width, Format x_format, Format y_format,
                                  ActivationParameters p) {
    const bool gated = p.layout != GateLayout::kPlain;
    const int64 columns = gated ? 2 * static_cast<int64>(width) : width;
    const int64 up = p.layout == GateLayout::kHalves ? width : 1;
    const int64 step = p.layout == GateLayout::kInterleaved ? 2 : 1;
    const int64 stride = static_cast<int64>(gridDim.x) * blockDim.x;
    for (int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * width; i += stride) {
        const int64 row = i / width, gate = row * columns + (i - row * width) * step;
        const float g = read_element(x, gate, x_format);
        const float u = gated ? read_element(x, gate + up, x_format) : 0.0f;
        write_element(y, i, y_format, activate_one(g, u, p));
    }
}

}  // namespace pymoe
