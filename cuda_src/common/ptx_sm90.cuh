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

// A box of a tensor of two to four dimensions to shared memory, `x` along the rows; arrives at `barrier` by its bytes.
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

__device__ __forceinline__ void cp_async_bulk_tensor(uint32 shared, const TensorMap* map, uint32 barrier, int32 x,
                                                     int32 y, int32 z, int32 w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

// A box to the same place of every block of the cluster that `blocks` has a bit for; arrives at each one's barrier.
__device__ __forceinline__ void cp_async_bulk_tensor_multicast(uint32 shared, const TensorMap* map, uint32 barrier,
                                                               int32 x, int32 y, uint16 blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4}], [%2], %5;" ::"r"(shared),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
        : "memory");
}

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

// An 8 x 8 matrix of 16-bit elements across a warp, transposed: lane l holds columns l % 4 * 2 and the next of row l / 4.
__device__ __forceinline__ uint32 movmatrix_trans(uint32 a) {
    uint32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
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

// d = a (64 x 16) * b (16 x N) [+ d]: the operands lie in shared memory, in rows along k; a warp has 16 rows of d, in
// the fragments of mma.m16n8 one beside the other.  Of an array the first N / 2 sums are used.
template <int N>
struct Columns {};

// The sums as operands and as registers, and the numbers of the operands behind them, by N.
#define PYMOE_OPERANDS_8 "%0, %1, %2, %3"
#define PYMOE_SUMS_8(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PYMOE_OPERANDS_16 PYMOE_OPERANDS_8 ", %4, %5, %6, %7"
#define PYMOE_SUMS_16(d) PYMOE_SUMS_8(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define PYMOE_OPERANDS_24 PYMOE_OPERANDS_16 ", %8, %9, %10, %11"
#define PYMOE_SUMS_24(d) PYMOE_SUMS_16(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define PYMOE_OPERANDS_32 PYMOE_OPERANDS_24 ", %12, %13, %14, %15"
#define PYMOE_SUMS_32(d) PYMOE_SUMS_24(d), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define PYMOE_OPERANDS_40 PYMOE_OPERANDS_32 ", %16, %17, %18, %19"
#define PYMOE_SUMS_40(d) PYMOE_SUMS_32(d), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define PYMOE_OPERANDS_48 PYMOE_OPERANDS_40 ", %20, %21, %22, %23"
#define PYMOE_SUMS_48(d) PYMOE_SUMS_40(d), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define PYMOE_OPERANDS_56 PYMOE_OPERANDS_48 ", %24, %25, %26, %27"
#define PYMOE_SUMS_56(d) PYMOE_SUMS_48(d), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define PYMOE_OPERANDS_64 PYMOE_OPERANDS_56 ", %28, %29, %30, %31"
#define PYMOE_SUMS_64(d) PYMOE_SUMS_56(d), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PYMOE_OPERANDS_72 PYMOE_OPERANDS_64 ", %32, %33, %34, %35"
#define PYMOE_SUMS_72(d) PYMOE_SUMS_64(d), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define PYMOE_OPERANDS_80 PYMOE_OPERANDS_72 ", %36, %37, %38, %39"
#define PYMOE_SUMS_80(d) PYMOE_SUMS_72(d), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define PYMOE_OPERANDS_88 PYMOE_OPERANDS_80 ", %40, %41, %42, %43"
#define PYMOE_SUMS_88(d) PYMOE_SUMS_80(d), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define PYMOE_OPERANDS_96 PYMOE_OPERANDS_88 ", %44, %45, %46, %47"
#define PYMOE_SUMS_96(d) PYMOE_SUMS_88(d), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define PYMOE_OPERANDS_104 PYMOE_OPERANDS_96 ", %48, %49, %50, %51"
#define PYMOE_SUMS_104(d) PYMOE_SUMS_96(d), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define PYMOE_OPERANDS_112 PYMOE_OPERANDS_104 ", %52, %53, %54, %55"
#define PYMOE_SUMS_112(d) PYMOE_SUMS_104(d), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define PYMOE_OPERANDS_120 PYMOE_OPERANDS_112 ", %56, %57, %58, %59"
#define PYMOE_SUMS_120(d) PYMOE_SUMS_112(d), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define PYMOE_OPERANDS_128 PYMOE_OPERANDS_120 ", %60, %61, %62, %63"
#define PYMOE_SUMS_128(d) PYMOE_SUMS_120(d), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PYMOE_OPERANDS_136 PYMOE_OPERANDS_128 ", %64, %65, %66, %67"
#define PYMOE_SUMS_136(d) PYMOE_SUMS_128(d), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define PYMOE_OPERANDS_144 PYMOE_OPERANDS_136 ", %68, %69, %70, %71"
#define PYMOE_SUMS_144(d) PYMOE_SUMS_136(d), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define PYMOE_OPERANDS_152 PYMOE_OPERANDS_144 ", %72, %73, %74, %75"
#define PYMOE_SUMS_152(d) PYMOE_SUMS_144(d), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define PYMOE_OPERANDS_160 PYMOE_OPERANDS_152 ", %76, %77, %78, %79"
#define PYMOE_SUMS_160(d) PYMOE_SUMS_152(d), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define PYMOE_OPERANDS_168 PYMOE_OPERANDS_160 ", %80, %81, %82, %83"
#define PYMOE_SUMS_168(d) PYMOE_SUMS_160(d), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define PYMOE_OPERANDS_176 PYMOE_OPERANDS_168 ", %84, %85, %86, %87"
#define PYMOE_SUMS_176(d) PYMOE_SUMS_168(d), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define PYMOE_OPERANDS_184 PYMOE_OPERANDS_176 ", %88, %89, %90, %91"
#define PYMOE_SUMS_184(d) PYMOE_SUMS_176(d), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define PYMOE_OPERANDS_192 PYMOE_OPERANDS_184 ", %92, %93, %94, %95"
#define PYMOE_SUMS_192(d) PYMOE_SUMS_184(d), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define PYMOE_OPERANDS_200 PYMOE_OPERANDS_192 ", %96, %97, %98, %99"
#define PYMOE_SUMS_200(d) PYMOE_SUMS_192(d), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define PYMOE_OPERANDS_208 PYMOE_OPERANDS_200 ", %100, %101, %102, %103"
#define PYMOE_SUMS_208(d) PYMOE_SUMS_200(d), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define PYMOE_OPERANDS_216 PYMOE_OPERANDS_208 ", %104, %105, %106, %107"
#define PYMOE_SUMS_216(d) PYMOE_SUMS_208(d), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define PYMOE_OPERANDS_224 PYMOE_OPERANDS_216 ", %108, %109, %110, %111"
#define PYMOE_SUMS_224(d) PYMOE_SUMS_216(d), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define PYMOE_OPERANDS_232 PYMOE_OPERANDS_224 ", %112, %113, %114, %115"
#define PYMOE_SUMS_232(d) PYMOE_SUMS_224(d), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define PYMOE_OPERANDS_240 PYMOE_OPERANDS_232 ", %116, %117, %118, %119"
#define PYMOE_SUMS_240(d) PYMOE_SUMS_232(d), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define PYMOE_OPERANDS_248 PYMOE_OPERANDS_240 ", %120, %121, %122, %123"
#define PYMOE_SUMS_248(d) PYMOE_SUMS_240(d), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define PYMOE_OPERANDS_256 PYMOE_OPERANDS_248 ", %124, %125, %126, %127"
#define PYMOE_SUMS_256(d) PYMOE_SUMS_248(d), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

#define PYMOE_WGMMA_OF(kName, kType, kColumns, kA, kB, kAdd)                                                   \
    template <int kSums>                                                                                       \
    __device__ __forceinline__ void kName(Columns<kColumns>, float (&d)[kSums], uint64 a, uint64 b, bool add) { \
        asm volatile(                                                                                          \
            "{\n.reg .pred add;\nsetp.ne.b32 add, %" #kAdd ", 0;\n"                                            \
            "wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." kType "." kType                           \
            " {" PYMOE_OPERANDS_##kColumns "}, %" #kA ", %" #kB ", add, 1, 1, 0, 0;\n}"                        \
            : PYMOE_SUMS_##kColumns(d)                                                                         \
            : "l"(a), "l"(b), "r"(static_cast<int32>(add)));                                                   \
    }
#define PYMOE_WGMMA(kColumns, kA, kB, kAdd)                             \
    PYMOE_WGMMA_OF(wgmma_m64k16_bf16, "bf16", kColumns, kA, kB, kAdd)   \
    PYMOE_WGMMA_OF(wgmma_m64k16_fp16, "f16", kColumns, kA, kB, kAdd)

PYMOE_WGMMA(8, 4, 5, 6)
PYMOE_WGMMA(16, 8, 9, 10)
PYMOE_WGMMA(24, 12, 13, 14)
PYMOE_WGMMA(32, 16, 17, 18)
PYMOE_WGMMA(40, 20, 21, 22)
PYMOE_WGMMA(48, 24, 25, 26)
PYMOE_WGMMA(56, 28, 29, 30)
PYMOE_WGMMA(64, 32, 33, 34)
PYMOE_WGMMA(72, 36, 37, 38)
PYMOE_WGMMA(80, 40, 41, 42)
PYMOE_WGMMA(88, 44, 45, 46)
PYMOE_WGMMA(96, 48, 49, 50)
PYMOE_WGMMA(104, 52, 53, 54)
PYMOE_WGMMA(112, 56, 57, 58)
PYMOE_WGMMA(120, 60, 61, 62)
PYMOE_WGMMA(128, 64, 65, 66)
PYMOE_WGMMA(136, 68, 69, 70)
PYMOE_WGMMA(144, 72, 73, 74)
PYMOE_WGMMA(152, 76, 77, 78)
PYMOE_WGMMA(160, 80, 81, 82)
PYMOE_WGMMA(168, 84, 85, 86)
PYMOE_WGMMA(176, 88, 89, 90)
PYMOE_WGMMA(184, 92, 93, 94)
PYMOE_WGMMA(192, 96, 97, 98)
PYMOE_WGMMA(256, 128, 129, 130)

#undef PYMOE_WGMMA
#undef PYMOE_WGMMA_OF

}  // namespace pymoe::ptx
