// Gives registers back without bounds on its threads: ptxas ignores that, and says so (C7508).
namespace pymoe {
__global__ void setmaxnreg_kernel(float* out) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    out[threadIdx.x] = 1;
}
}  // namespace pymoe
