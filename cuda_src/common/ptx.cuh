// The only file with inline assembly: one function an instruction, named after it.
#pragma once

#include "common/types.cuh"

namespace pymoe::ptx {

// Address of shared memory as the instructions below take it.
__device__ __forceinline__ uint32 shared_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// Dynamic shared memory of this block, bytes.
__device__ __forceinline__ uint32 dynamic_shared_bytes() {
    uint32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}

// 16 bytes from global to shared memory past the first-level cache; zeros and no read where `valid` is false.
__device__ __forceinline__ void cp_async_16(uint32 shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

// The same address, which the compiler takes for a new one: sums that start from it are not taken apart again.
__device__ __forceinline__ const uint8* opaque(const uint8* address) {
    asm("" : "+l"(address));
    return address;
}

// The same number, worked out anew where it is asked for: nothing that follows from it is kept over a loop's rounds.
__device__ __forceinline__ int32 afresh(int32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The same of 4 bytes, through the first-level cache.
__device__ __forceinline__ void cp_async_4(uint32 shared, const void* global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid ? 4 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane l names row l % 8 of matrix l / 8 and gets its 4 bytes l % 4 of row
// l / 4 of each matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32 (&r)[4], uint32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32 (&r)[2][2], uint32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0][0]), "=r"(r[0][1]), "=r"(r[1][0]), "=r"(r[1][1])
                 : "r"(shared)
                 : "memory");
}

// d = a (16 x 16, rows) * b (16 x 8, columns) + c: two 16-bit numbers a register, float32 sums.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2],
                                                  const float (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d += a * b.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b, d);
}

__device__ __forceinline__ void mma_m16n8k16_fp16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2],
                                                  const float (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d = a (16 x 8) * b (8 x 8) + c: one float32 a register, of which the instruction reads TF32's bits.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2],
                                                 const float (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The bits of a float32 rounded to TF32: nearest, ties away from zero.
__device__ __forceinline__ uint32 cvt_rna_tf32(uint32 x) {
    uint32 rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(x)));
    return rounded;
}

// d = a (16 x 32) * b (32 x 8) + c: four signed bytes a register, exact 32-bit sums.
__device__ __forceinline__ void mma_m16n8k32_s8(int32 (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2],
                                                const int32 (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

#if __CUDA_ARCH__ >= 890
// d = a (16 x 32) * b (32 x 8) + c: four e4m3 a register.  A true fp8 instruction on sm_89 and sm_120 only.
__device__ __forceinline__ void mma_m16n8k32_e4m3(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2],
                                                  const float (&c)[4]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Two pairs of float16, exact, of the four e4m3 in `codes`; NaN stays NaN.
__device__ __forceinline__ void cvt_f16x2_e4m3x2_twice(uint32 codes, uint32& low, uint32& high) {
    asm("{\n.reg .b16 first, second;\nmov.b32 {first, second}, %2;\ncvt.rn.f16x2.e4m3x2 %0, first;\n"
        "cvt.rn.f16x2.e4m3x2 %1, second;\n}"
        : "=r"(low), "=r"(high)
        : "r"(codes));
}
#endif

// 1 / x within 1 ulp, with subnormals taken for zeros and answered as zeros; exact for zeros and infinities.
__device__ __forceinline__ float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / sqrt(x) within 2^-22.9, with subnormals taken for zeros.
__device__ __forceinline__ float rsqrt_approx(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Adds to global memory; subnormal numbers and sums count as 0.
__device__ __forceinline__ void red_add_f32(float* to, float x) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}

// The same of four neighbours that begin at a multiple of 16 bytes, one instruction from sm_90 on.
__device__ __forceinline__ void red_add_f32x4(float* to, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) red_add_f32(to + i, x[i]);
#endif
}

// Lets the next kernel of the stream start (programmatic dependent launch); memory is ordered by its wait alone.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernels before have ended and their writes are visible; at once in an ordinary launch.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 890
// Two float32 to e4m3, nearest with ties to even, beyond 448 to 448, NaN to 0x7f; `low` in the low byte.
__device__ __forceinline__ uint32 cvt_e4m3x2(float high, float low) {
    uint16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}
#endif

}  // namespace pymoe::ptx
