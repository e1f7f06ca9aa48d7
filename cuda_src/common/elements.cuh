// Elements of arrays as float32 and back, one or several at a time; ids of any integer type as int64.
#pragma once

#include "common/types.cuh"

namespace pymoe {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return __double2float_rn(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename Elem>
__device__ __forceinline__ Elem from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}

// COUNT neighbours of an array, loaded and stored in accesses of up to 16 bytes.
template <typename Elem, int COUNT>
struct alignas(sizeof(Elem) * COUNT < 16 ? sizeof(Elem) * COUNT : 16) Pack {
    Elem at[COUNT];
};

// `kind` numbers the integer types: 2 * log2(bytes), plus 1 where it is unsigned.  An unsigned number beyond int64
// becomes negative, so it stays outside every range of ids.
__device__ __forceinline__ int64 load_integer(const void* numbers, int64 i, int kind) {
    switch (kind) {
        case 0: return static_cast<const int8*>(numbers)[i];
        case 1: return static_cast<const uint8*>(numbers)[i];
        case 2: return static_cast<const int16*>(numbers)[i];
        case 3: return static_cast<const uint16*>(numbers)[i];
        case 4: return static_cast<const int32*>(numbers)[i];
        case 5: return static_cast<const uint32*>(numbers)[i];
        default: return static_cast<const int64*>(numbers)[i];
    }
}

}  // namespace pymoe
