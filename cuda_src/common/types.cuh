// Fixed-width names for device code: NVRTC has no <cstdint>, and every unit must mean the same by them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pymoe {

using int8 = signed char;
using uint8 = unsigned char;
using int16 = short;
using uint16 = unsigned short;
using int32 = int;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

using bf16 = __nv_bfloat16;
using fp16 = __half;

static_assert(sizeof(int32) == 4 && sizeof(int64) == 8 && sizeof(void*) == 8, "a 64-bit device");

// A CUtensorMap as a kernel parameter (const __grid_constant__); <cuda.h> has 1 MB of declarations around the same.
struct alignas(64) TensorMap {
    uint64 opaque[16];
};

}  // namespace pymoe
