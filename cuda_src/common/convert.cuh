// Number formats: what a code stands for, in registers, exactly as docs/numerics says.
#pragma once

#include "common/ptx.cuh"
#include "common/types.cuh"

namespace pymoe {

// Formats of operands.  Names as pymoe.quantization.QuantKey.dtype; the integers below 32 bits with a zero point of
// their own (given, or the middle) are U8 and U4; TF32 is float32 that may be rounded to its bits where it is multiplied.
enum class Format : int32 { kF32, kBF16, kFP16, kE4M3, kS8, kU8, kU4, kE2M1, kTF32 };

__host__ __device__ constexpr int32 bits_of(Format f) {
    return f == Format::kF32 || f == Format::kTF32      ? 32
           : f == Format::kBF16 || f == Format::kFP16   ? 16
           : f == Format::kU4 || f == Format::kE2M1     ? 4
                                                        : 8;
}

__device__ __forceinline__ uint32 bits(__half2 pair) { return *reinterpret_cast<uint32*>(&pair); }
__device__ __forceinline__ uint32 bits(__nv_bfloat162 pair) { return *reinterpret_cast<uint32*>(&pair); }
__device__ __forceinline__ __half2 as_half2(uint32 pair) { return *reinterpret_cast<__half2*>(&pair); }
__device__ __forceinline__ __nv_bfloat162 as_bfloat162(uint32 pair) {
    return *reinterpret_cast<__nv_bfloat162*>(&pair);
}

// The same number twice, in float16 or bfloat16; rounded where it does not fit.
template <Format kTo>
__device__ __forceinline__ uint32 twice(float x) {
    if constexpr (kTo == Format::kFP16) return bits(__float2half2_rn(x));
    return bits(__float2bfloat162_rn(x));
}

// Product and difference of pairs of float16 or bfloat16, one rounding each; subnormals count.
template <Format kTo>
__device__ __forceinline__ uint32 multiply_pairs(uint32 x, uint32 y) {
    if constexpr (kTo == Format::kFP16) return bits(__hmul2(as_half2(x), as_half2(y)));
    return bits(__hmul2(as_bfloat162(x), as_bfloat162(y)));
}

template <Format kTo>
__device__ __forceinline__ uint32 subtract_pairs(uint32 x, uint32 y) {
    if constexpr (kTo == Format::kFP16) return bits(__hsub2(as_half2(x), as_half2(y)));
    return bits(__hsub2(as_bfloat162(x), as_bfloat162(y)));
}

__device__ __forceinline__ uint32 bf16_pair_of_fp16_pair(uint32 pair) {
    const float2 wide = __half22float2(as_half2(pair));
    return bits(__floats2bfloat162_rn(wide.x, wide.y));
}

// Four e4m3 codes as two pairs of float16, exact, the lower codes in `low`.
__device__ __forceinline__ void fp16_pairs_of_e4m3(uint32 codes, uint32& low, uint32& high) {
#if __CUDA_ARCH__ >= 890
    ptx::cvt_f16x2_e4m3x2_twice(codes, low, high);
#else
    // Exponent and fraction move to their places 2^8 too small; 0x7F and 0xFF get the exponent of NaN.
    const uint32 apart[2] = {__byte_perm(codes, 0, 0x4140), __byte_perm(codes, 0, 0x4342)};
    uint32 pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32 nan = ((apart[i] & 0x007F007Fu) + 0x00010001u) & 0x00800080u;
        const uint32 small = ((apart[i] & 0x00800080u) << 8) | ((apart[i] & 0x007F007Fu) << 7) | (nan << 7);
        pairs[i] = multiply_pairs<Format::kFP16>(small, 0x5C005C00u);
    }
    low = pairs[0], high = pairs[1];
#endif
}

template <Format kTo>
__device__ __forceinline__ void decode_e4m3x4(uint32 codes, uint32& low, uint32& high) {
    fp16_pairs_of_e4m3(codes, low, high);
    if constexpr (kTo == Format::kBF16) {
        low = bf16_pair_of_fp16_pair(low);
        high = bf16_pair_of_fp16_pair(high);
    }
}

