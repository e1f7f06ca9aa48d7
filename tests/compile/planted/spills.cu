// Keeps 256 sums in the 64 registers that 1024 threads leave: ptxas must spill.
namespace pymoe {
__global__ void __launch_bounds__(1024) spills_kernel(float* out, const float* in) {
    float sums[256];
#pragma unroll
    for (int i = 0; i < 256; ++i) sums[i] = in[i * 1024 + threadIdx.x];
    for (int step = 1; step < 100; ++step) {
#pragma unroll
        for (int i = 0; i < 256; ++i) sums[i] = sums[i] * sums[(i + 7) % 256] + in[step];
    }
#pragma unroll
    for (int i = 0; i < 256; ++i) out[i * 1024 + threadIdx.x] = sums[i];
}
}  // namespace pymoe
