// The work list of rows that are sorted by expert already.
#include "common/even_tiles.cuh"

namespace pymoe {

extern __shared__ unsigned char shared_memory[];

// One block of 1024 threads: tiles of expert e cover rows offsets[e]..offsets[e + 1] - 1, experts ascending; or, `even`,
// those of common/even_tiles.cuh, by 8 bytes of shared memory an expert.
__global__ void __launch_bounds__(1024)
    list_tiles_kernel(const int32* offsets, int32 experts, int32 tile_rows, int32 capacity, int32 even,
                      int4* tiles, int32* tile_count) {
    __shared__ int32 ends[1024];
    int32 before = 0;
    for (int32 base = 0; base < experts; base += 1024) {
        const int32 e = base + threadIdx.x;
        const int32 first = e < experts ? offsets[e] : 0, rows = e < experts ? offsets[e + 1] - first : 0;
        const int32 count = (rows + tile_rows - 1) / tile_rows;
        ends[threadIdx.x] = count;
        __syncthreads();
        for (int32 reach = 1; reach < 1024; reach *= 2) {
            const int32 left = threadIdx.x >= reach ? ends[threadIdx.x - reach] : 0;
            __syncthreads();
            ends[threadIdx.x] += left;
            __syncthreads();
        }
        const int32 start = before + ends[threadIdx.x] - count;
        for (int32 i = 0; !even && i < count && start + i < capacity; ++i)
            tiles[start + i] = make_int4(e, first + i * tile_rows, min(tile_rows, rows - i * tile_rows), 0);
        before += ends[1023];
        __syncthreads();
    }
    if (even) {
        EvenSplit* splits = reinterpret_cast<EvenSplit*>(shared_memory);
        const auto rows_of = [&](int32 e) { return offsets[e + 1] - offsets[e]; };
        for (int32 e = threadIdx.x; e < experts; e += blockDim.x) splits[e] = EvenSplit::of(rows_of(e), tile_rows);
        __syncthreads();
        list_even_tiles(tiles, capacity, splits, reinterpret_cast<int32*>(splits + experts), experts,
                        [&](int32 e) { return offsets[e]; }, rows_of);
    }
    if (threadIdx.x == 0) *tile_count = min(before, capacity);
}

}  // namespace pymoe