// What `decode_u8x4` and `decode_u4x8` subtract for the zero point z; the sums are exact.
template <Format kFrom, Format kTo>
__device__ __forceinline__ uint32 zero_point_word(float z) {
    if constexpr (kFrom == Format::kU8 && kTo == Format::kBF16) return __float_as_uint(8388608.0f + z);
    if constexpr (kTo == Format::kBF16) return twice<kTo>(128.0f + z);
    return twice<kTo>(1024.0f + z);
}

// Four unsigned bytes less their zero point.  A byte in the low bits of 1024 (float16) or 2^23 (float32) is that sum.
template <Format kTo>
__device__ __forceinline__ void decode_u8x4(uint32 codes, uint32 zero, uint32& low, uint32& high) {
    if constexpr (kTo == Format::kFP16) {
        low = subtract_pairs<kTo>(__byte_perm(codes, 0x64646464u, 0x4140), zero);
        high = subtract_pairs<kTo>(__byte_perm(codes, 0x64646464u, 0x4342), zero);
    } else {
        const float z = __uint_as_float(zero);
        const float x0 = __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7440)) - z;
        const float x1 = __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7441)) - z;
        const float x2 = __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7442)) - z;
        const float x3 = __uint_as_float(__byte_perm(codes, 0x4B000000u, 0x7443)) - z;
        low = bits(__floats2bfloat162_rn(x0, x1));
        high = bits(__floats2bfloat162_rn(x2, x3));
    }
}

// Nibbles 0 to 3 of `codes` at bits 0, 16, 8 and 24; other bits are garbage.
__device__ __forceinline__ uint32 spread_nibbles(uint32 codes) {
    return (codes & 0x00000F0Fu) | ((codes << 12) & ~0x00000F0Fu);
}

// Eight unsigned nibbles less their zero point, as four pairs in ascending order.
template <Format kTo>
__device__ __forceinline__ void decode_u4x8(uint32 codes, uint32 zero, uint32 (&pairs)[4]) {
    constexpr uint32 kMagic = kTo == Format::kFP16 ? 0x64006400u : 0x43004300u;  // 1024 or 128, whose last place is 1
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32 spread = spread_nibbles(codes >> (8 * i));
        pairs[i] = subtract_pairs<kTo>((spread & 0x000F000Fu) | kMagic, zero);
        pairs[i + 1] = subtract_pairs<kTo>(((spread >> 8) & 0x000F000Fu) | kMagic, zero);
    }
}

// Eight e2m1 as four pairs.  Exponent and fraction move to their places, 2^14 or 2^126 too small, which keeps the
// subnormal code 0.5 in step with the others.
template <Format kTo>
__device__ __forceinline__ void decode_e2m1x8(uint32 codes, uint32 (&pairs)[4]) {
    constexpr bool kHalf = kTo == Format::kFP16;
    constexpr uint32 kMask = kHalf ? 0x0E000E00u : 0x01C001C0u;
    constexpr uint32 kFactor = kHalf ? 0x74007400u : 0x7E807E80u;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32 spread = spread_nibbles(codes >> (8 * i));
        const uint32 first = ((spread << (kHalf ? 9 : 6)) & kMask) | ((spread << 12) & 0x80008000u);
        const uint32 second = ((kHalf ? spread << 1 : spread >> 2) & kMask) | ((spread << 4) & 0x80008000u);
        pairs[i] = multiply_pairs<kTo>(first, kFactor);
        pairs[i + 1] = multiply_pairs<kTo>(second, kFactor);
    }
}

// The power of two that the e8m0 byte `code` stands for; 255 is NaN.
__device__ __forceinline__ float float_of_e8m0(uint32 code) {
    return __uint_as_float(code == 0 ? 1u << 22 : code == 255 ? 0x7FC00000u : code << 23);
}

