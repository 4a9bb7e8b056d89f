// y = (w + offset) x / sqrt(mean(x^2) + epsilon) over each row (Zhang & Sennrich, 2019), a block for each row. The offset is 1 in
// models that multiply by 1 + weight (Gemma), else 0.
#include "common.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ float inverse_rms(const float *x, int width, float epsilon, float *scratch) {
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += THREADS) sum += x[i] * x[i];
    return rsqrtf(block_sum<THREADS>(sum, scratch) / width + epsilon);
}

// Rows of y are `stride` apart.
template <typename E>
__device__ void forward(const float *x, const float *weight, E *y, int width, int stride, float epsilon, float offset) {
    __shared__ float scratch[THREADS / WARP];
    const float *row = x + static_cast<int64_t>(blockIdx.x) * width;
    E *out = y + static_cast<int64_t>(blockIdx.x) * stride;
    float inverse = inverse_rms(row, width, epsilon, scratch);
    for (int i = threadIdx.x; i < width; i += THREADS) narrow((weight[i] + offset) * (row[i] * inverse), out[i]);
}

#define RMS_NORM_FORWARD(E) const float *x, const float *weight, E *y, int width, int stride, float epsilon, float offset
TWINS(rms_norm_forward, RMS_NORM_FORWARD, forward(x, weight, y, width, stride, epsilon, offset))

// y = residual + scale norm(x)
extern "C" __global__ void rms_norm_onto(const float *x, const float *weight, const float *residual, float *y, int width,
                                         float epsilon, float offset, float scale) {
    __shared__ float scratch[THREADS / WARP];
    int64_t first = static_cast<int64_t>(blockIdx.x) * width;
    float inverse = inverse_rms(x + first, width, epsilon, scratch);
    for (int i = threadIdx.x; i < width; i += THREADS)
        y[first + i] = residual[first + i] + scale * ((weight[i] + offset) * (x[first + i] * inverse));
}
EXPORT(rms_norm_onto)

// The gradient of a row: (w + offset) g r - x r^3 mean((w + offset) g x).
struct RowGradient {
    const float *x, *weight, *dy;
    float offset, inverse, factor;

    __device__ __forceinline__ RowGradient(const float *x, const float *weight, const float *dy, int width, float epsilon,
                                           float offset, float *scratch)
        : x(x), weight(weight), dy(dy), offset(offset) {
        inverse = inverse_rms(x, width, epsilon, scratch);
        float sum = 0;
        for (int i = threadIdx.x; i < width; i += THREADS) sum += dy[i] * (weight[i] + offset) * x[i];
        factor = inverse * inverse * inverse * (block_sum<THREADS>(sum, scratch) / width);
    }
    __device__ __forceinline__ float at(int i) const { return dy[i] * (weight[i] + offset) * inverse - x[i] * factor; }
};

// dx += the gradient, and the row's r for that of the weight.
extern "C" __global__ void rms_norm_backward(const float *x, const float *weight, const float *dy, float *dx,
                                             float *inverses, int width, float epsilon, float offset) {
    __shared__ float scratch[THREADS / WARP];
    int64_t first = static_cast<int64_t>(blockIdx.x) * width;
    RowGradient gradient(x + first, weight, dy + first, width, epsilon, offset, scratch);
    for (int i = threadIdx.x; i < width; i += THREADS) dx[first + i] += gradient.at(i);
    if (threadIdx.x == 0) inverses[blockIdx.x] = gradient.inverse;
}
EXPORT(rms_norm_backward)

// dx = scale times the gradient, rounded, in rows that are `stride` apart; and the row's r.
template <typename E>
__device__ void backward_rounded(const float *x, const float *weight, const float *dy, E *dx, float *inverses, int width,
                                 int stride, float epsilon, float offset, float scale) {
    __shared__ float scratch[THREADS / WARP];
    int64_t first = static_cast<int64_t>(blockIdx.x) * width;
    E *out = dx + static_cast<int64_t>(blockIdx.x) * stride;
    RowGradient gradient(x + first, weight, dy + first, width, epsilon, offset, scratch);
    for (int i = threadIdx.x; i < width; i += THREADS) narrow(scale * gradient.at(i), out[i]);
    if (threadIdx.x == 0) inverses[blockIdx.x] = gradient.inverse;
}
#define RMS_NORM_BACKWARD_ROUNDED(E) \
    const float *x, const float *weight, const float *dy, E *dx, float *inverses, int width, int stride, float epsilon, \
    float offset, float scale
TWINS(rms_norm_backward_rounded, RMS_NORM_BACKWARD_ROUNDED, backward_rounded(x, weight, dy, dx, inverses, width, stride,
      epsilon, offset, scale))

// Over `tile` rows each: partials[t][i] = scale sum g x r. A thread for each column.
extern "C" __global__ void rms_norm_weight_gradient(const float *x, const float *dy, const float *inverses,
                                                    float *partials, int rows, int width, int tile, float scale) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    int first = blockIdx.y * tile;
    int end = min(first + tile, rows);
    float sum = 0;
    for (int row = first; row < end; row++) {
        int64_t at = static_cast<int64_t>(row) * width + column;
        sum += dy[at] * (x[at] * inverses[row]);
    }
    partials[static_cast<int64_t>(blockIdx.y) * width + column] = scale * sum;
}
EXPORT(rms_norm_weight_gradient)
