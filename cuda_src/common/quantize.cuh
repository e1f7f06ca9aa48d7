// Scales of groups and codes of elements: pymoe/ops/quantize/_rules.py and pymoe/codec/, operation for operation.
//
// float32 arithmetic of single IEEE operations, division included; exponents come from the bits.
#pragma once

#include "common/elements.cuh"
#include "common/ptx.cuh"

namespace pymoe {

constexpr uint32 MAGNITUDE = 0x7fffffffu, INFINITY_BITS = 0x7f800000u, LARGEST_BITS = 0x7f7fffffu;
constexpr uint32 NAN_BITS = 0x7fc00000u;
constexpr float FLT_MIN_NORMAL = 1.1754943508222875e-38f, FLT_MAX_FINITE = 3.4028234663852886e38f;
constexpr float TINY_AMAX = 1e-10f, TINY_RANGE = 1e-5f;
constexpr float TOKEN_FLOOR = 1.0f / (448.0f * 512.0f);
constexpr int E8M0_NAN = 255;

// How the scale of a group follows from its extremes.
enum ScaleRule {
    GIVEN,
    FP8_FLOORED,   // a tensor, and static schemes
    FP8_TOKEN,
    FP8_GROUP,
    INT8_FLOORED,
    INT8_TENSOR,
    INT8_GROUP,    // and tokens
    MX_FP8,
    MX_FP4,
    NVFP4_DYNAMIC,
    NVFP4_STATIC,
    INTEGER,       // weight-only, symmetric
    INTEGER_ZERO   // weight-only, with zero points
};
// How a scaled element becomes a code.
enum Code { E4M3, E2M1, RINT, AWAY, TRUNC };
// How a scale is stored: OVER_GLOBAL is the float32 quotient of nvfp4's two scales.
enum Storage { FLOAT32, E8M0, E4M3_BYTE, OVER_GLOBAL };

// One way to quantize; _cuda.py packs it from a QuantKey.
struct Recipe {
    int rule, code, storage;
    int divides;  // whether the factor divides an element, else it multiplies
    int poisons;  // whether a NaN makes the scale of its group NaN
    int low, high, middle;  // of integer codes, and the code of zero
    int packed;   // two codes a byte
};

// What is stored for a group, and what an element meets.
struct Scaled {
    float stored;
    uint8 byte;
    float factor;
    float offset;
};

__device__ __forceinline__ bool is_nan(float x) { return x != x; }

// As numpy.maximum: NaN stays.
__device__ __forceinline__ float larger(float a, float b) { return is_nan(a) ? a : (a > b ? a : b); }

__device__ __forceinline__ float decode_e8m0(int code) {
    return __uint_as_float(code == 0 ? 1u << 22 : code == E8M0_NAN ? NAN_BITS : static_cast<uint32>(code) << 23);
}

// The smallest power of two that is at least x >= 0.
__device__ __forceinline__ int encode_e8m0_ceil(float x) {
    uint32 bits = __float_as_uint(x);
    if (bits > INFINITY_BITS) return E8M0_NAN;
    if (bits <= 1u << 22) return 0;
    return min(static_cast<int>(bits >> 23) + ((bits & 0x7fffffu) != 0), 254);
}

__device__ __forceinline__ float inverse_power(int code) { return decode_e8m0(code == E8M0_NAN ? code : 254 - code); }

// Nearest code, ties to even; beyond 448 it is 448, NaN of either sign 0x7f.
__device__ __forceinline__ uint8 encode_e4m3(float x) {
    uint32 bits = __float_as_uint(x), size = bits & MAGNITUDE, sign = (bits >> 24) & 0x80u;
    if (size > INFINITY_BITS) return 0x7f;
    // Below 2^-6 the code counts steps of 2^-9, which the sum with 2^14 leaves in its last bits.
    if (size < 0x3c800000u)
        return static_cast<uint8>((__float_as_uint(__fadd_rn(__uint_as_float(size), 16384.0f)) - 0x46800000u) | sign);
    uint32 capped = min(size, 0x43e00000u);
    return static_cast<uint8>((((capped + 0x7ffffu + ((capped >> 20) & 1u)) >> 20) - 960u) | sign);
}

// The codes of two neighbours, the first in the low byte.
__device__ __forceinline__ uint32 encode_e4m3_pair(float first, float second) {
#if __CUDA_ARCH__ >= 890
    return ptx::cvt_e4m3x2(second, first);
#else
    return encode_e4m3(first) | static_cast<uint32>(encode_e4m3(second)) << 8;
#endif
}

__device__ __forceinline__ float decode_e4m3(int code) {
    uint32 sign = static_cast<uint32>(code & 0x80) << 24, size = code & 0x7f;
    if (size == 0x7f) return __uint_as_float(NAN_BITS);
    // Shifted into place the exponent is 120 too small, subnormal codes included.
    return __fmul_rn(__uint_as_float(sign | size << 20), __uint_as_float((127u + 120u) << 23));
}

// Nearest code of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to even; beyond 6 it is 6, NaN 0.
__device__ __forceinline__ uint32 encode_e2m1(float x) {
    uint32 bits = __float_as_uint(x), size = bits & MAGNITUDE, sign = (bits >> 28) & 8u;
    if (size > INFINITY_BITS) return 0;
    if (size < 0x3f800000u)  // below 1 in steps of 0.5, which the sum with 2^22 leaves in its last bits
        return (__float_as_uint(__fadd_rn(__uint_as_float(size), 4194304.0f)) - 0x4a800000u) | sign;
    uint32 capped = min(size, 0x40c00000u);
    return (((capped + 0x1fffffu + ((capped >> 22) & 1u)) >> 22) - 252u) | sign;
}

__device__ __forceinline__ float decode_e2m1(uint32 code) {
    uint32 size = code & 7u;
    float value = size < 2 ? 0.5f * size : __uint_as_float((size + 252u) << 22);
    return (code & 8u) != 0 ? -value : value;
}

__device__ __forceinline__ int encode_integer(float y, float offset, const Recipe& recipe) {
    if (is_nan(y)) return static_cast<int>(offset);
    float whole;
    if (recipe.code == RINT) {
        whole = rintf(y);
    } else {
        whole = truncf(y);
        // y - trunc(y) is exact, where y + 0.5 would round just below a half up.
        if (recipe.code == AWAY && fabsf(__fsub_rn(y, whole)) >= 0.5f) whole = __fadd_rn(whole, copysignf(1.0f, y));
    }
    float code = __fadd_rn(whole, offset);
    return static_cast<int>(fminf(fmaxf(code, static_cast<float>(recipe.low)), static_cast<float>(recipe.high)));
}

__device__ __forceinline__ float scaled(float x, float factor, int divides) {
    return divides ? __fdiv_rn(x, factor) : __fmul_rn(x, factor);
}

// The bits of |x| as they enter the largest of a group: in their order, NaN on top where it poisons, else left out.
__device__ __forceinline__ uint32 size_bits(float x, int poisons) {
    uint32 size = __float_as_uint(x) & MAGNITUDE;
    return size > INFINITY_BITS && !poisons ? 0u : size;
}

// The largest magnitude from its bits: NaN, or finite.
__device__ __forceinline__ float magnitude_from(uint32 size) {
    return __uint_as_float(size > INFINITY_BITS ? NAN_BITS : min(size, LARGEST_BITS));
}

__device__ __forceinline__ float floored(float amax, float largest) {
    return amax == 0.0f ? 1.0f : larger(__fdiv_rn(amax, largest), FLT_MIN_NORMAL);
}

__device__ __forceinline__ Scaled fp8_scale(float scale, const Recipe& recipe) {
    if (recipe.storage == E8M0) {
        int code = encode_e8m0_ceil(scale);
        return {0.0f, static_cast<uint8>(code), inverse_power(code), 0.0f};
    }
    return {scale, 0, recipe.divides ? scale : __fdiv_rn(1.0f, scale), 0.0f};
}

// Power of two of the exponent of amax less `exponent`, one more if its mantissa is above `threshold`.
__device__ __forceinline__ Scaled mx_scale(float amax, int exponent, uint32 threshold) {
    uint32 bits = __float_as_uint(amax);
    int power = static_cast<int>(bits >> 23) - exponent + ((bits & 0x7fffffu) > threshold);
    int code = is_nan(amax) ? E8M0_NAN : min(max(power, 0), 254);
    return {0.0f, static_cast<uint8>(code), inverse_power(code), 0.0f};
}

__device__ __forceinline__ Scaled nvfp4_scale(float amax, float global, bool is_static, const Recipe& recipe) {
    float sixth = __fdiv_rn(amax, 6.0f);
    uint8 code = encode_e4m3(is_static ? __fdiv_rn(sixth, global) : __fmul_rn(global, sixth));
    float block = decode_e4m3(code);
    float over = __fdiv_rn(block, global);
    float step = is_static ? __fmul_rn(block, global) : over;
    return {over, code, block == 0.0f ? 0.0f : __fdiv_rn(1.0f, step), 0.0f};
}

__device__ __forceinline__ Scaled integer_scale(float low, float high, const Recipe& recipe) {
    if (recipe.rule == INTEGER) {
        float half = static_cast<float>(recipe.middle);
        float scale = larger(__fdiv_rn(high, half - 1.0f), __fdiv_rn(-low, half));
        scale = scale == 0.0f ? 1.0f : larger(scale, FLT_MIN_NORMAL);
        return {scale, 0, scale, half};
    }
    float last = static_cast<float>(recipe.high), range = __fsub_rn(high, low);
    if (!is_nan(range)) range = fminf(fmaxf(range, TINY_RANGE), FLT_MAX_FINITE);
    float scale = __fdiv_rn(range, last);
    float offset = rintf(__fdiv_rn(-low, scale));
    offset = is_nan(offset) ? 0.0f : fminf(fmaxf(offset, 0.0f), last);
    return {scale, static_cast<uint8>(offset), scale, offset};
}

// The scale of a group whose elements lie in low <= 0 <= high: finite, or NaN where the group is poisoned.
__device__ __forceinline__ Scaled scale_of(const Recipe& recipe, float low, float high, float global) {
    float amax = fabsf(larger(-low, high));
    Scaled found = {};
    switch (recipe.rule) {
        case FP8_FLOORED: return fp8_scale(floored(amax, 448.0f), recipe);
        case FP8_TOKEN: return fp8_scale(larger(__fdiv_rn(amax, 448.0f), TOKEN_FLOOR), recipe);
        case FP8_GROUP: return fp8_scale(__fdiv_rn(larger(amax, TINY_AMAX), 448.0f), recipe);
        case MX_FP8: return mx_scale(amax, 8, 0x600000u);
        case MX_FP4: return mx_scale(amax, 2, 0x5fffffu);
        case NVFP4_DYNAMIC: return nvfp4_scale(amax, global, false, recipe);
        case NVFP4_STATIC: return nvfp4_scale(amax, global, true, recipe);
        case INT8_FLOORED: found.stored = floored(amax, 127.0f); break;
        case INT8_TENSOR: found.stored = larger(__fdiv_rn(amax, 127.0f), TINY_AMAX); break;
        case INT8_GROUP:
            amax = larger(amax, TINY_AMAX);
            found.stored = __fdiv_rn(amax, 127.0f);
            break;
        default: found = integer_scale(low, high, recipe); break;
    }
    found.factor = recipe.divides ? found.stored : __fdiv_rn(127.0f, amax);
    // One NaN for all: which bits arithmetic gives it is the machine's affair.
    if (is_nan(found.stored)) found.stored = __uint_as_float(NAN_BITS);
    return found;
}

__device__ __forceinline__ Scaled given_scale(const void* scales, int64 i, const Recipe& recipe) {
    if (recipe.storage == E8M0) {
        uint8 code = static_cast<const uint8*>(scales)[i];
        return {0.0f, code, __fdiv_rn(1.0f, decode_e8m0(code)), 0.0f};
    }
    float scale = static_cast<const float*>(scales)[i];
    return {scale, 0, recipe.divides ? scale : __fdiv_rn(1.0f, scale), static_cast<float>(recipe.middle)};
}

__device__ __forceinline__ void store_scale(void* scales, int64 i, const Scaled& s, const Recipe& recipe) {
    if (recipe.storage == FLOAT32 || recipe.storage == OVER_GLOBAL)
        static_cast<float*>(scales)[i] = s.stored;
    else
        static_cast<uint8*>(scales)[i] = s.byte;
}

}  // namespace pymoe
