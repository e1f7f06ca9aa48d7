// float16 for the emulator.
#pragma once
struct __half { unsigned short bits; };
inline float __half2float(__half h) {
    _Float16 f;
    __builtin_memcpy(&f, &h.bits, 2);
    return float(f);
}
inline __half __float2half_rn(float f) {
    _Float16 h = _Float16(f);
    __half result;
    __builtin_memcpy(&result.bits, &h, 2);
    return result;
}
