// Instructions for the emulator, in plain C++.
#pragma once

#include "common/types.cuh"

namespace pymoe::ptx {

inline void launch_dependents() {}
inline void wait_for_previous() {}

inline uint32 shared_address(const void* pointer) {
    return uint32(static_cast<const unsigned char*>(pointer) - emulator::shared_bytes());
}
inline uint32 dynamic_shared_bytes() { return emulator::dynamic_bytes; }
inline const uint8* opaque(const uint8* address) { return address; }
inline int32 afresh(int32 x) { return x; }

// As wrong as the instructions may be: in either direction, by the argument's own bits.
inline float estimate(double exact, float x) {
    const float nearest = float(exact);
    if (!std::isfinite(nearest) || std::fabs(nearest) < 0x1p-126f) return std::isfinite(nearest) ? copysignf(0, nearest) : nearest;
    const unsigned way = __float_as_uint(x) * 2654435761u >> 30;
    return way == 0 ? nearest : way == 1 ? __uint_as_float(__float_as_uint(nearest) - 1) : way == 2 ? __uint_as_float(__float_as_uint(nearest) + 1) : nearest;
}
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? copysignf(0, x) : x; }
// Of a mantissa of ones it is the nearest: so the compiler's own division needs it, which has but this estimate and four
// fused multiplies, and is right.
inline float rcp_approx(float x) {
    const double exact = 1.0 / double(flushed(x));
    return (__float_as_uint(x) & 0x7fffffu) == 0x7fffffu ? float(exact) : estimate(exact, x);
}
inline float rsqrt_approx(float x) { return estimate(1.0 / std::sqrt(double(flushed(x))), x); }

inline void red_add_f32(float* to, float x) { *to = flushed(flushed(*to) + flushed(x)); }
inline void red_add_f32x4(float* to, const float (&x)[4]) {
    if (reinterpret_cast<uintptr_t>(to) % 16) emulator::fail("an addition out of line");
    for (int i = 0; i < 4; ++i) red_add_f32(to + i, x[i]);
}

// Copies arrive when they are waited for, not before: what is read too early is what was there.
struct Copy {
    unsigned char* to;
    unsigned char bytes[16];
    int size;
};
struct Copies {
    long block = -1;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
inline Copies& copies() {
    static Copies all[1024];
    Copies& mine = all[emulator::current - emulator::fibers.data()];
    if (mine.block != emulator::blocks_run) mine = {emulator::blocks_run, {}, {}};
    return mine;
}
inline void cp_async(uint32 shared, const void* global, bool valid, int size) {
    if (shared % size || (valid && reinterpret_cast<uintptr_t>(global) % size)) emulator::fail("a copy out of line");
    Copy copy = {emulator::shared_bytes() + shared, {}, size};
    if (valid) std::memcpy(copy.bytes, global, size);
    copies().open.push_back(copy);
}
inline void cp_async_16(uint32 shared, const void* global, bool valid) { cp_async(shared, global, valid, 16); }
inline void cp_async_4(uint32 shared, const void* global, bool valid) { cp_async(shared, global, valid, 4); }
inline void cp_async_commit() {
    copies().groups.push_back(std::move(copies().open));
    copies().open.clear();
}
template <int kPending>
void cp_async_wait() {
    Copies& mine = copies();
    while (int(mine.groups.size()) > kPending) {
        for (const Copy& copy : mine.groups.front()) std::memcpy(copy.to, copy.bytes, copy.size);
        mine.groups.erase(mine.groups.begin());
    }
}

inline void ldmatrix_x4(uint32 (&r)[4], uint32 shared) {
    uint64_t lines[32];
    std::memcpy(lines, emulator::exchange(~0u, shared), sizeof lines);
    const int lane = emulator::current->lane;
    for (int i = 0; i < 4; ++i)
        std::memcpy(&r[i], emulator::shared_bytes() + lines[8 * i + lane / 4] + lane % 4 * 4, 4);
}
inline void ldmatrix_x4(uint32 (&r)[2][2], uint32 shared) {
    uint32 all[4];
    ldmatrix_x4(all, shared);
    std::memcpy(r, all, sizeof all);
}

// The sums of the tensor cores, in an order of our own: `number(register, i)` is element i of a register of `each`.
template <typename Sum, typename Number>
void mma(Sum (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], const Sum (&c)[4], int each, Number number) {
    uint64_t rows[4][32], columns[2][32];
    for (int i = 0; i < 4; ++i) std::memcpy(rows[i], emulator::exchange(~0u, a[i]), sizeof rows[i]);
    for (int i = 0; i < 2; ++i) std::memcpy(columns[i], emulator::exchange(~0u, b[i]), sizeof columns[i]);
    const int lane = emulator::current->lane, half = 4 * each;
    for (int i = 0; i < 4; ++i) {
        Sum sum = c[i];
        for (int k = 0; k < 2 * half; ++k) {
            const int source = k % half / each;
            const int row = lane / 4 * 4 + source, column = (lane % 4 * 2 + i % 2) * 4 + source;
            sum += number(uint32(rows[i / 2 + 2 * (k / half)][row]), k % each) *
                   number(uint32(columns[k / half][column]), k % each);
        }
        d[i] = sum;
    }
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], const float (&c)[4]) {
    mma(d, a, b, c, 2, [](uint32 pair, int i) { return __uint_as_float(pair >> 16 * i << 16); });
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    mma_m16n8k16_bf16(d, a, b, d);
}
inline void mma_m16n8k16_fp16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], const float (&c)[4]) {
    mma(d, a, b, c, 2, [](uint32 pair, int i) { return __half2float({(unsigned short)(pair >> 16 * i)}); });
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], const float (&c)[4]) {
    mma(d, a, b, c, 1, [](uint32 one, int) { return __uint_as_float(one & 0xFFFFE000u); });
}
inline uint32 cvt_rna_tf32(uint32 x) {
    return (x & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFFFFFu : (x + 0x1000u) & 0xFFFFE000u;
}
inline void mma_m16n8k32_s8(int32 (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], const int32 (&c)[4]) {
    mma(d, a, b, c, 4, [](uint32 four, int i) { return int32(int8(four >> 8 * i)); });
}

}  // namespace pymoe::ptx
