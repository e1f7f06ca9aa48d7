// The stable counting sort of routed slots by local expert: the parts that one block and many blocks share.
//
// A warp owns a run of consecutive slots and walks it 32 at a time.  Lanes with the same expert find each other by votes
// on the bits of its number (a match instruction takes longer), and the lanes before a lane among them are its rank; a
// 16-bit counter a warp and expert carries the rank from step to step.  So a slot's place depends on the ids alone.
#pragma once

#include "common/elements.cuh"
#include "common/even_tiles.cuh"
#include "common/scan.cuh"

namespace pymoe {

constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;
constexpr uint32 NOWHERE = 0xffffu;  // local expert of a slot without a row, in 16 bits

// Where the rows of the experts stand.
enum Layout {
    PACKED,  // one after the other
    PADDED,  // each from a multiple of the tile on
    SLABS    // each from a multiple of slab_rows on; a token that names an expert twice has one row there
};

// Whose a slot is.
struct Routing {
    const void* ids;
    int ids_kind;
    const int32* expert_map;  // null: ids are local
    int ids_end;              // ids are below it
    int E;
    int topk;

    // The local expert of slot s, -1 for none; only legal ids become an index.
    __device__ __forceinline__ int expert_of(int64 s) const {
        // int32, which routing gives, first: the others cost a jump.
        int64 id = ids_kind == 4 ? static_cast<const int32*>(ids)[s] : load_integer(ids, s, ids_kind);
        if (id < 0 || id >= ids_end) return -1;
        int local = expert_map == nullptr ? static_cast<int>(id) : expert_map[id];
        return local >= 0 && local < E ? local : -1;
    }

    // Whether an earlier slot of the token has the same expert.
    __device__ __forceinline__ bool repeats(int64 s, int local) const {
        for (int64 other = s / topk * topk; other < s; ++other)
            if (expert_of(other) == local) return true;
        return false;
    }
};

// The lanes whose `value`, of `bits` bits, is this lane's.
__device__ __forceinline__ unsigned lanes_with(uint32 value, int bits) {
    unsigned same = FULL;
    for (int b = 0; b < bits; ++b) {
        bool set = (value >> b & 1u) != 0;
        unsigned vote = __ballot_sync(FULL, set);
        same &= set ? vote : ~vote;
    }
    return same;
}

// Slots of a warp's run: 32 times a power of two, so that a shift tells whose a slot is.
__device__ __forceinline__ int run_shift(int count, int warps) {
    int shift = 5;
    while (warps << shift < count) ++shift;
    return shift;
}

// Counts the slots [first, first + count) by warp and expert into hist (warps, E) and notes, for each of them, its rank
// within its warp and its expert in `state`.  `warps` warps of the block work; hist is 0 before.  Ends with a barrier.
template <Layout LAYOUT>
__device__ void rank_slots(uint16* hist, uint32* state, const Routing& routing, int64 first, int count, int warps) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int run = 1 << run_shift(count, warps);
    int bits = 32 - __clz(routing.E);  // numbers 0 .. E, where E stands for none
    if (warp < warps) {
        uint16* mine = hist + warp * routing.E;
        int stop = min((warp + 1) * run, count);
        auto expert_at = [&](int i) {
            int local = i < stop ? routing.expert_of(first + i) : -1;
            if (LAYOUT == SLABS && local >= 0 && routing.repeats(first + i, local)) local = -1;
            return local;
        };
        int next = expert_at(warp * run + lane);
        for (int i = warp * run + lane; i - lane < stop; i += WARP) {
            int local = next;
            next = expert_at(i + WARP);  // on its way while this step is ranked
            unsigned same = lanes_with(local < 0 ? routing.E : local, bits);
            unsigned before = same & ((1u << lane) - 1);
            int rank = 0;
            if (local >= 0) rank = mine[local] + __popc(before);
            __syncwarp();
            if (local >= 0 && before == 0) mine[local] = static_cast<uint16>(rank + __popc(same));
            __syncwarp();
            if (i < stop) state[i] = static_cast<uint32>(rank) << 16 | (static_cast<uint32>(local) & NOWHERE);
        }
    }
    __syncthreads();
}

