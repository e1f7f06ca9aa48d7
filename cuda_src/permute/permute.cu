// Permute: which rows each local expert computes, in which order; pymoe/ops/permute/_numpy.py defines them.
//
// Few slots: one block counts, adds up and places in shared memory, one launch.  Many: a block counts each segment of
// SEGMENT slots, one block adds up over segments and experts, and a block places each segment; three launches.
// The host learns nothing: arrays have room for the worst case, and live counts stay on the device.
#include "permute/sort.cuh"

namespace pymoe {

extern __shared__ unsigned char shared_memory[];

constexpr int SEGMENT = 2048;  // slots of a block where there are many; ranks within it fit 16 bits
constexpr int SCRATCH = 4;     // words in front of the arrays: the number of tiles

// The sizes of a sort; _cuda.py packs them.
struct Sizes {
    int S, topk, E;
    int ids_kind, ids_end;
    int warps;            // that rank slots
    int fill_count, fill; // PADDED, PACKED: length of row_to_slot and what its unused places hold
    int tile_capacity, tile_rows, slab_rows, even;
};

__device__ __forceinline__ Routing routing_of(const void* ids, const int32* expert_map, const Sizes& n) {
    return {ids, n.ids_kind, expert_map, n.ids_end, n.E, n.topk};
}

// Shared memory: 4 (SCRATCH + 4 E + S) + 2 warps E bytes, the parts rounded up to 16 bytes; PACKED: 4 S more.
template <Layout LAYOUT>
__global__ void __launch_bounds__(1024, 1)
    permute_kernel(int32* row_to_slot, int32* slot_to_row, int32* offsets, int4* tiles, int32* tile_experts,
                   int32* tile_count, const void* ids, const int32* expert_map, const int32* labels, Sizes n) {
    int32* total = reinterpret_cast<int32*>(shared_memory);
    int32 *counts = total + SCRATCH, *start = counts + n.E;
    int32* tile_start = start + n.E;
    uint4* zeros = reinterpret_cast<uint4*>(shared_memory + (4 * (SCRATCH + 4 * n.E) + 15) / 16 * 16);
    uint16* hist = reinterpret_cast<uint16*>(zeros);
    int words = (2 * n.warps * n.E + 15) / 16;
    uint32* state = reinterpret_cast<uint32*>(zeros + words);
    int32* staged = reinterpret_cast<int32*>(state + n.S);
    Routing routing = routing_of(ids, expert_map, n);
    for (int i = threadIdx.x; i < words; i += blockDim.x) zeros[i] = make_uint4(0, 0, 0, 0);
    if (LAYOUT == PADDED)
        for (int i = threadIdx.x; i < n.fill_count; i += blockDim.x) row_to_slot[i] = n.fill;
    __syncthreads();
    rank_slots<LAYOUT>(hist, state, routing, 0, n.S, n.warps);
    sum_warps(counts, hist, n.E, n.warps);
    Sorted out = {offsets, tiles, tile_experts, tile_count, labels, n.tile_capacity, n.tile_rows, n.slab_rows,
                  n.even};
    lay_out<LAYOUT>(start, counts, tile_start, total, out, n.E);
    // Scattered into shared memory and then copied: scattered stores leave a multiprocessor one at a time.
    place_slots<LAYOUT>(LAYOUT == PACKED ? staged : row_to_slot, slot_to_row, start, hist, state, routing, 0, n.S,
                        n.warps, n.slab_rows);
    if (LAYOUT == PACKED) {
        __syncthreads();
        int rows = n.E > 0 ? start[n.E - 1] + counts[n.E - 1] : 0;
        for (int i = threadIdx.x; i < n.S; i += blockDim.x) row_to_slot[i] = i < rows ? staged[i] : n.fill;
    }
}

// segment_counts (segments, E): the slots of each expert in each segment; also fills row_to_slot.
// Shared memory: 4 E bytes.
template <Layout LAYOUT>
__global__ void permute_count_kernel(int32* segment_counts, int32* row_to_slot, const void* ids,
                                     const int32* expert_map, Sizes n) {
    int32* counts = reinterpret_cast<int32*>(shared_memory);
    Routing routing = routing_of(ids, expert_map, n);
    for (int e = threadIdx.x; e < n.E; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    int64 first = static_cast<int64>(blockIdx.x) * SEGMENT;
    for (int i = threadIdx.x; i < SEGMENT && first + i < n.S; i += blockDim.x) {
        int local = routing.expert_of(first + i);
        if (local >= 0 && !(LAYOUT == SLABS && routing.repeats(first + i, local))) atomicAdd(&counts[local], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < n.E; e += blockDim.x)
        segment_counts[static_cast<int64>(blockIdx.x) * n.E + e] = counts[e];
    if (LAYOUT != SLABS) {
        int64 stride = static_cast<int64>(gridDim.x) * blockDim.x;
        for (int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n.fill_count; i += stride)
            row_to_slot[i] = n.fill;
    }
}

// One block.  Turns segment_counts into sums over the segments before, writes the experts' first rows to starts (E) and
// all that does not depend on single slots.  Shared memory: 4 (SCRATCH + 4 E + max(E, threads)) bytes.
template <Layout LAYOUT>
__global__ void __launch_bounds__(1024, 1)
    permute_scan_kernel(int32* segment_counts, int32* starts, int32* offsets, int4* tiles,
                                    int32* tile_experts, int32* tile_count, const int32* labels, int segments,
                                    Sizes n) {
    constexpr int AHEAD = 8;  // loads in flight; the sum alone would wait for each
    int32* total = reinterpret_cast<int32*>(shared_memory);
    int32 *counts = total + SCRATCH, *start = counts + n.E;
    int32 *tile_start = start + n.E, *part_sums = tile_start + 2 * n.E;
    // Threads that share an expert take equal runs of the segments.
    int parts = max(1, static_cast<int>(blockDim.x) / max(n.E, 1));
    int run = (segments + parts - 1) / parts;
    for (int i = threadIdx.x; i < n.E * parts; i += blockDim.x) {
        int e = i % n.E, last = min((i / n.E + 1) * run, segments);
        int32 sum = 0;
#pragma unroll AHEAD
        for (int b = i / n.E * run; b < last; ++b) sum += segment_counts[static_cast<int64>(b) * n.E + e];
        part_sums[i] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n.E * parts; i += blockDim.x) {
        int e = i % n.E, part = i / n.E, last = min((part + 1) * run, segments);
        int32 running = 0, all = 0;
        for (int p = 0; p < parts; ++p) {
            if (p < part) running += part_sums[p * n.E + e];
            all += part_sums[p * n.E + e];
        }
        if (part == 0) counts[e] = all;
        int32* column = segment_counts + e;
        for (int b = part * run; b < last; b += AHEAD) {
            int32 here[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) here[k] = b + k < last ? column[static_cast<int64>(b + k) * n.E] : 0;
#pragma unroll
            for (int k = 0; k < AHEAD; ++k) {
                if (b + k < last) column[static_cast<int64>(b + k) * n.E] = running;
                running += here[k];
            }
        }
    }
    Sorted out = {offsets, tiles, tile_experts, tile_count, labels, n.tile_capacity, n.tile_rows, n.slab_rows,
                  n.even};
    lay_out<LAYOUT>(start, counts, tile_start, total, out, n.E);
    for (int e = threadIdx.x; e < n.E; e += blockDim.x) starts[e] = start[e];
}

// Shared memory: 4 (E + SEGMENT) + 2 warps E bytes.
template <Layout LAYOUT>
__global__ void __launch_bounds__(1024, 1)
    permute_place_kernel(int32* row_to_slot, int32* slot_to_row, const int32* segment_counts,
                                     const int32* starts, const void* ids, const int32* expert_map, Sizes n) {
    int32* base = reinterpret_cast<int32*>(shared_memory);
    uint32* state = reinterpret_cast<uint32*>(base + n.E);
    uint16* hist = reinterpret_cast<uint16*>(state + SEGMENT);
    Routing routing = routing_of(ids, expert_map, n);
    int64 first = static_cast<int64>(blockIdx.x) * SEGMENT;
    int count = static_cast<int>(min(static_cast<int64>(SEGMENT), n.S - first));
    for (int i = threadIdx.x; i < n.warps * n.E; i += blockDim.x) hist[i] = 0;
    __syncthreads();
    rank_slots<LAYOUT>(hist, state, routing, first, count, n.warps);
    sum_warps(nullptr, hist, n.E, n.warps);
    for (int e = threadIdx.x; e < n.E; e += blockDim.x)
        base[e] = starts[e] + segment_counts[static_cast<int64>(blockIdx.x) * n.E + e];
    __syncthreads();
    place_slots<LAYOUT>(row_to_slot, slot_to_row, base, hist, state, routing, first, count, n.warps, n.slab_rows);
}

// tiles (capacity,) and tile_count (1,) of slabs of slab_rows rows whose first counts[e] are live.  One block.
// Shared memory: 4 (SCRATCH + 3 E) bytes.
__global__ void work_list_kernel(int4* tiles, int32* tile_count, const int32* counts, int E, int slab_rows,
                                 int tile_rows) {
    int32* total = reinterpret_cast<int32*>(shared_memory);
    int32 *live = total + SCRATCH, *start = live + E, *tile_start = start + E;
    for (int e = threadIdx.x; e < E; e += blockDim.x) live[e] = max(counts[e], 0);
    Sorted out = {nullptr, tiles, nullptr, tile_count, nullptr, 0, tile_rows, slab_rows, 0};
    lay_out<SLABS>(start, live, tile_start, total, out, E);
}

// counts (E,), which are 0 before: the slots of each expert.  Shared memory: 4 E bytes.
__global__ void count_experts_kernel(int32* counts, const void* ids, const int32* expert_map, Sizes n) {
    int32* here = reinterpret_cast<int32*>(shared_memory);
    Routing routing = routing_of(ids, expert_map, n);
    for (int e = threadIdx.x; e < n.E; e += blockDim.x) here[e] = 0;
    __syncthreads();
    int64 stride = static_cast<int64>(gridDim.x) * blockDim.x;
    for (int64 s = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; s < n.S; s += stride) {
        int local = routing.expert_of(s);
        if (local >= 0) atomicAdd(&here[local], 1);
    }
    __syncthreads();
    // Integers: the order of the additions does not show.
    for (int e = threadIdx.x; e < n.E; e += blockDim.x)
        if (here[e] != 0) atomicAdd(&counts[e], here[e]);
}

// live (M,): 1 for tokens that an expert here computes.
__global__ void live_tokens_kernel(uint8* live, const void* ids, const int32* expert_map, int M, Sizes n) {
    Routing routing = routing_of(ids, expert_map, n);
    int64 t = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (t >= M) return;
    bool found = false;
    for (int j = 0; j < n.topk; ++j) found |= routing.expert_of(t * n.topk + j) >= 0;
    live[t] = found;
}

// out[slot_to_row[t, j]] = x[t] for the slots that have a row; rows of `width` units of 1 to 16 bytes.
template <typename Unit>
__global__ void scatter_rows_kernel(Unit* out, const Unit* x, const int32* slot_to_row, int topk, int width) {
    int64 t = blockIdx.x;
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= width) return;
    Unit value = x[t * width + column];
    for (int j = 0; j < topk; ++j) {
        int32 row = slot_to_row[t * topk + j];
        if (row >= 0) out[static_cast<int64>(row) * width + column] = value;
    }
}

}  // namespace pymoe
