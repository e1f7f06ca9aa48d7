// Compiles with a warning of the front end.
namespace pymoe {
__global__ void unused_kernel(float* out) {
    int forgotten = 3;
    out[threadIdx.x] = 1;
}
}  // namespace pymoe
