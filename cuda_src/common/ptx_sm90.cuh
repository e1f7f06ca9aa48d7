// Instructions of sm_90a: tensor copies, barriers in shared memory, asynchronous multiplies.  Like common/ptx.cuh, one
// function an instruction, named after it; both are the only files with inline assembly.
#pragma once

#include "common/ptx.cuh"

namespace pymoe::ptx {

// A barrier in shared memory, named by its address: a phase ends when `count` arrivals and all announced bytes are there.
__device__ __forceinline__ void mbarrier_init(uint32 barrier, int32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialized barriers visible to copies.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces `bytes` that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity; the phase before the first has parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// A box of a tensor of two or three dimensions to shared memory, `x` along the rows; arrives at `barrier` by its bytes.
__device__ __forceinline__ void cp_async_bulk_tensor(uint32 shared, const TensorMap* map, uint32 barrier, int32 x,
                                                     int32 y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor(uint32 shared, const TensorMap* map, uint32 barrier, int32 x,
                                                     int32 y, int32 z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// The same box to the same place of every block of the cluster that `blocks` has a bit for; arrives at each one's barrier.
__device__ __forceinline__ void cp_async_bulk_tensor_multicast(uint32 shared, const TensorMap* map, uint32 barrier,
                                                               int32 x, int32 y, int32 z, uint16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks)
        : "memory");
}

// Arrives at the barrier in the same place of a block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint32 barrier, uint32 block) {
    asm volatile(
        "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(block)
        : "memory");
}

// All threads of the cluster, and what they wrote.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// A barrier of the block by its number, 1 to 15: `threads` of whole warps arrive, and those that wait go on together.
__device__ __forceinline__ void barrier_wait(int32 number, int32 threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int32 number, int32 threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// True for one thread of a whole warp.  The assembler knows it for one, and issues tensor copies without a loop over
// threads that may differ: 10 cycles a copy instead of 50.
__device__ __forceinline__ bool elect() {
    uint32 elected;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(elected));
    return elected;
}

// Registers a thread of this warpgroup from here on.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first multiply into registers that were written otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kPending` of this warpgroup's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d = a (64 x 16) * b (16 x N) [+ d]: the operands lie in shared memory, in rows along k; a warp has 16 rows of d, in the
// fragments of mma.m16n8 one beside the other.
// The sums as operands, and as registers: 96 of them, and 32 more.
#define PYMOE_OPERANDS_96 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define PYMOE_OPERANDS_128 \
    PYMOE_OPERANDS_96 ", " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PYMOE_SUMS_96(d) \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
    "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
    "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
    "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define PYMOE_SUMS_128(d) \
    PYMOE_SUMS_96(d), \
    "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
    "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
    "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
    "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// `kSums` sums a thread are N = 2 kSums columns; kA, kB and kAdd number the operands behind them.
#define PYMOE_WGMMA(kName, kType, kSums, kColumns, kA, kB, kAdd)                                              \
    __device__ __forceinline__ void kName(float (&d)[kSums], uint64 a, uint64 b, bool add) {                 \
        asm volatile(                                                                                         \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %" #kAdd ", 0;\n"                                           \
            "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." kType "." kType " {" PYMOE_OPERANDS_##kSums \
            "}, %" #kA ", %" #kB ", add, 1, 1, 0, 0;\n}"                                                     \
            : PYMOE_SUMS_##kSums(d)                                                                           \
            : "l"(a), "l"(b), "r"(static_cast<int32>(add)));                                                  \
    }

PYMOE_WGMMA(wgmma_m64k16_bf16, "bf16", 96, 192, 96, 97, 98)
PYMOE_WGMMA(wgmma_m64k16_fp16, "f16", 96, 192, 96, 97, 98)
PYMOE_WGMMA(wgmma_m64k16_bf16, "bf16", 128, 256, 128, 129, 130)
PYMOE_WGMMA(wgmma_m64k16_fp16, "f16", 128, 256, 128, 129, 130)

#undef PYMOE_WGMMA
#undef PYMOE_SUMS_128
#undef PYMOE_SUMS_96
#undef PYMOE_OPERANDS_128
#undef PYMOE_OPERANDS_96

}  // namespace pymoe::ptx
