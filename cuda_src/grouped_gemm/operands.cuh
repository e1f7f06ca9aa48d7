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

// kRows rows of kDepth elements in shared memory: sub-tiles of 64 k (32 of 32 bits), rows of a sub-tile one after the other, 16-byte
// chunks of a row exchanged so that no two threads of a load meet in a bank.  kMatrix: read by ldmatrix.
template <Format kFormat, int kRows, int kDepth, bool kMatrix>
struct OperandTile {
    static constexpr int kBits = bits_of(kFormat);
    static constexpr bool kByMatrix = kMatrix;
    static constexpr int kRowBytes = kDepth * kBits / 8;
    static constexpr int kBytes = kRows * kRowBytes;
    static constexpr int kChunks = kRowBytes / 16;          // of a row
    static constexpr int kSubPitch = kBits == 32 ? 128 : 64 * kBits / 8;  // bytes of a row of a sub-tile
    static constexpr int kSubChunks = kSubPitch / 16;

    // What the place of a chunk in row `row` of its sub-tile is exchanged by.
    static __device__ __forceinline__ int32 exchange(int32 row) {
        if constexpr (kMatrix) return kBits >= 16 ? row & 7 : row >> 1 & 3;
        if constexpr (kBits == 16) return (row & 1) << 2;
        if constexpr (kBits == 8) return (row >> 1 & 1) << 1;
        return row >> 2 & 1;
    }

    // Byte at which a row of a sub-tile starts.  Rows of odd sub-tiles change places with a neighbour, so that a row of
    // 128 bytes that is written at once fills every bank although its halves are two sub-tiles.
    static __device__ __forceinline__ int32 row_offset(int32 row, int32 sub) {
        const int32 other = kBits == 8 ? 1 : kBits == 4 ? 2 : 0;
        return sub * (kRows * kSubPitch) + (row ^ (sub & 1) * other) * kSubPitch;
    }

    static __device__ __forceinline__ int32 offset(int32 row, int32 chunk) {
        return row_offset(row, chunk / kSubChunks) + ((chunk % kSubChunks) ^ exchange(row)) * 16;
    }

    // What `offset` grows by with `rows` more rows, a multiple of 8: exchanges look at the last bits of a row alone.
    static __device__ __forceinline__ int32 rows_further(int32 rows) { return rows * kSubPitch; }

    // The raw codes of row `first + row`, 32-k block `block`, for thread `c` of the four of the row: k = 8 c .. 8 c + 7,
    // or, where kSixteens, 4 c .. 4 c + 3 of each half (4-bit only).  `first` is a multiple of 8.
    template <bool kSixteens>
    static __device__ __forceinline__ void read(const uint8* tile, int32 first, int32 row, int32 block, int32 c,
                                                uint32 (&raw)[4]) {
        const int32 half = block & 1;
        const uint8* line = tile + rows_further(first) + row_offset(row, block >> 1);
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

// What a thread copies of an operand for every stage.  Every instruction counts here: a warp that copies does not
// multiply.
//
// kKeep: addresses stay in registers, which tiles of few rows have; else each is one product of the row's number, and
// nothing is remembered at all.  kZeros: rows may be missing (-1) and are zeros then, which saves their traffic.
template <class Tile, int kRows, int kThreads, bool kKeep, bool kZeros>
struct OperandCopy {
    static constexpr int kChunks = Tile::kChunks, kPasses = (kRows * kChunks + kThreads - 1) / kThreads;
    static constexpr int kRowsAtOnce = kThreads / kChunks;

    const uint8* from[kKeep ? kPasses : 1];
    bool there[kZeros ? kPasses : 1];

    // `base` is the first row, `rows` the numbers of the tile's rows.
    __device__ __forceinline__ void start(const uint8* base, const int32* rows, uint32 row_bytes) {
        if constexpr (kKeep) {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int32 row = is_mine(pass) ? rows[threadIdx.x / kChunks + pass * kRowsAtOnce] : 0;
                from[pass] = base + static_cast<uint64>(kZeros && row < 0 ? 0 : row) * row_bytes + threadIdx.x % kChunks * 16;
                if constexpr (kZeros) there[pass] = row >= 0;
            }
        }
    }

    static __device__ __forceinline__ bool is_mine(int pass) {
        return kRows * kChunks % kThreads == 0 || threadIdx.x / kChunks + pass * kRowsAtOnce < kRows;
    }

    // Starts the copy of columns `k`.. to the tile at `shared`; beyond the end of rows are zeros.
    __device__ __forceinline__ void fill(uint32 shared, int32 k, const uint8* base, const int32* rows,
                                         uint32 row_bytes) const {
        const int32 chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
        uint32 column = static_cast<uint32>(k) * Tile::kBits / 8;
        const bool inside = column + chunk * 16 < row_bytes;
        column = inside ? column : 0;
        const uint8* const start = kKeep ? nullptr : ptx::opaque(base + column + chunk * 16);
        // Where codes are decoded, registers and instructions are short; elsewhere the compiler does better by itself.
        constexpr bool kLinear = !Tile::kByMatrix && kRowsAtOnce % 8 == 0;
        const uint32 first = shared + Tile::offset(row, chunk);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            if (!is_mine(pass)) break;
            const uint32 to = kLinear ? first + Tile::rows_further(pass * kRowsAtOnce)
                                                   : shared + Tile::offset(row + pass * kRowsAtOnce, chunk);
            if constexpr (kKeep) {
                ptx::cp_async_16(to, from[pass] + column, inside && (!kZeros || there[kZeros ? pass : 0]));
            } else {
                const uint32 source = static_cast<uint32>(rows[row + pass * kRowsAtOnce]);
                ptx::cp_async_16(to, start + static_cast<uint64>(source) * row_bytes, inside);
            }
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
