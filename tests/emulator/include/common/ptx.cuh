// Instructions for the emulator: none, so that kernels take the path of devices without them.
#pragma once

#include "common/types.cuh"

namespace pymoe::ptx {

inline void launch_dependents() {}
inline void wait_for_previous() {}

// The sums of the tensor cores, in an order of our own.
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    auto number = [](uint64_t pair, int half) { return __uint_as_float(uint32(pair) >> 16 * half << 16); };
    uint64_t rows[4][32], columns[2][32];
    for (int i = 0; i < 4; ++i) std::memcpy(rows[i], emulator::exchange(~0u, a[i]), sizeof rows[i]);
    for (int i = 0; i < 2; ++i) std::memcpy(columns[i], emulator::exchange(~0u, b[i]), sizeof columns[i]);
    int lane = emulator::current->lane;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            int source = k % 8 / 2;
            int row = lane / 4 * 4 + source, column = (lane % 4 * 2 + i % 2) * 4 + source;
            d[i] += number(rows[i / 2 + 2 * (k / 8)][row], k % 2) * number(columns[k / 8][column], k % 2);
        }
}

}  // namespace pymoe::ptx
