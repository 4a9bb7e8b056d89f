// What all kernels share: the element types, sums over a block, and the macro that names the kernels.
//
// The kernels are written so that they also compile with a C++ compiler alone (tests/emulator), where a block's threads
// run one after another: no inline assembly outside mma.cuh, no atomics but atomicAdd on a count, dynamic
// shared memory by SHARED alone.
#pragma once

#ifdef EMULATED
#include "emulated.h"
#else
#include <cuda_bf16.h>
#include <cstdint>
typedef __nv_bfloat16 bf16;

#define SHARED(type, name) \
    extern __shared__ __align__(1024) unsigned char shared_bytes[]; \
    type *name = reinterpret_cast<type *>(shared_bytes)
// Defined after a kernel for whoever runs it elsewhere.
#define EXPORT(name)

__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, bf16 &to) { to = __float2bfloat16_rn(x); }
#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ void narrow(float x, float &to) { to = x; }

// Two kernels of one template, `name`_f32 and `name`_bf16: PARAMETERS(E) are those of element type E, what follows is their body.
#define TWINS(name, PARAMETERS, ...) \
    extern "C" __global__ void name##_f32(PARAMETERS(float)) { __VA_ARGS__; } \
    EXPORT(name##_f32) \
    extern "C" __global__ void name##_bf16(PARAMETERS(bf16)) { __VA_ARGS__; } \
    EXPORT(name##_bf16)

// A thread for each of n; threads stride over the rest where there are more.
#define EACH(i, n) \
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < (n); \
         i += static_cast<int64_t>(gridDim.x) * blockDim.x)

constexpr int WARP = 32;

// The sum over a warp, in every lane; the order of the additions is fixed.
__device__ __forceinline__ float warp_sum(float x) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

// The sum over a block of THREADS, in every thread. `scratch` has THREADS / WARP floats; may be called again at once.
template <int THREADS> __device__ __forceinline__ float block_sum(float x, float *scratch) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < THREADS / WARP; warp++) sum += scratch[warp];
    __syncthreads();
    return sum;
}

template <int THREADS> __device__ __forceinline__ float block_max(float x, float *scratch) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float most = scratch[0];
    for (int warp = 1; warp < THREADS / WARP; warp++) most = fmaxf(most, scratch[warp]);
    __syncthreads();
    return most;
}
