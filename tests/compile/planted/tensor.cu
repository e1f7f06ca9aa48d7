// Tensor cores, with loads of 16 bytes if kWide.
#include "common/types.cuh"
namespace pymoe {
template <bool kWide>
__global__ void tensor_kernel(float* out, const uint32* a, const uint32* b) {
    uint32 x[4], y[4];
    if (kWide) {
        uint4 u = reinterpret_cast<const uint4*>(a)[threadIdx.x], v = reinterpret_cast<const uint4*>(b)[threadIdx.x];
        x[0] = u.x, x[1] = u.y, x[2] = u.z, x[3] = u.w, y[0] = v.x, y[1] = v.y;
    } else {
        for (int i = 0; i < 4; ++i) x[i] = a[threadIdx.x + i * 37], y[i] = b[threadIdx.x + i * 41];
    }
    float d[4] = {};
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}
}  // namespace pymoe
