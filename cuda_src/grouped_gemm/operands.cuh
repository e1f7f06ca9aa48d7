// Operands of a tensor-core tile: rows of global memory -> shared memory -> fragments of an mma.
//
// Codes that the mma multiplies as they are come by ldmatrix.  Codes that are decoded first cannot, since ldmatrix knows
// elements of the mma's own size only.  But the k of a sum may come in any order if both operands agree on it: there
// every 32 neighbours of k are dealt out by eights to the four threads that share a row of a fragment, so that whatever
// the format, a thread finds what it needs for two steps of 16 k in one piece of shared memory (16, 8 or 4 bytes).
// Either order is the same in every tile shape, and with it the bits of a row.
#pragma once

#include "common/convert.cuh"
#include "common/ptx.cuh"

namespace pymoe {

// kRows rows of kDepth elements in shared memory: sub-tiles of 64 k, rows of a sub-tile one after the other, 16-byte
// chunks of a row exchanged so that no two threads of a load meet in a bank.  kMatrix: read by ldmatrix.
template <Format kFormat, int kRows, int kDepth, bool kMatrix>
struct OperandTile {
    static constexpr int kBits = bits_of(kFormat);
    static constexpr int kRowBytes = kDepth * kBits / 8;
    static constexpr int kBytes = kRows * kRowBytes;
    static constexpr int kChunks = kRowBytes / 16;          // of a row
    static constexpr int kSubPitch = 64 * kBits / 8;        // bytes of a row of a sub-tile
    static constexpr int kSubChunks = kSubPitch / 16;

    // What the place of a chunk in row `row` of its sub-tile is exchanged by.
    static __device__ __forceinline__ int32 exchange(int32 row) {
        if constexpr (kMatrix) return kBits == 16 ? row & 7 : row >> 1 & 3;
        if constexpr (kBits == 16) return (row & 1) << 2;
        if constexpr (kBits == 8) return (row >> 1 & 1) << 1;
        return row >> 2 & 1;
    }

    static __device__ __forceinline__ int32 offset(int32 row, int32 chunk) {
        const int32 sub = chunk / kSubChunks, place = (chunk % kSubChunks) ^ exchange(row);
        return sub * (kRows * kSubPitch) + row * kSubPitch + place * 16;
    }

    // The raw codes of row `row`, 32-k block `block`, for thread `lane % 4` of the row: k = 8 c .. 8 c + 7, or, where
    // kSixteens, 4 c .. 4 c + 3 of each half (4-bit only).
    template <bool kSixteens>
    static __device__ __forceinline__ void read(const uint8* tile, int32 row, int32 block, int32 c, uint32 (&raw)[4]) {
        const int32 half = block & 1;
        const uint8* line = tile + (block >> 1) * (kRows * kSubPitch) + row * kSubPitch;
        if constexpr (kBits == 16) {
            const uint4 v = *reinterpret_cast<const uint4*>(line + (((half * 4 + c) ^ exchange(row)) * 16));
            raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
        } else if constexpr (kBits == 8) {
            const int32 place = ((half * 2) ^ exchange(row)) * 16 + c * 8;
            const uint2 v = *reinterpret_cast<const uint2*>(line + place);
            raw[0] = v.x, raw[1] = v.y;
        } else {
            const uint8* place = line + (half ^ exchange(row)) * 16;
            if constexpr (kSixteens) {
                raw[0] = *reinterpret_cast<const uint16*>(place + 2 * c) |
                         static_cast<uint32>(*reinterpret_cast<const uint16*>(place + 8 + 2 * c)) << 16;
            } else {
                raw[0] = *reinterpret_cast<const uint32*>(place + 4 * c);
            }
        }
    }
};

// What a thread copies of an operand for every stage.  kKeep: the addresses stay in registers, which few rows allow;
// else each is made anew from the row numbers in shared memory.
template <class Tile, int kRows, int kThreads, bool kKeep>
struct OperandCopy {
    static constexpr int kChunks = Tile::kChunks, kPasses = (kRows * kChunks + kThreads - 1) / kThreads;
    static constexpr int kRowsAtOnce = kThreads / kChunks;

    const uint8* base;
    const int32* rows;  // -1: zeros
    int64 row_bytes;
    const uint8* from[kKeep ? kPasses : 1];

    __device__ __forceinline__ void start(const void* base_, const int32* rows_, int64 row_bytes_) {
        base = static_cast<const uint8*>(base_), rows = rows_, row_bytes = row_bytes_;
        if constexpr (kKeep) {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int32 row = row_of(pass);
                const int32 source = row < kRows ? rows[row] : -1;
                from[pass] = source >= 0 ? base + source * row_bytes : nullptr;
            }
        }
    }

    static __device__ __forceinline__ int32 row_of(int pass) { return threadIdx.x / kChunks + pass * kRowsAtOnce; }

    // Starts the copy of columns `k`.. to the tile at `shared`; beyond the end of rows are zeros.
    __device__ __forceinline__ void fill(uint32 shared, int32 k) const {
        const int32 chunk = threadIdx.x % kChunks;
        const int64 column = static_cast<int64>(k) * Tile::kBits / 8 + chunk * 16;
        const bool inside = column < row_bytes;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int32 row = row_of(pass);
            if (kRows * kChunks % kThreads != 0 && row >= kRows) break;
            const uint8* line;
            if constexpr (kKeep) {
                line = from[pass];
            } else {
                const int32 source = rows[row];
                line = source >= 0 ? base + source * row_bytes : nullptr;
            }
            const bool valid = inside && line != nullptr;
            ptx::cp_async_16(shared + Tile::offset(row, chunk), valid ? line + column : base, valid);
        }
    }
};

// Raw codes as four pairs of kInto, two for each step of 16 k; `zero` is the zero point's word of unsigned integers.
template <Format kFrom, Format kInto>
__device__ __forceinline__ void decode(const uint32 (&raw)[4], uint32 zero, uint32 (&pairs)[4]) {
    if constexpr (kFrom == kInto) {
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = raw[i];
    } else if constexpr (kFrom == Format::kE4M3) {
        decode_e4m3x4<kInto>(raw[0], pairs[0], pairs[1]);
        decode_e4m3x4<kInto>(raw[1], pairs[2], pairs[3]);
    } else if constexpr (kFrom == Format::kU8) {
        decode_u8x4<kInto>(raw[0], zero, pairs[0], pairs[1]);
        decode_u8x4<kInto>(raw[1], zero, pairs[2], pairs[3]);
    } else if constexpr (kFrom == Format::kU4) {
        decode_u4x8<kInto>(raw[0], zero, pairs);
    } else {
        static_assert(kFrom == Format::kE2M1, "formats of operands");
        decode_e2m1x8<kInto>(raw[0], pairs);
    }
}

}  // namespace pymoe
