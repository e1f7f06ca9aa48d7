// A product without tensor cores that loads four bytes at a time.
namespace pymoe {
__global__ void scalar_kernel(float* out, const float* a, const float* b, int K) {
    float sum = 0;
    for (int k = 0; k < K; ++k) sum += a[threadIdx.x * K + k] * b[threadIdx.x * 3 * K + k];
    out[threadIdx.x] = sum;
}
}  // namespace pymoe
