// The norm of each head's result in linear attention, through a gate: y = w rms_norm(x) silu(gate), a warp for each head of a token.
// Rows of gates, and of y, are `gate_stride` and `stride` apart.
#include "gates.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP;

template <typename E> __device__ __forceinline__ float inverse_rms(const E *x, int width, float epsilon) {
    float sum = 0;
    for (int i = threadIdx.x % WARP; i < width; i += WARP) sum += widen(x[i]) * widen(x[i]);
    return rsqrtf(warp_sum(sum) / width + epsilon);
}

template <typename E>
__device__ void forward(const E *x, const E *gates, const float *weight, E *y, int64_t vectors, int heads, int width,
                        int64_t gate_stride, int64_t stride, float epsilon) {
    int64_t vector = blockIdx.x * static_cast<int64_t>(WARPS) + threadIdx.x / WARP;
    if (vector >= vectors) return;
    int64_t token = vector / heads, column = vector % heads * width;
    const E *row = x + vector * width, *gate = gates + token * gate_stride + column;
    E *out = y + token * stride + column;
    float inverse = inverse_rms(row, width, epsilon);
    for (int i = threadIdx.x % WARP; i < width; i += WARP)
        narrow(weight[i] * (widen(row[i]) * inverse) * Gate(widen(gate[i]), SILU).value, out[i]);
}
#define GATED_NORM_FORWARD(E) \
    const E *x, const E *gates, const float *weight, E *y, int64_t vectors, int heads, int width, int64_t gate_stride, \
    int64_t stride, float epsilon
TWINS(gated_norm_forward, GATED_NORM_FORWARD, forward(x, gates, weight, y, vectors, heads, width, gate_stride, stride, epsilon))

// A block for `tile` heads of tokens, of which each warp has every so many, in order. Turns dy into the gradient of x, writes that of
// the gates, and partial sums of that of the weight: partials[t][i].
template <typename E>
__device__ void backward(const E *x, const E *gates, const float *weight, float *dy, E *d_gates, float *partials, int64_t vectors,
                         int heads, int width, int64_t gate_stride, int64_t d_stride, float epsilon, int tile) {
    SHARED(float, sums);
    float *own = sums + threadIdx.x / WARP * width;
    int lane = threadIdx.x % WARP;
    for (int i = lane; i < width; i += WARP) own[i] = 0;
    int64_t first = static_cast<int64_t>(blockIdx.x) * tile, end = min(first + tile, vectors);
    for (int64_t vector = first + threadIdx.x / WARP; vector < end; vector += WARPS) {
        int64_t token = vector / heads, column = vector % heads * width;
        const E *row = x + vector * width, *gate = gates + token * gate_stride + column;
        E *d_gate = d_gates + token * d_stride + column;
        float *d = dy + vector * width, inverse = inverse_rms(row, width, epsilon), along = 0;
        for (int i = lane; i < width; i += WARP) {
            Gate open(widen(gate[i]), SILU);
            float normed = widen(row[i]) * inverse;
            narrow(d[i] * (weight[i] * normed) * open.slope, d_gate[i]);
            d[i] *= open.value;
            own[i] += d[i] * normed;
            along += d[i] * weight[i] * widen(row[i]);
        }
        float factor = inverse * inverse * inverse * (warp_sum(along) / width);
        for (int i = lane; i < width; i += WARP) d[i] = d[i] * weight[i] * inverse - widen(row[i]) * factor;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; warp++) sum += sums[warp * width + i];
        partials[static_cast<int64_t>(blockIdx.x) * width + i] = sum;
    }
}
#define GATED_NORM_BACKWARD(E) \
    const E *x, const E *gates, const float *weight, float *dy, E *d_gates, float *partials, int64_t vectors, int heads, int width, \
    int64_t gate_stride, int64_t d_stride, float epsilon, int tile
TWINS(gated_norm_backward, GATED_NORM_BACKWARD, backward(x, gates, weight, dy, d_gates, partials, vectors, heads, width, gate_stride,
      d_stride, epsilon, tile))
