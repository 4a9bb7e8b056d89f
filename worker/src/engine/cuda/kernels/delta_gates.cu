// How much a head of linear attention writes and keeps at a token: sigmoid(b), and the logarithm -exp(decay) softplus(a + bias).
// b, then a, of all heads lie in rows that are `stride` apart.
#include "gates.cuh"

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
// As exact as the rest: what is kept is summed over many tokens.
__device__ __forceinline__ float exact_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename E>
__device__ void forward(const E *projected, const float *decay, const float *bias, float *written, float *kept, int64_t tokens,
                        int heads, int64_t stride) {
    EACH(i, tokens * heads) {
        int64_t row = i / heads * stride;
        int head = static_cast<int>(i % heads);
        written[i] = exact_sigmoid(widen(projected[row + head]));
        kept[i] = -expf(decay[head]) * softplus(widen(projected[row + heads + head]) + bias[head]);
    }
}
#define DELTA_GATES_FORWARD(E) \
    const E *projected, const float *decay, const float *bias, float *written, float *kept, int64_t tokens, int heads, int64_t stride
TWINS(delta_gates_forward, DELTA_GATES_FORWARD, forward(projected, decay, bias, written, kept, tokens, heads, stride))

// Over `tile` tokens each, in order; a thread for each head. Writes the gradients of b and a, whose rows are `d_stride` apart, and
// partial sums of those of decay and bias: partials[decay or bias][t][head].
template <typename E>
__device__ void backward(const E *projected, const float *decay, const float *bias, const float *d_written, const float *d_kept,
                         E *d_projected, float *partials, int tokens, int heads, int64_t stride, int64_t d_stride, int tile) {
    int head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= heads) return;
    int first = blockIdx.y * tile, end = min(first + tile, tokens);
    float speed = -expf(decay[head]), of_decay = 0, of_bias = 0;
    for (int token = first; token < end; token++) {
        const E *row = projected + token * stride;
        E *d_row = d_projected + token * d_stride;
        int64_t at = static_cast<int64_t>(token) * heads + head;
        float written = exact_sigmoid(widen(row[head])), x = widen(row[heads + head]) + bias[head];
        float d_x = d_kept[at] * speed * exact_sigmoid(x);
        narrow(d_written[at] * written * (1.0f - written), d_row[head]);
        narrow(d_x, d_row[heads + head]);
        of_decay += d_kept[at] * speed * softplus(x);
        of_bias += d_x;
    }
    int64_t out = static_cast<int64_t>(blockIdx.y) * heads + head, all = static_cast<int64_t>(gridDim.y) * heads;
    partials[out] = of_decay;
    partials[all + out] = of_bias;
}
#define DELTA_GATES_BACKWARD(E) \
    const E *projected, const float *decay, const float *bias, const float *d_written, const float *d_kept, E *d_projected, \
    float *partials, int tokens, int heads, int64_t stride, int64_t d_stride, int tile
TWINS(delta_gates_backward, DELTA_GATES_BACKWARD, backward(projected, decay, bias, d_written, d_kept, d_projected, partials, tokens,
      heads, stride, d_stride, tile))
