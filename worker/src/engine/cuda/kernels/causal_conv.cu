// A causal convolution of each channel by itself, then SiLU: y[t] = silu(sum of w[kernel - 1 - back] x[t - back]), where no token reads
// over the beginning of its segment. `starts` and `ends` are the segments' borders, of each token.
#include "gates.cuh"

// What SiLU reads of a token. Rows of x are `stride` apart.
template <typename E>
__device__ __forceinline__ float convolve(const E *x, const E *weight, int64_t token, int channel, int start, int64_t stride, int kernel) {
    float sum = 0;
    for (int back = min(kernel - 1, static_cast<int>(token) - start); back >= 0; back--)
        sum += widen(weight[channel * kernel + kernel - 1 - back]) * widen(x[(token - back) * stride + channel]);
    return sum;
}

template <typename E>
__device__ void forward(const E *x, const E *weight, const unsigned *starts, float *y, int64_t tokens, int channels, int64_t stride,
                        int kernel) {
    EACH(i, tokens * channels) {
        int64_t token = i / channels;
        y[i] = Gate(convolve(x, weight, token, static_cast<int>(i % channels), starts[token], stride, kernel), SILU).value;
    }
}
#define CAUSAL_CONV_FORWARD(E) \
    const E *x, const E *weight, const unsigned *starts, float *y, int64_t tokens, int channels, int64_t stride, int kernel
TWINS(causal_conv_forward, CAUSAL_CONV_FORWARD, forward(x, weight, starts, y, tokens, channels, stride, kernel))

// Turns the gradient of y into that of what SiLU reads.
template <typename E>
__device__ void silu_backward(const E *x, const E *weight, const unsigned *starts, float *dy, int64_t tokens, int channels,
                              int64_t stride, int kernel) {
    EACH(i, tokens * channels) {
        int64_t token = i / channels;
        dy[i] *= Gate(convolve(x, weight, token, static_cast<int>(i % channels), starts[token], stride, kernel), SILU).slope;
    }
}
#define CAUSAL_CONV_SILU_BACKWARD(E) \
    const E *x, const E *weight, const unsigned *starts, float *dy, int64_t tokens, int channels, int64_t stride, int kernel
TWINS(causal_conv_silu_backward, CAUSAL_CONV_SILU_BACKWARD, silu_backward(x, weight, starts, dy, tokens, channels, stride, kernel))

// The gradient of x, from that of what SiLU reads.
template <typename E>
__device__ void backward(const float *d_read, const E *weight, const unsigned *ends, E *dx, int64_t tokens, int channels,
                         int64_t stride, int kernel) {
    EACH(i, tokens * channels) {
        int64_t token = i / channels;
        int channel = static_cast<int>(i % channels), readers = min(kernel, static_cast<int>(ends[token] - token));
        float sum = 0;
        for (int back = 0; back < readers; back++)
            sum += widen(weight[channel * kernel + kernel - 1 - back]) * d_read[(token + back) * channels + channel];
        narrow(sum, dx[token * stride + channel]);
    }
}
#define CAUSAL_CONV_BACKWARD(E) \
    const float *d_read, const E *weight, const unsigned *ends, E *dx, int64_t tokens, int channels, int64_t stride, int kernel
TWINS(causal_conv_backward, CAUSAL_CONV_BACKWARD, backward(d_read, weight, ends, dx, tokens, channels, stride, kernel))

// Over `tile` tokens each, in order: partials[t][channel][column]. A thread for each channel, which comes to each of its weights in
// turn.
template <typename E>
__device__ void weight_backward(const E *x, const float *d_read, const unsigned *starts, float *partials, int tokens, int channels,
                                int64_t stride, int kernel, int tile) {
    int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    int first = blockIdx.y * tile, end = min(first + tile, tokens);
    float *out = partials + (static_cast<int64_t>(blockIdx.y) * channels + channel) * kernel;
    for (int back = 0; back < kernel; back++) {
        float sum = 0;
        for (int token = first; token < end; token++) {
            if (back > token - static_cast<int>(starts[token])) continue;
            sum += d_read[static_cast<int64_t>(token) * channels + channel] * widen(x[(token - back) * stride + channel]);
        }
        out[kernel - 1 - back] = sum;
    }
}
#define CAUSAL_CONV_WEIGHT(E) \
    const E *x, const float *d_read, const unsigned *starts, float *partials, int tokens, int channels, int64_t stride, int kernel, \
    int tile
TWINS(causal_conv_weight_gradient, CAUSAL_CONV_WEIGHT, weight_backward(x, d_read, starts, partials, tokens, channels, stride, kernel,
      tile))
