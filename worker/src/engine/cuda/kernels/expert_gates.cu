// What is between an expert's layers, on its rows.
#include "gates.cuh"

constexpr int THREADS = 256;

// How gates and ups lie in a row, and what comes of them; the numbers are those of ops/expert_gates.rs. With CLAMPED they alternate.
enum Gating { HALVES_SILU = SILU, HALVES_GELU_TANH = GELU_TANH, CLAMPED };

// The clamped SwiGLU of GPT-OSS, h = (u + 1) g sigmoid(alpha g) where g and u are gate and up within the limit, and its slopes. With
// s = sigmoid(alpha g) that of g s is s (1 + alpha g (1 - s)); what is clamped has none.
struct Clamped {
    float value, of_gate, of_up;

    __device__ __forceinline__ Clamped(float gate, float up, float alpha, float limit) {
        // As they are where they are no numbers.
        float g = gate > limit ? limit : gate, u = up > limit ? limit : up < -limit ? -limit : up;
        float s = sigmoid(alpha * g);
        value = (u + 1.0f) * g * s;
        of_gate = gate > limit ? 0.0f : (u + 1.0f) * s * (1.0f + alpha * g * (1.0f - s));
        of_up = fabsf(up) > limit ? 0.0f : g * s;
    }
};

// gate_up is [rows, 2 * width], a gate before each up.
template <typename E>
__device__ void clamped_swiglu(const E *gate_up, E *h, int64_t n, float alpha, float limit) {
    EACH(i, n) narrow(Clamped(widen(gate_up[2 * i]), widen(gate_up[2 * i + 1]), alpha, limit).value, h[i]);
}
#define CLAMPED_SWIGLU(E) const E *gate_up, E *h, int64_t n, float alpha, float limit
TWINS(clamped_swiglu, CLAMPED_SWIGLU, clamped_swiglu(gate_up, h, n, alpha, limit))

// A block for each row of y = w down(h), where dh is the gradient of h without the weight w: h as the forward pass had it, the
// gradient of gate and up, and that of the weight, which is h · dh.
template <typename E>
__device__ void expert_gates_backward(const E *gate_up, const float *dh, const float *weights, E *d_gate_up, E *h,
                                      float *d_weights, int width, int gating, float alpha, float limit) {
    __shared__ float scratch[THREADS / WARP];
    int64_t first = static_cast<int64_t>(blockIdx.x) * width;
    float weight = weights[blockIdx.x], sum = 0;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        int64_t gate = 2 * first + (gating == CLAMPED ? 2 * i : i), up = gating == CLAMPED ? gate + 1 : gate + width;
        float g = widen(gate_up[gate]), u = widen(gate_up[up]), d = dh[first + i], value, of_gate, of_up;
        if (gating == CLAMPED) {
            Clamped clamped(g, u, alpha, limit);
            value = clamped.value;
            of_gate = clamped.of_gate;
            of_up = clamped.of_up;
        } else {
            Gate own(g, gating);
            value = own.value * u;
            of_gate = u * own.slope;
            of_up = own.value;
        }
        narrow(value, h[first + i]);
        sum += d * widen(h[first + i]);
        d *= weight;
        narrow(d * of_gate, d_gate_up[gate]);
        narrow(d * of_up, d_gate_up[up]);
    }
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) d_weights[blockIdx.x] = sum;
}
#define EXPERT_GATES_BACKWARD(E) \
    const E *gate_up, const float *dh, const float *weights, E *d_gate_up, E *h, float *d_weights, int width, int gating, \
        float alpha, float limit
TWINS(expert_gates_backward, EXPERT_GATES_BACKWARD, expert_gates_backward(gate_up, dh, weights, d_gate_up, h, d_weights,
      width, gating, alpha, limit))
