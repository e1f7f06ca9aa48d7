// Float32 operations of users' activations, rounded as IEEE 754 says and without a call.
//
// The compiler's own division and square root are correct too, but leave unusual operands to a subroutine.
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"

namespace pymoe {

// Operands outside 2^-60..2^60, zeros, infinities and NaN.  A double quotient with 48 correct bits and more rounds to
// the right float: no quotient of two floats lies closer to a midpoint, unless it is one.
__device__ __forceinline__ float divide_wide(float a, float b) {
    constexpr uint32 kInfinity = 0x7f800000u;
    const uint32 size_a = __float_as_uint(a) & 0x7fffffffu, size_b = __float_as_uint(b) & 0x7fffffffu;
    if (size_b == 0 || size_b >= kInfinity) return a * ptx::rcp_approx(b);
    if (size_a == 0 || size_a >= kInfinity) return b < 0.0f ? -a : a;
    const float scale = size_b < 0x3f800000u ? 0x1p64f : 0x1p-64f;  // brings b into the range of the estimate
    const double x = a, z = b * scale;
    double y = ptx::rcp_approx(b * scale);
    y = fma(y, fma(-z, y, 1.0), y);
    y = fma(y, fma(-z, y, 1.0), y);
    const double q = x * y;
    return static_cast<float>(fma(fma(-z, q, x), y, q) * scale);
}

// Whether the size of x is in 2^-60..2^60.
__device__ __forceinline__ bool is_near(float x) {
    constexpr uint32 kLeast = 0x21800000u, kMost = 0x5d800000u;
    return (__float_as_uint(x) & 0x7fffffffu) - kLeast <= kMost - kLeast;
}

// Both operands near; or the first +0, which gives a zero of the right sign.
__device__ __forceinline__ float divide_near(float a, float b) {
    float y = ptx::rcp_approx(b);
    y = __fmaf_rn(y, __fmaf_rn(-b, y, 1.0f), y);
    float q = __fmul_rn(a, y);
    q = __fmaf_rn(__fmaf_rn(-b, q, a), y, q);
    return __fmaf_rn(__fmaf_rn(-b, q, a), y, q);
}

__device__ __forceinline__ float divide(float a, float b) {
    return is_near(a) && is_near(b) ? divide_near(a, b) : divide_wide(a, b);
}

__device__ __forceinline__ float square_root(float x) {
    const bool tiny = x < 0x1p-100f;
    const float m = tiny ? x * 0x1p64f : x;
    const float y = ptx::rsqrt_approx(m);
    float root = __fmul_rn(m, y), half = 0.5f * y;
    const float error = __fmaf_rn(-half, root, 0.5f);
    root = __fmaf_rn(root, error, root), half = __fmaf_rn(half, error, half);
    root = __fmaf_rn(__fmaf_rn(-root, root, m), half, root);  // rounds right even after an estimate 2 ulp off
    return m == 0.0f || m == __int_as_float(0x7f800000) ? x : tiny ? root * 0x1p-32f : root;
}

// 2^n of 1.5 * 2^23 + n, whose lowest bits are those of a whole n in -126..127.
__device__ __forceinline__ float power_of_two(float sum) {
    return __uint_as_float((__float_as_uint(sum) << 23) + 0x3f800000u);
}

// n of x = m * 2^n with m in [1, 2), and that m; x is positive and not subnormal.
__device__ __forceinline__ float exponent_of(float x) {
    return __fsub_rn(__uint_as_float(__float_as_uint(x) >> 23 | 0x4b000000u), 8388735.0f);
}
__device__ __forceinline__ float mantissa_of(float x) {
    return __uint_as_float((__float_as_uint(x) & 0x007fffffu) | 0x3f800000u);
}

}  // namespace pymoe
