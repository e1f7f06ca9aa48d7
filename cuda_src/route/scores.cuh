// Scores of expert logits: the steps of pymoe/ops/route/_scores.py, operation for operation.
//
// float64 arithmetic of single IEEE operations: the compiler may not contract what is written with intrinsics.
#pragma once

#include "common/types.cuh"

namespace pymoe {

constexpr double LOG2_E = 1.4426950408889634;
constexpr double LN2_HIGH = 6.93147180369123816490e-01;
constexpr double LN2_LOW = 1.90821492927058770002e-10;
constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52
constexpr double EXP_MIN = -708.0;
constexpr double SOFTPLUS_LINEAR = 20.0;
constexpr int EXPONENT_BIAS = 1023, FRACTION_BITS = 52;
constexpr uint32 LARGEST = 0x7f7fffffu, MINUS_INFINITY = 0xff800000u;

// 1 / k! for k = 13 .. 0.
__device__ constexpr double EXP_TERMS[14] = {
    1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
    1.0 / 40320.0,      1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,
    1.0 / 6.0,          1.0 / 2.0,         1.0,              1.0};
// 2 / (2 k + 1) for k = 15 .. 0.
__device__ constexpr double LOG1P_TERMS[16] = {
    2.0 / 31.0, 2.0 / 29.0, 2.0 / 27.0, 2.0 / 25.0, 2.0 / 23.0, 2.0 / 21.0, 2.0 / 19.0, 2.0 / 17.0,
    2.0 / 15.0, 2.0 / 13.0, 2.0 / 11.0, 2.0 / 9.0,  2.0 / 7.0,  2.0 / 5.0,  2.0 / 3.0,  2.0};

// e^t for t <= 0.
__device__ __forceinline__ double exp_of(double t) {
    t = t > EXP_MIN ? t : EXP_MIN;
    double shifted = __dadd_rn(__dmul_rn(t, LOG2_E), ROUND);
    double n = __dsub_rn(shifted, ROUND);
    double r = __dsub_rn(__dsub_rn(t, __dmul_rn(n, LN2_HIGH)), __dmul_rn(n, LN2_LOW));
    double p = EXP_TERMS[0];
#pragma unroll
    for (int k = 1; k < 14; ++k) p = __dadd_rn(__dmul_rn(p, r), EXP_TERMS[k]);
    // The low bits of `shifted` hold n in two's complement: n + 1023 moved up is the float64 2^n.
    uint64 power = static_cast<uint64>(__double_as_longlong(shifted) + EXPONENT_BIAS) << FRACTION_BITS;
    return __dmul_rn(p, __longlong_as_double(static_cast<int64>(power)));
}

__device__ __forceinline__ double magnitude_of(double t) { return t < 0.0 ? -t : t; }

__device__ __forceinline__ float sigmoid_of(float x) {
    double t = x;
    double z = exp_of(-magnitude_of(t));
    return __double2float_rn(__ddiv_rn(t >= 0.0 ? 1.0 : z, __dadd_rn(1.0, z)));
}

__device__ __forceinline__ float sqrtsoftplus_of(float x) {
    double t = x;
    double z = exp_of(-magnitude_of(t));
    double s = __ddiv_rn(z, __dadd_rn(2.0, z));
    double q = __dmul_rn(s, s);
    double p = LOG1P_TERMS[0];
#pragma unroll
    for (int k = 1; k < 16; ++k) p = __dadd_rn(__dmul_rn(p, q), LOG1P_TERMS[k]);
    double soft = __dadd_rn(t > 0.0 ? t : 0.0, __dmul_rn(s, p));
    return __double2float_rn(__dsqrt_rn(t > SOFTPLUS_LINEAR ? t : soft));
}

// NaN becomes -inf, +inf the largest float32.
__device__ __forceinline__ float clean(float x) {
    float largest = __uint_as_float(LARGEST);
    return x <= largest ? x : (x > largest ? largest : __uint_as_float(MINUS_INFINITY));
}

// An integer in the order of the float; -0 and 0 give the same.
__device__ __forceinline__ int32 ordered(float x) {
    int32 bits = __float_as_int(__fadd_rn(x, 0.0f));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ __forceinline__ float unordered(int32 order) {
    return __int_as_float(order ^ ((order >> 31) & 0x7fffffff));
}

}  // namespace pymoe
