// y = w * x / sqrt(mean(x^2) + epsilon) over each row (Zhang & Sennrich, 2019), a block for each row.
#include "common.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ float inverse_rms(const float *x, int width, float epsilon, float *scratch) {
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += THREADS) sum += x[i] * x[i];
    return rsqrtf(block_sum<THREADS>(sum, scratch) / width + epsilon);
}

// Rows of y are `stride` apart.
template <typename E>
__device__ void forward(const float *x, const float *weight, E *y, int width, int stride, float epsilon) {
    __shared__ float scratch[THREADS / WARP];
    const float *row = x + static_cast<int64_t>(blockIdx.x) * width;
    E *out = y + static_cast<int64_t>(blockIdx.x) * stride;
    float inverse = inverse_rms(row, width, epsilon, scratch);
    for (int i = threadIdx.x; i < width; i += THREADS) narrow(weight[i] * (row[i] * inverse), out[i]);
}

#define RMS_NORM_FORWARD(E) const float *x, const float *weight, E *y, int width, int stride, float epsilon
TWINS(rms_norm_forward, RMS_NORM_FORWARD, forward(x, weight, y, width, stride, epsilon))

// dx += w g r - x r^3 mean(w g x), and the row's r for the gradient of the weight.
extern "C" __global__ void rms_norm_backward(const float *x, const float *weight, const float *dy, float *dx,
                                             float *inverses, int width, float epsilon) {
    __shared__ float scratch[THREADS / WARP];
    int64_t first = static_cast<int64_t>(blockIdx.x) * width;
    float inverse = inverse_rms(x + first, width, epsilon, scratch);
    float sum = 0;
    for (int i = threadIdx.x; i < width; i += THREADS) sum += dy[first + i] * weight[i] * x[first + i];
    float factor = inverse * inverse * inverse * (block_sum<THREADS>(sum, scratch) / width);
    for (int i = threadIdx.x; i < width; i += THREADS)
        dx[first + i] += dy[first + i] * weight[i] * inverse - x[first + i] * factor;
    if (threadIdx.x == 0) inverses[blockIdx.x] = inverse;
}
EXPORT(rms_norm_backward)

// Over `tile` rows each: partials[t][i] = sum g x r. A thread for each column.
extern "C" __global__ void rms_norm_weight_gradient(const float *x, const float *dy, const float *inverses,
                                                    float *partials, int rows, int width, int tile) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    int first = blockIdx.y * tile;
    int end = min(first + tile, rows);
    float sum = 0;
    for (int row = first; row < end; row++) {
        int64_t at = static_cast<int64_t>(row) * width + column;
        sum += dy[at] * (x[at] * inverses[row]);
    }
    partials[static_cast<int64_t>(blockIdx.y) * width + column] = sum;
}
EXPORT(rms_norm_weight_gradient)
