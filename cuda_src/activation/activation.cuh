// What stands between GEMM1 and GEMM2, in float32: the formulas of docs/numerics in their order of operations.
#pragma once

#include "activation/operations.cuh"
#include "common/types.cuh"

namespace pymoe {

// Where a unit is compiled for a user's function, its prelude (pymoe/device/own_activation.py) defines
// PYMOE_OWN_ACTIVATION and own_formula; that function is then the only one, whatever the parameters say.
#ifdef PYMOE_OWN_ACTIVATION
constexpr bool kOwnActivation = true;
__device__ __forceinline__ float own_activation(float g, float u) {
    return own_formula(g, u, [](float a, float b) { return divide(a, b); });
}
#else
constexpr bool kOwnActivation = false;
#endif

// Members of pymoe.MoEActivation by formula: SILU covers SWIGLUOAI in both layouts, which differ by parameters only.
enum class Activation : int32 {
    kSilu,
    kSwigluStep,
    kGelu,
    kGeluTanh,
    kSitu,
    kSiluNoMul,
    kGeluNoMul,
    kGeluTanhNoMul,
    kRelu2NoMul
};

// Where gate and up lie in a row of GEMM1: nowhere (not gated), in halves, or alternating.
enum class GateLayout : int32 { kPlain, kHalves, kInterleaved };

// `limit` is infinity where there is none; situ_linear_beta is at most 0 where up is taken as it is.
struct ActivationParameters {
    Activation kind;
    GateLayout layout;
    float limit, alpha, beta, situ_beta, situ_linear_beta;
};

// NaN passes both limits.
__device__ __forceinline__ float limit_above(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float limit_both(float x, float limit) { return x < -limit ? -limit : limit_above(x, limit); }

// A division, so that g survives exactly where the exponential vanishes against 1.
__device__ __forceinline__ float silu(float g, float alpha) { return g / (1.0f + expf(-alpha * g)); }

__device__ __forceinline__ float gelu(float g) { return 0.5f * g * erfcf(-0.70710678118654752440f * g); }

// The sigmoid of 2 z instead of (1 + tanh z) / 2, which cancels for negative g.
__device__ __forceinline__ float gelu_tanh(float g) {
    const float inner = __fadd_rn(g, __fmul_rn(0.044715f, __fmul_rn(__fmul_rn(g, g), g)));
    return g / (1.0f + expf(-1.59576912160573071176f * inner));
}

__device__ __forceinline__ float relu2(float g) {
    const float positive = g < 0.0f ? 0.0f : g;
    return positive * positive;
}

// By way of double: the 2 ulp of tanhf, twice in a product, would pass the 4 ulp between backends.
__device__ __forceinline__ float exact_tanh(float x) { return static_cast<float>(tanh(static_cast<double>(x))); }

__device__ __forceinline__ float situ(float g, float u, const ActivationParameters& p) {
    if (p.situ_linear_beta > 0.0f) u = p.situ_linear_beta * exact_tanh(u / p.situ_linear_beta);
    return p.situ_beta * exact_tanh(g / p.situ_beta) / (1.0f + expf(-g)) * u;
}

// SiLU of gate times up with its parameters, by what divides: the common case, kept small enough to unroll.
template <class Quotient>
__device__ __forceinline__ float swiglu_by(float g, float u, const ActivationParameters& p, Quotient quotient) {
    g = limit_above(g, p.limit);
    return quotient(g, 1.0f + expf(-p.alpha * g)) * (limit_both(u, p.limit) + p.beta);
}

__device__ __forceinline__ float swiglu(float g, float u, const ActivationParameters& p) {
    return swiglu_by(g, u, p, [](float a, float b) { return a / b; });
}

// Any activation of the library; `u` is not read by those that are not gated.
__device__ __forceinline__ float activate(float g, float u, const ActivationParameters& p) {
    switch (p.kind) {
        case Activation::kSilu: return swiglu(g, u, p);
        case Activation::kSwigluStep: return limit_above(silu(g, 1.0f), p.limit) * limit_both(u, p.limit);
        case Activation::kGelu: return gelu(g) * u;
        case Activation::kGeluTanh: return gelu_tanh(g) * u;
        case Activation::kSitu: return situ(g, u, p);
        case Activation::kSiluNoMul: return silu(g, 1.0f);
        case Activation::kGeluNoMul: return gelu(g);
        case Activation::kGeluTanhNoMul: return gelu_tanh(g);
        case Activation::kRelu2NoMul: return relu2(g);
    }
    return 0.0f;
}

// The same as a call: nine formulas inlined four times over would be most of a GEMM's code.
__device__ __noinline__ float activate_apart(float g, float u, Activation kind, float limit, float situ_beta,
                                             float situ_linear_beta) {
    return activate(g, u, {kind, GateLayout::kPlain, limit, 1.0f, 0.0f, situ_beta, situ_linear_beta});
}

__device__ __forceinline__ float activate_apart(float g, float u, const ActivationParameters& p) {
    return activate_apart(g, u, p.kind, p.limit, p.situ_beta, p.situ_linear_beta);
}

__device__ __forceinline__ float activate_one(float g, float u, const ActivationParameters& p) {
#ifdef PYMOE_OWN_ACTIVATION
    return own_activation(g, u);
#else
    return activate(g, u, p);
#endif
}

// Four elements of an epilogue.
__device__ __forceinline__ void activate_four(const float (&g)[4], const float (&u)[4], const ActivationParameters& p,
                                              float (&y)[4]) {
#ifdef PYMOE_OWN_ACTIVATION
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = own_activation(g[i], u[i]);
#else
    if (p.kind == Activation::kSilu) {
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = swiglu(g[i], u[i], p);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) y[i] = activate_apart(g[i], u[i], p);
    }
#endif
}

// Eight elements of an epilogue that a whole warp computes, gate(i) and up(i) of a lane: SiLU, or a user's function.
//
// Quotients need no branch but one for all: where any operand is far from 1, the warp computes one element after the
// other, by way of `spare`, 512 floats of its own in shared memory.  Both ways round as IEEE 754 says.
template <class Gate, class Up>
__device__ __forceinline__ void activate_eight(const ActivationParameters& p, Gate gate, Up up, float* spare,
                                               float (&y)[8]) {
    bool near = true;
    const auto quotient = [&](float a, float b) {
        near &= is_near(b) && (is_near(a) || __float_as_uint(a) == 0);
        return divide_near(a, b);
    };
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#ifdef PYMOE_OWN_ACTIVATION
        y[i] = own_formula(gate(i), up(i), quotient);
#else
        y[i] = swiglu_by(gate(i), up(i), p, quotient);
#endif
    }
    if (__all_sync(0xffffffffu, near)) return;
    float* mine = spare + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) mine[64 * i] = gate(i), mine[64 * i + 32] = up(i);
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
        const float g = mine[64 * i], u = mine[64 * i + 32];
#ifdef PYMOE_OWN_ACTIVATION
        mine[64 * i] = own_activation(g, u);
#else
        mine[64 * i] = swiglu(g, u, p);
#endif
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = mine[64 * i];
}

}  // namespace pymoe
