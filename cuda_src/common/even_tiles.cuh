// The work list of a kernel whose time follows the rows of a tile: an expert's rows in tiles of about as many, and the
// longest tiles first, so that blocks that take every so-manieth end at about the same time.
#pragma once

#include "common/types.cuh"

namespace pymoe {

// How `rows` rows are split: into as few tiles of at most tile_rows, a multiple of eight up to 504, as possible, of a
// multiple of eight rows but for the last.  In one word,
// which orders experts by the rows of their tiles: these by eight, of at most 63, above the number of tiles, below 2^26.
struct EvenSplit {
    static constexpr int kCountBits = 26;
    uint32 word;

    static __device__ __forceinline__ EvenSplit of(int32 rows, int32 tile_rows) {
        const uint32 tiles = (static_cast<uint32>(rows) + tile_rows - 1) / static_cast<uint32>(tile_rows);
        const uint32 each = tiles ? (static_cast<uint32>(rows) + tiles - 1) / tiles : 0;
        return {(each + 7) / 8 << kCountBits | tiles};
    }
    __device__ __forceinline__ int32 tiles() const { return word & ((1u << kCountBits) - 1); }
    __device__ __forceinline__ int32 rows() const { return word >> kCountBits << 3; }
    __device__ __forceinline__ bool is_longer(EvenSplit other) const {
        return word >> kCountBits > other.word >> kCountBits;
    }
};

// Writes the tiles {e, first row, rows, 0} of E experts, by all threads of a block of whole warps: splits (E), in shared
// memory, are those of their rows, first_of(e) and rows_of(e) these.  Experts of equally long tiles in their own order.
// places (E) is shared memory too.
template <class FirstOf, class RowsOf>
__device__ __forceinline__ void list_even_tiles(int4* tiles, int32 capacity, const EvenSplit* splits, int32* places,
                                                int32 E, FirstOf first_of, RowsOf rows_of) {
    for (int32 e = threadIdx.x; e < E; e += blockDim.x) {
        const EvenSplit mine = splits[e];
        int32 place = 0;
#pragma unroll 8
        for (int32 f = 0; f < E; ++f) {
            const EvenSplit other = splits[f];
            if (other.is_longer(mine) || (f < e && !mine.is_longer(other))) place += other.tiles();
        }
        places[e] = place;
    }
    __syncthreads();
    for (int32 e = threadIdx.x / 32; e < E; e += blockDim.x / 32) {
        const EvenSplit mine = splits[e];
        const int32 place = places[e], first = first_of(e), rows = rows_of(e);
        for (int32 i = threadIdx.x % 32; i < mine.tiles() && place + i < capacity; i += 32) {
            const int32 done = i * mine.rows();
            tiles[place + i] = make_int4(e, first + done, min(mine.rows(), rows - done), 0);
        }
    }
}

}  // namespace pymoe
