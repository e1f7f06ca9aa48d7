// Compiles with a warning of the front end: an unsigned number is never negative.
namespace pymoe {
__global__ void pointless_kernel(float* out, unsigned count) {
    int unused = 3;  // which is none: see facts.py
    if (count < 0) out[threadIdx.x] = 1;
}
}  // namespace pymoe
