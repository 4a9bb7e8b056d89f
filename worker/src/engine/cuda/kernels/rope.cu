// Rotary positions (Su et al., 2021) on queries and keys, with the norm of each head before it where the model has one.
// A warp for each head of each token; values pass through.
#include "common.cuh"

constexpr int WARPS = 4;

struct Heads {
    int queries, keys, dimension;
};

// Lane `i` of a head holds the pairs (i, i + half), (i + 32, i + 32 + half), ...
template <typename E>
__device__ void rope_forward(const E *qkv, E *y, const float *query_norm, const float *key_norm,
                             const unsigned *positions, const float *cos, const float *sin, Heads heads, float epsilon,
                             bool normed) {
    int all = heads.queries + 2 * heads.keys, half = heads.dimension / 2;
    int head = blockIdx.y * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= all) return;
    int64_t first = (static_cast<int64_t>(blockIdx.x) * all + head) * heads.dimension;
    const E *x = qkv + first;
    E *out = y + first;
    if (head >= heads.queries + heads.keys) {
        for (int i = lane; i < heads.dimension; i += WARP) out[i] = x[i];
        return;
    }
    const float *weight = head < heads.queries ? query_norm : key_norm;
    float inverse = 1;
    if (normed) {
        float sum = 0;
        for (int i = lane; i < heads.dimension; i += WARP) sum += widen(x[i]) * widen(x[i]);
        inverse = rsqrtf(warp_sum(sum) / heads.dimension + epsilon);
    }
    int64_t row = static_cast<int64_t>(positions[blockIdx.x]) * half;
    for (int i = lane; i < half; i += WARP) {
        float a = widen(x[i]), b = widen(x[i + half]);
        if (normed) {
            a = weight[i] * (a * inverse);
            b = weight[i + half] * (b * inverse);
        }
        float c = cos[row + i], s = sin[row + i];
        narrow(a * c - b * s, out[i]);
        narrow(b * c + a * s, out[i + half]);
    }
}
#define ROPE_FORWARD(E) \
    const E *qkv, E *y, const float *query_norm, const float *key_norm, const unsigned *positions, const float *cos, \
    const float *sin, int queries, int keys, int dimension, float epsilon, int normed
TWINS(rope_forward, ROPE_FORWARD, rope_forward(qkv, y, query_norm, key_norm, positions, cos, sin, Heads{queries, keys, dimension},
      epsilon, normed))

// From the gradient of the result to that of qkv, whose rows are `stride` apart: rotated back, then through the norm. The
// inverse of each head's root mean square is kept for the gradient of the norms' weights.
template <typename E>
__device__ void rope_backward(const E *qkv, const E *dy, E *d_qkv, float *inverses, const float *query_norm,
                              const float *key_norm, const unsigned *positions, const float *cos, const float *sin,
                              Heads heads, int stride, float epsilon, bool normed) {
    int all = heads.queries + 2 * heads.keys, half = heads.dimension / 2;
    int head = blockIdx.y * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= all) return;
    int64_t first = (static_cast<int64_t>(blockIdx.x) * all + head) * heads.dimension;
    const E *x = qkv + first;
    const E *g = dy + first;
    E *dx = d_qkv + static_cast<int64_t>(blockIdx.x) * stride + head * heads.dimension;
    if (head >= heads.queries + heads.keys) {
        for (int i = lane; i < heads.dimension; i += WARP) dx[i] = g[i];
        return;
    }
    int64_t row = static_cast<int64_t>(positions[blockIdx.x]) * half;
    const float *weight = head < heads.queries ? query_norm : key_norm;
    float inverse = 1, factor = 0;
    if (normed) {
        float squares = 0, products = 0;
        for (int i = lane; i < half; i += WARP) {
            float a = widen(x[i]), b = widen(x[i + half]), c = cos[row + i], s = sin[row + i];
            squares += a * a + b * b;
            float da = widen(g[i]), db = widen(g[i + half]);
            products += (da * c + db * s) * weight[i] * a + (db * c - da * s) * weight[i + half] * b;
        }
        inverse = rsqrtf(warp_sum(squares) / heads.dimension + epsilon);
        factor = inverse * inverse * inverse * (warp_sum(products) / heads.dimension);
        if (lane == 0) inverses[static_cast<int64_t>(blockIdx.x) * (heads.queries + heads.keys) + head] = inverse;
    }
    for (int i = lane; i < half; i += WARP) {
        float c = cos[row + i], s = sin[row + i];
        float ga = widen(g[i]), gb = widen(g[i + half]);
        float da = ga * c + gb * s, db = gb * c - ga * s;
        if (normed) {
            da = da * weight[i] * inverse - widen(x[i]) * factor;
            db = db * weight[i + half] * inverse - widen(x[i + half]) * factor;
        }
        narrow(da, dx[i]);
        narrow(db, dx[i + half]);
    }
}
#define ROPE_BACKWARD(E) \
    const E *qkv, const E *dy, E *d_qkv, float *inverses, const float *query_norm, const float *key_norm, \
    const unsigned *positions, const float *cos, const float *sin, int queries, int keys, int dimension, int stride, \
    float epsilon, int normed
TWINS(rope_backward, ROPE_BACKWARD, rope_backward(qkv, dy, d_qkv, inverses, query_norm, key_norm, positions, cos, sin,
      Heads{queries, keys, dimension}, stride, epsilon, normed))

// Of the heads' norms, over `tile` tokens each: partials[t][which][i], queries' weight first. A thread for each scalar of a
// head, a block row for queries and one for keys.
template <typename E>
__device__ void rope_norm_gradient(const E *qkv, const E *dy, const float *inverses, float *partials,
                                   const unsigned *positions, const float *cos, const float *sin, Heads heads,
                                   int tokens, int tile) {
    int i = threadIdx.x, half = heads.dimension / 2, all = heads.queries + 2 * heads.keys;
    if (i >= heads.dimension) return;
    int begin = blockIdx.y == 0 ? 0 : heads.queries;
    int end = blockIdx.y == 0 ? heads.queries : heads.queries + heads.keys;
    float sum = 0;
    for (int token = blockIdx.x * tile; token < min(static_cast<int>(blockIdx.x + 1) * tile, tokens); token++) {
        int64_t row = static_cast<int64_t>(positions[token]) * half + i % half;
        float c = cos[row], s = sin[row];
        for (int head = begin; head < end; head++) {
            int64_t first = (static_cast<int64_t>(token) * all + head) * heads.dimension;
            float own = widen(dy[first + i]), other = widen(dy[first + (i < half ? i + half : i - half)]);
            float turned = i < half ? own * c + other * s : own * c - other * s;
            float inverse = inverses[static_cast<int64_t>(token) * (heads.queries + heads.keys) + head];
            sum += turned * (widen(qkv[first + i]) * inverse);
        }
    }
    partials[(static_cast<int64_t>(blockIdx.x) * 2 + blockIdx.y) * heads.dimension + i] = sum;
}
#define ROPE_NORM_GRADIENT(E) \
    const E *qkv, const E *dy, const float *inverses, float *partials, const unsigned *positions, const float *cos, \
    const float *sin, int queries, int keys, int dimension, int tokens, int tile
TWINS(rope_norm_gradient, ROPE_NORM_GRADIENT, rope_norm_gradient(qkv, dy, inverses, partials, positions, cos, sin,
      Heads{queries, keys, dimension}, tokens, tile))