// Turns counts by warp into sums over the warps before, and writes the sum over all to totals (E), if wanted.
__device__ __forceinline__ void sum_warps(int32* totals, uint16* hist, int E, int warps) {
    constexpr int AHEAD = 8;  // loads in flight; the sum alone would wait for each
    // Neighbouring lanes share an expert, each a run of the warps.
    int shift = 0;
    while (shift < 5 && 1 << shift < warps && E << (shift + 1) <= static_cast<int>(blockDim.x)) ++shift;
    int parts = 1 << shift, part = threadIdx.x & (parts - 1), run = (warps + parts - 1) >> shift;
    int first = min(part * run, warps), last = min(first + run, warps);
    int step = blockDim.x >> shift;
    for (int base = 0; base < E; base += step) {
        int e = base + (threadIdx.x >> shift);
        int sum = 0;
        if (e < E) {
#pragma unroll AHEAD
            for (int w = first; w < last; ++w) sum += hist[w * E + e];
        }
        int running = sum;
        for (int by = 1; by < parts; by *= 2) {
            int below = __shfl_up_sync(FULL, running, by);
            if (part >= by) running += below;
        }
        if (e >= E) continue;
        if (part == parts - 1 && totals != nullptr) totals[e] = running;
        running -= sum;
        for (int w = first; w < last; w += AHEAD) {
            int here[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) here[i] = w + i < last ? hist[(w + i) * E + e] : 0;
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (w + i < last) hist[(w + i) * E + e] = static_cast<uint16>(running);
                running += here[i];
            }
        }
    }
}

// Writes the places of the slots [first, first + count); base (E) is the row of an expert's first slot among them.
// row_to_slot may be shared memory.
template <Layout LAYOUT>
__device__ void place_slots(int32* row_to_slot, int32* slot_to_row, const int32* base, const uint16* hist,
                            const uint32* state, const Routing& routing, int64 first, int count, int warps,
                            int slab_rows) {
    int shift = run_shift(count, warps);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        uint32 local = state[i] & NOWHERE;
        int64 s = first + i;
        if (local == NOWHERE) {
            // A repeated slot of the slab layout is written by the first of its kind.
            if (slot_to_row != nullptr && (LAYOUT != SLABS || routing.expert_of(s) < 0)) slot_to_row[s] = -1;
            continue;
        }
        int32 row = base[local] + hist[(i >> shift) * routing.E + local] + static_cast<int32>(state[i] >> 16);
        if (LAYOUT == SLABS) {
            if (row - static_cast<int32>(local) * slab_rows >= slab_rows) row = -1;
            int64 end = (s / routing.topk + 1) * routing.topk;
            for (int64 other = s + 1; other < end; ++other)
                if (routing.expert_of(other) == static_cast<int>(local)) slot_to_row[other] = row;
            slot_to_row[s] = row;
        } else if (LAYOUT == PADDED) {
            row_to_slot[row] = static_cast<int32>(s);
            if (slot_to_row != nullptr) slot_to_row[s] = static_cast<int32>(s);
        } else {
            row_to_slot[row] = static_cast<int32>(s);
            slot_to_row[s] = row;
        }
    }
}

// What a sort leaves for its readers; see the kernels for the shapes.
struct Sorted {
    int32* offsets;      // PACKED: (E + 1,); SLABS: (E,) rows of each slab, or null; PADDED: unused
    int4* tiles;         // PACKED, SLABS: (capacity,)
    int32* tile_experts; // PADDED: (tiles,), -1 in the unused tail
    int32* tile_count;   // (1,); PADDED: in rows
    const int32* labels; // PADDED: what to call expert e, or null for e
    int tile_capacity;   // PADDED: length of tile_experts
    int tile_rows;
    int slab_rows;
    int even;            // PACKED: tiles are those of common/even_tiles.cuh
};

