// Runs CUDA kernels on the host, thread by thread: enough of the language for kernels without inline assembly.
//
// Each device thread is a fiber.  A barrier or a warp operation parks it until all it waits for have arrived, so the
// results are those of a device that follows the rules; a thread that others wait for in vain ends the program.
#pragma once

#include <ucontext.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
// Of one block at a time, and blocks run one after the other; those of a cluster, which run together, have dynamic only.
#define __shared__ static

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

constexpr size_t STACK = 128 << 10, SHARED = 256 << 10;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    uint3 index;
    int lane = 0, warp = 0, block = 0;  // of the warps, and the block, of its cluster
    bool done = false;
    long operations = 0; // warp operations passed
};

struct Block {
    uint3 index;
    int alive = 0, waiting = 0;
    long generation = 0;  // block barriers passed
};

struct Warp {
    uint64_t value[2][32];
    long arrived[32];
    int size = 0;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline Block blocks[CLUSTER_BLOCKS];
inline bool progress = false;
inline int dynamic_bytes = 0;  // of shared memory, as the launch asked for
inline long blocks_run = 0;    // clusters, to be exact

inline void yield_now() { swapcontext(&current->context, &scheduler); }

[[noreturn]] inline void fail(const char* text) {
    std::fprintf(stderr, "emulator: %s in block (%u, %u), thread (%u, %u)\n", text, blockIdx.x, blockIdx.y,
                 threadIdx.x, threadIdx.y);
    std::abort();
}

// Dynamic shared memory of the block whose thread runs.
alignas(1024) inline unsigned char pool[CLUSTER_BLOCKS * SHARED];
inline unsigned char* shared_bytes(int block) { return pool + block * SHARED; }
inline unsigned char* shared_bytes() { return shared_bytes(current->block); }

inline void block_barrier() {
    Block& block = blocks[current->block];
    long mine = block.generation;
    if (++block.waiting == block.alive) {
        block.waiting = 0;
        ++block.generation;
        progress = true;
        return;
    }
    while (block.generation == mine) yield_now();
    progress = true;
}

// Leaves the lane's value, waits for the whole warp, and returns the values of all its lanes.
inline const uint64_t* exchange(unsigned mask, uint64_t value) {
    if (mask != 0xffffffffu) fail("a mask other than the full warp");
    Fiber& self = *current;
    Warp& warp = warps[self.warp];
    if (warp.size != 32) fail("a warp operation in a partial warp");
    long turn = ++self.operations;
    warp.value[turn & 1][self.lane] = value;
    warp.arrived[self.lane] = turn;
    for (;;) {
        bool all = true;
        for (int lane = 0; lane < 32; ++lane) all &= warp.arrived[lane] >= turn;
        if (all) break;
        yield_now();
    }
    progress = true;
    return warp.value[turn & 1];
}

template <typename T>
uint64_t to_bits(T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

inline void (*entry)(void**) = nullptr;
inline void** entry_arguments = nullptr;

inline void run_fiber() {
    entry(entry_arguments);
    current->done = true;
    Block& block = blocks[current->block];
    --block.alive;
    progress = true;
    // The barrier may have waited for this thread alone.
    if (block.alive > 0 && block.waiting == block.alive) {
        block.waiting = 0;
        ++block.generation;
    }
    for (;;) yield_now();
}

// The blocks of a cluster, from block `first` on along x.
inline void run_cluster(uint3 first) {
    const int count = blockDim.x * blockDim.y * blockDim.z, of_block = (count + 31) / 32;
    if (static_cast<int>(fibers.size()) < count * CLUSTER_BLOCKS) fibers.resize(count * CLUSTER_BLOCKS);
    warps.assign(of_block * CLUSTER_BLOCKS, Warp{});
    for (int b = 0; b < CLUSTER_BLOCKS; ++b) {
        blocks[b] = {{first.x + b, first.y, first.z}, count, 0, 0};
        // What a block finds in shared memory is what another left there.
        std::memset(shared_bytes(b), 0xCB, SHARED);
    }
    for (int n = 0; n < count * CLUSTER_BLOCKS; ++n) {
        Fiber& f = fibers[n];
        const int i = n % count;
        f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        f.lane = i % 32;
        f.block = n / count;
        f.warp = f.block * of_block + i / 32;
        f.done = false;
        f.operations = 0;
        warps[f.warp].size++;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, run_fiber, 0);
    }
    for (bool alive = true; alive;) {
        progress = alive = false;
        for (int n = 0; n < count * CLUSTER_BLOCKS; ++n) {
            if (fibers[n].done) continue;
            alive = true;
            current = &fibers[n];
            threadIdx = fibers[n].index;
            blockIdx = blocks[fibers[n].block].index;
            swapcontext(&scheduler, &fibers[n].context);
        }
        if (alive && !progress) fail("threads wait for each other for ever");
    }
}

template <auto Kernel, typename... P, size_t... I>
void unpack(void (*)(P...), void** arguments, std::index_sequence<I...>) {
    Kernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
}

template <auto Kernel, typename... P>
void call_with(void** arguments, void (*kernel)(P...)) {
    unpack<Kernel>(kernel, arguments, std::index_sequence_for<P...>{});
}

template <auto Kernel>
void call(void** arguments) {
    call_with<Kernel>(arguments, Kernel);
}

template <typename P>
std::string word() {
    if (std::is_pointer_v<P>) return "p ";
    if (std::is_class_v<P>) return std::to_string(sizeof(P)) + " ";
    if (std::is_same_v<P, float>) return "f ";
    if (std::is_same_v<P, double>) return "d ";
    return sizeof(P) == 8 ? "q " : sizeof(P) == 4 ? "i " : "! ";
}

// A word a parameter: its type, or the bytes of a struct.
template <typename... P>
const char* signature(void (*)(P...)) {
    static const std::string text = (std::string() + ... + word<std::remove_cv_t<P>>());
    return text.c_str();
}

inline void launch(void (*function)(void**), void** arguments, const int* grid, const int* block, int shared) {
    entry = function;
    entry_arguments = arguments;
    gridDim = {unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2])};
    blockDim = {unsigned(block[0]), unsigned(block[1]), unsigned(block[2])};
    if (gridDim.x % CLUSTER_BLOCKS) {
        std::fprintf(stderr, "emulator: a grid of %u blocks, not whole clusters\n", gridDim.x);
        std::abort();
    }
    dynamic_bytes = shared;
    for (unsigned z = 0; z < gridDim.z; ++z)
        for (unsigned y = 0; y < gridDim.y; ++y)
            for (unsigned x = 0; x < gridDim.x; x += CLUSTER_BLOCKS) {
                ++blocks_run;
                run_cluster({x, y, z});
            }
}

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(mask, 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
    auto all = emulator::exchange(mask, emulator::to_bits(value));
    return emulator::from_bits<T>(all[lane & 31]);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return __shfl_sync(mask, value, emulator::current->lane ^ lanes);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int by) {
    int lane = emulator::current->lane;
    return __shfl_sync(mask, value, lane >= by ? lane - by : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
    int lane = emulator::current->lane;
    return __shfl_sync(mask, value, lane + by < 32 ? lane + by : lane);
}
template <typename T, typename F>
T reduce_lanes(unsigned mask, T value, F join) {
    auto all = emulator::exchange(mask, emulator::to_bits(value));
    T result = emulator::from_bits<T>(all[0]);
    for (int lane = 1; lane < 32; ++lane) result = join(result, emulator::from_bits<T>(all[lane]));
    return result;
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
    return reduce_lanes(mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
    return reduce_lanes(mask, value, [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
    return reduce_lanes(mask, value, [](T a, T b) { return T(a + b); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    auto all = emulator::exchange(mask, predicate != 0);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane] & 1) << lane;
    return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
    uint64_t mine = emulator::to_bits(value);
    auto all = emulator::exchange(mask, mine);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane] == mine) << lane;
    return bits;
}

template <typename T>
T atomicAdd(T* address, T value) { T old = *address; *address = old + value; return old; }
template <typename T>
T atomicMax(T* address, T value) { T old = *address; if (value > old) *address = value; return old; }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float __double2float_rn(double a) { return float(a); }
inline float __int_as_float(int a) { return emulator::from_bits<float>(uint32_t(a)); }
inline float __uint_as_float(unsigned a) { return emulator::from_bits<float>(a); }
inline int __float_as_int(float a) { return int(emulator::to_bits(a)); }
inline unsigned __float_as_uint(float a) { return unsigned(emulator::to_bits(a)); }
inline double __longlong_as_double(long long a) { return emulator::from_bits<double>(uint64_t(a)); }
inline long long __double_as_longlong(double a) { return (long long)emulator::to_bits(a); }
// Bytes of the eight of `low` and `high` that the nibbles of `selector` name.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t both = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
[[noreturn]] inline void __trap() { emulator::fail("a trap"); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(unsigned(a)); }
template <typename T>
T __ldg(const T* a) { return *a; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
