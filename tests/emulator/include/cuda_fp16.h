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

struct __half2 { __half x, y; };
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half2 __hmul2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
inline __half2 __hsub2(__half2 a, __half2 b) {
    return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}