__device__ __forceinline__ float float_of_e4m3(uint32 code) {
    uint32 low, high;
    fp16_pairs_of_e4m3(code, low, high);
    return __half2float(__low2half(as_half2(low)));
}

__device__ __forceinline__ float float_of_e2m1(uint32 code) {
    // 2^126 times the subnormal that exponent and fraction are in place.
    const float size = __uint_as_float((code & 7u) << 22) * 8.507059173023462e37f;
    return code & 8u ? -size : size;
}

// Element `i` of an array in any format, exact in float32; U8 and U4 without their zero point.
__device__ __forceinline__ float read_element(const void* array, int64 i, Format format) {
    const uint8* bytes = static_cast<const uint8*>(array);
    switch (format) {
        case Format::kF32:
        case Format::kTF32: return static_cast<const float*>(array)[i];
        case Format::kBF16: return __bfloat162float(static_cast<const bf16*>(array)[i]);
        case Format::kFP16: return __half2float(static_cast<const fp16*>(array)[i]);
        case Format::kE4M3: return float_of_e4m3(bytes[i]);
        case Format::kS8: return static_cast<float>(static_cast<const int8*>(array)[i]);
        case Format::kU8: return static_cast<float>(bytes[i]);
        case Format::kU4: return static_cast<float>((bytes[i >> 1] >> (4 * (i & 1))) & 15);
        case Format::kE2M1: return float_of_e2m1((bytes[i >> 1] >> (4 * (i & 1))) & 15);
    }
    return 0;
}

// The same as a call, where the formats inlined many times over would be most of a kernel's code.
__device__ __noinline__ float read_element_apart(const void* array, int64 i, Format format) {
    return read_element(array, i, format);
}

// Scales are float32, e8m0 or e4m3.  Reading one and making it a number are two steps, so that the arithmetic need not
// wait for the memory at once.
enum class ScaleFormat : int32 { kF32, kE8M0, kE4M3 };

__device__ __forceinline__ uint32 scale_bits(const void* array, int64 i, ScaleFormat format) {
    if (format == ScaleFormat::kF32) return __ldg(static_cast<const uint32*>(array) + i);
    return __ldg(static_cast<const uint8*>(array) + i);
}

__device__ __forceinline__ float scale_value(uint32 bits, ScaleFormat format) {
    if (format == ScaleFormat::kF32) return __uint_as_float(bits);
    return format == ScaleFormat::kE8M0 ? float_of_e8m0(bits) : float_of_e4m3(bits);
}

__device__ __noinline__ float read_scale_apart(const void* array, int64 i, ScaleFormat format) {
    return scale_value(scale_bits(array, i, format), format);
}

// Stores round once, to nearest even.
__device__ __forceinline__ void write_element(void* array, int64 i, Format format, float x) {
    if (format == Format::kF32) static_cast<float*>(array)[i] = x;
    if (format == Format::kBF16) static_cast<bf16*>(array)[i] = __float2bfloat16_rn(x);
    if (format == Format::kFP16) static_cast<fp16*>(array)[i] = __float2half_rn(x);
}

// Four neighbours at once; `i` and the array are multiples of four elements.
__device__ __forceinline__ void write_four(void* array, int64 i, Format format, const float (&x)[4]) {
    if (format == Format::kF32) {
        *reinterpret_cast<float4*>(static_cast<float*>(array) + i) = make_float4(x[0], x[1], x[2], x[3]);
    } else if (format == Format::kBF16) {
        *reinterpret_cast<uint2*>(static_cast<bf16*>(array) + i) =
            make_uint2(bits(__floats2bfloat162_rn(x[0], x[1])), bits(__floats2bfloat162_rn(x[2], x[3])));
    } else {
        *reinterpret_cast<uint2*>(static_cast<fp16*>(array) + i) =
            make_uint2(bits(__floats2half2_rn(x[0], x[1])), bits(__floats2half2_rn(x[2], x[3])));
    }
}

}  // namespace pymoe