// From the rows of each expert: the row each starts at (start, E), the list of tiles, and what else the layout promises.
// All threads of the block; counts, start and tile_start (E; even: 2 E) are shared memory.  Begins with a barrier.
template <Layout LAYOUT>
__device__ void lay_out(int32* start, int32* counts, int32* tile_start, int32* total_tiles, const Sorted& out, int E) {
    __syncthreads();
    const bool even = LAYOUT == PACKED && out.even;
    EvenSplit* splits = reinterpret_cast<EvenSplit*>(tile_start);
    if (even) {
        for (int e = threadIdx.x; e < E; e += blockDim.x) splits[e] = EvenSplit::of(counts[e], out.tile_rows);
        __syncthreads();
    }
    // One warp adds up: the others would only take its turns.
    if (threadIdx.x < WARP) {
        int each = (E + WARP - 1) / WARP;
        int first = min(static_cast<int>(threadIdx.x) * each, E), last = min(first + each, E);
        int shift = __ffs(out.tile_rows) - 1;
        bool is_power = 1 << shift == out.tile_rows;
        // Rows below, tiles above: one sum of both.
        auto both_of = [&](int e) {
            int rows = LAYOUT == SLABS ? min(counts[e], out.slab_rows) : counts[e];
            if (even) return static_cast<uint64>(splits[e].tiles()) << 32 | static_cast<uint32>(rows);
            uint32 most = static_cast<uint32>(rows + out.tile_rows - 1);
            uint32 tiles = is_power ? most >> shift : most / static_cast<uint32>(out.tile_rows);  // divisions are slow
            return static_cast<uint64>(tiles) << 32 | static_cast<uint32>(rows);
        };
        uint64 mine = 0, total;
        for (int e = first; e < last; ++e) mine += both_of(e);
        uint64 running = warp_exclusive_sum(mine, total);
        for (int e = first; e < last; ++e) {
            int32 rows = static_cast<int32>(running), tiles = static_cast<int32>(running >> 32);
            running += both_of(e);
            if (!even) tile_start[e] = tiles;
            start[e] = LAYOUT == PACKED ? rows : LAYOUT == PADDED ? tiles * out.tile_rows : e * out.slab_rows;
            if (LAYOUT == SLABS) counts[e] = min(counts[e], out.slab_rows);
        }
        if (threadIdx.x == 0) {
            int32 tiles = static_cast<int32>(total >> 32);
            *total_tiles = tiles;
            out.tile_count[0] = LAYOUT == PADDED ? tiles * out.tile_rows : tiles;
            if (LAYOUT == PACKED) out.offsets[E] = static_cast<int32>(total);
        }
    }
    __syncthreads();
    int tiles = *total_tiles;
    if (LAYOUT != PADDED && out.offsets != nullptr)
        for (int e = threadIdx.x; e < E; e += blockDim.x) out.offsets[e] = LAYOUT == PACKED ? start[e] : counts[e];
    if (LAYOUT == PADDED) {
        for (int t = threadIdx.x; t < out.tile_capacity; t += blockDim.x) {
            int e = t < tiles ? last_at_most(tile_start, E, t) : -1;
            out.tile_experts[t] = e < 0 || out.labels == nullptr ? e : out.labels[e];
        }
    } else if (even) {
        list_even_tiles(out.tiles, tiles, splits, tile_start + E, E,
                        [&](int e) { return start[e]; }, [&](int e) { return counts[e]; });
    } else {
        for (int t = threadIdx.x; t < tiles; t += blockDim.x) {
            int e = last_at_most(tile_start, E, t);
            int done = (t - tile_start[e]) * out.tile_rows;
            out.tiles[t] = make_int4(e, start[e] + done, min(counts[e] - done, out.tile_rows), 0);
        }
    }
}

}  // namespace pymoe
