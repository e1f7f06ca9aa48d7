// Indexes an array by a number that is not known when compiling: it lives in local memory.
namespace pymoe {
__global__ void stack_kernel(float* out, const int* index) {
    float table[64] = {};
    for (int i = 0; i < index[0]; ++i) table[index[i] & 63] += i;
    out[threadIdx.x] = table[index[threadIdx.x] & 63];
}
}  // namespace pymoe
