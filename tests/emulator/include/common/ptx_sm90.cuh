// Instructions of sm_90a for the emulator.  What the hardware does by itself happens as late as it may: a tensor copy
// arrives when somebody waits for it, and until then its destination is garbage; a multiply reads its operands when its
// group is waited for.  So a stage that is taken too early, or given back too early, shows in the sums.
#pragma once

#include "common/ptx.cuh"

namespace pymoe::ptx {

// Threads come to a wait in an order that changes from wait to wait, and now and then late to another block's barrier.
inline uint32 random_word() {
    static uint32 state = 1;
    return state = state * 1664525 + 1013904223;
}
inline void dawdle(uint32 turns) {
    for (; turns > 0; --turns) emulator::progress = true, emulator::yield_now();
}
inline void dawdle() { dawdle(random_word() >> 30); }

struct Mbarrier {
    int32 bytes;   // announced and not yet there
    int16 missing; // arrivals
    uint8 count, parity;
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier(uint32 address, int block = emulator::current->block) {
    if (address % 8) emulator::fail("a barrier out of line");
    return *reinterpret_cast<Mbarrier*>(emulator::shared_bytes(block) + address);
}
inline void end_phase(Mbarrier& b) {
    if (b.missing < 0) emulator::fail("more arrivals than a phase has");
    if (b.missing == 0 && b.bytes == 0) b.missing = b.count, b.parity ^= 1, emulator::progress = true;
}
inline void mbarrier_init(uint32 address, int32 count) { mbarrier(address) = {0, int16(count), uint8(count), 0}; }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32 address) {
    --mbarrier(address).missing;
    end_phase(mbarrier(address));
}
inline void mbarrier_arrive_at(uint32 address, uint32 block) {
    if (int(block) != emulator::current->block && random_word() >> 28 == 0) dawdle(40);
    if (block >= CLUSTER_BLOCKS || emulator::blocks[block].alive == 0) emulator::fail("a barrier of a block that is not there");
    --mbarrier(address, block).missing;
    end_phase(mbarrier(address, block));
}
inline void mbarrier_arrive_expect_tx(uint32 address, uint32 bytes) {
    mbarrier(address).bytes += int32(bytes);
    mbarrier_arrive(address);
}

// As tests/emulator/sm90.py writes it.
struct EmulatedMap {
    uint64 address;
    uint64 extents[4];  // along a row first
    uint64 pitches[4];  // in elements
    uint32 box[4];
    uint32 itemsize;
};

struct TensorCopy {
    int block;  // that it goes to
    uint32 shared, barrier;
    EmulatedMap map;
    int64 at[4];
};
inline std::vector<TensorCopy>& tensor_copies() {
    static std::vector<TensorCopy> all;
    static long block = -1;
    if (block != emulator::blocks_run) block = emulator::blocks_run, all.clear();
    return all;
}

// Where a swizzle of 128 bytes puts a byte: bits 4 to 6 of its address are exchanged by bits 7 to 9.
inline uint32 swizzled(uint32 address) { return address ^ (address >> 3 & 0x70); }

inline void deliver(const TensorCopy& copy) {
    const EmulatedMap& m = copy.map;
    uint32 row = 0;
    for (uint32 w = 0; w < m.box[3]; ++w)
        for (uint32 z = 0; z < m.box[2]; ++z)
            for (uint32 y = 0; y < m.box[1]; ++y, ++row)
                for (uint32 x = 0; x < m.box[0]; ++x) {
                    const uint64 i[4] = {copy.at[0] + x, copy.at[1] + y, copy.at[2] + z, copy.at[3] + w};
                    unsigned char* to = emulator::shared_bytes(copy.block) + swizzled(copy.shared + row * 128 + x * m.itemsize);
                    std::memset(to, 0, m.itemsize);
                    uint64 element = 0;
                    bool inside = true;
                    for (int d = 0; d < 4; ++d) element += i[d] * m.pitches[d], inside &= i[d] < m.extents[d];
                    if (inside)
                        std::memcpy(to, reinterpret_cast<const unsigned char*>(m.address) + element * m.itemsize, m.itemsize);
                }
    mbarrier(copy.barrier, copy.block).bytes -= int32(row * 128);
    end_phase(mbarrier(copy.barrier, copy.block));
}

inline void copy_to(int block, uint32 shared, const TensorMap* map, uint32 barrier, int32 x, int32 y, int32 z, int32 w) {
    TensorCopy copy = {block, shared, barrier, {}, {x, y, z, w}};
    std::memcpy(&copy.map, map, sizeof copy.map);
    const uint32* box = copy.map.box;
    if (shared % 1024 || box[0] * copy.map.itemsize != 128) emulator::fail("a box out of line");
    if (emulator::blocks[block].alive == 0) emulator::fail("a copy to a block that is gone");
    std::memset(emulator::shared_bytes(block) + shared, 0xff, box[1] * box[2] * box[3] * 128);
    tensor_copies().push_back(copy);
}
inline void cp_async_bulk_tensor(uint32 shared, const TensorMap* map, uint32 barrier, int32 x, int32 y, int32 z, int32 w) {
    copy_to(emulator::current->block, shared, map, barrier, x, y, z, w);
}
inline void cp_async_bulk_tensor(uint32 shared, const TensorMap* map, uint32 barrier, int32 x, int32 y) {
    copy_to(emulator::current->block, shared, map, barrier, x, y, 0, 0);
}
inline void cp_async_bulk_tensor(uint32 shared, const TensorMap* map, uint32 barrier, int32 x, int32 y, int32 z) {
    copy_to(emulator::current->block, shared, map, barrier, x, y, z, 0);
}
inline void cp_async_bulk_tensor_multicast(uint32 shared, const TensorMap* map, uint32 barrier, int32 x, int32 y,
                                           int32 z, uint16 blocks) {
    for (int block = 0; block < CLUSTER_BLOCKS; ++block)
        if (blocks >> block & 1) copy_to(block, shared, map, barrier, x, y, z, 0);
}
inline void cp_async_bulk_tensor_multicast(uint32 shared, const TensorMap* map, uint32 barrier, int32 x, int32 y,
                                           uint16 blocks) {
    cp_async_bulk_tensor_multicast(shared, map, barrier, x, y, 0, blocks);
}

inline void mbarrier_wait(uint32 address, uint32 parity) {
    dawdle();
    while (mbarrier(address).parity == parity) {
        auto& copies = tensor_copies();
        for (size_t i = copies.size(); i-- > 0;)  // the last one first
            if (copies[i].barrier == address && copies[i].block == emulator::current->block) {
                const TensorCopy copy = copies[i];
                copies.erase(copies.begin() + i);
                deliver(copy);
                emulator::progress = true;
                break;
            }
        if (mbarrier(address).parity == parity) emulator::yield_now();
    }
    emulator::progress = true;
}

struct NumberedBarrier {
    int arrived = 0;
    long generation = 0;
};
inline NumberedBarrier& numbered(int32 number) {
    static NumberedBarrier all[CLUSTER_BLOCKS][16];
    static long cluster = -1;
    if (cluster != emulator::blocks_run) {
        cluster = emulator::blocks_run;
        for (auto& block : all)
            for (auto& barrier : block) barrier = {};
    }
    if (number < 1 || number > 15) emulator::fail("a barrier of another number than 1 to 15");
    return all[emulator::current->block][number];
}
inline void barrier_arrive(int32 number, int32 threads) {
    NumberedBarrier& barrier = numbered(number);
    if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.generation, emulator::progress = true;
}
inline void barrier_wait(int32 number, int32 threads) {
    dawdle();
    const long mine = numbered(number).generation;
    barrier_arrive(number, threads);
    while (numbered(number).generation == mine) emulator::yield_now();
    emulator::progress = true;
}

inline bool elect() {
    emulator::exchange(~0u, 0);
    return emulator::current->lane == 7;  // any one
}

inline void cluster_sync() {
    dawdle();
    static NumberedBarrier barrier;
    static long cluster = -1;
    if (cluster != emulator::blocks_run) cluster = emulator::blocks_run, barrier = {};
    int threads = 0;
    for (const auto& block : emulator::blocks) threads += block.alive;
    const long mine = barrier.generation;
    if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.generation, emulator::progress = true;
    while (barrier.generation == mine) emulator::yield_now();
    emulator::progress = true;
}

template <int kRegisters>
void setmaxnreg_dec() {}
template <int kRegisters>
void setmaxnreg_inc() {}

struct Multiply {
    float* d;
    int columns;
    uint64 a, b;
    bool add, bf16;
};
struct Multiplies {
    long block = -1;
    std::vector<std::vector<Multiply>> groups;
    std::vector<Multiply> open;
};
inline Multiplies& multiplies() {
    static Multiplies all[1024];
    Multiplies& mine = all[emulator::current - emulator::fibers.data()];
    if (mine.block != emulator::blocks_run) mine = {emulator::blocks_run, {}, {}};
    return mine;
}

inline float operand_element(uint64 descriptor, int row, int k, bool bf16) {
    const bool whole = descriptor >> 62 == 1 && (descriptor >> 32 & 0x3fff) == 64;
    if (!whole) emulator::fail("an operand that is not in swizzled rows of 128 bytes");
    const uint32 start = uint32(descriptor & 0x3fff) << 4;
    unsigned short bits;
    std::memcpy(&bits, emulator::shared_bytes() + swizzled(start + row * 128 + 2 * k), 2);
    return bf16 ? __uint_as_float(unsigned(bits) << 16) : __half2float({bits});
}

// The sums of one thread, k ascending, as the emulator's mma does.
inline void run(const Multiply& m) {
    const int thread = int(emulator::current - emulator::fibers.data()) % 128, lane = thread % 32;
    for (int high = 0; high < 2; ++high) {
        float a[16];
        for (int k = 0; k < 16; ++k)
            a[k] = operand_element(m.a, thread / 32 * 16 + lane / 4 + 8 * high, k, m.bf16);
        for (int j = 0; j < m.columns / 8; ++j)
            for (int i = 0; i < 2; ++i) {
                float& d = m.d[4 * j + 2 * high + i];
                float sum = m.add ? d : 0.0f;
                for (int k = 0; k < 16; ++k) sum += a[k] * operand_element(m.b, 8 * j + lane % 4 * 2 + i, k, m.bf16);
                d = sum;
            }
    }
}

inline void wgmma_fence() {}
inline void wgmma_commit() {
    multiplies().groups.push_back(std::move(multiplies().open));
    multiplies().open.clear();
}
template <int kPending>
void wgmma_wait() {
    Multiplies& mine = multiplies();
    while (int(mine.groups.size()) > kPending) {
        for (const Multiply& m : mine.groups.front()) run(m);
        mine.groups.erase(mine.groups.begin());
    }
    dawdle();
    emulator::exchange(~0u, 0);  // an instruction of the whole warp
}
template <int N>
struct Columns {};
template <int kColumns, int kSums>
void wgmma_m64k16_bf16(Columns<kColumns>, float (&d)[kSums], uint64 a, uint64 b, bool add) {
    multiplies().open.push_back({d, kColumns, a, b, add, true});
}
template <int kColumns, int kSums>
void wgmma_m64k16_fp16(Columns<kColumns>, float (&d)[kSums], uint64 a, uint64 b, bool add) {
    multiplies().open.push_back({d, kColumns, a, b, add, false});
}

inline uint32 movmatrix_trans(uint32 a) {
    const uint64_t* words = emulator::exchange(~0u, a);
    const int row = emulator::current->lane / 4, column = emulator::current->lane % 4 * 2;
    uint32 found = 0;
    for (int i = 0; i < 2; ++i)
        found |= (uint32(words[(column + i) * 4 + row / 2]) >> 16 * (row % 2) & 0xffff) << 16 * i;
    return found;
}

}  // namespace pymoe::ptx
