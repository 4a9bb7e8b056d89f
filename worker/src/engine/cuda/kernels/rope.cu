// Rotary positions (Su et al., 2021) on queries and keys, with the norm of each head, or of all heads together, before it where the
// model has one. A warp for each head of each token; values pass through, and so does what a head has behind its rotated
// dimensions.
#include "common.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// A row of qkv: the heads of the queries, those of the keys, those of the values.
struct Heads {
    int queries, keys, dimension;

    __device__ int normed() const { return queries + keys; }
    __device__ int all() const { return queries + 2 * keys; }
};

// Which heads have a root mean square together; the numbers are those of ops/rope.rs.
enum Kind { NONE, EACH_HEAD, ALL_HEADS };

// The norms of queries and keys, which multiply by weight + offset.
struct Norms {
    const float *query, *key;
    float epsilon, offset;
    int kind;

    // The weights of a head.
    __device__ const float *of(Heads heads, int head) const {
        bool is_query = head < heads.queries;
        const float *weight = is_query ? query : key;
        return kind == ALL_HEADS ? weight + (is_query ? head : head - heads.queries) * heads.dimension : weight;
    }
};

// How the first 2 half dimensions of a head turn, none where half is 0: dimension i with i + half, or neighbours.
struct Rotation {
    // The row of each token in the tables of cosines and sines, which have `half` columns.
    const unsigned *rows;
    const float *cos, *sin;
    int half, neighbours;

    __device__ int64_t row(int token) const { return static_cast<int64_t>(rows[token]) * half; }
    __device__ int first(int pair) const { return neighbours ? 2 * pair : pair; }
    __device__ int second(int pair) const { return neighbours ? 2 * pair + 1 : pair + half; }

    // The gradient of a head's dimension i before it was turned by a row, from those after.
    template <typename E> __device__ float back(const E *g, int i, int64_t row) const {
        float own = widen(g[i]);
        if (i >= 2 * half) return own;
        int pair = neighbours ? i / 2 : i % half;
        bool is_first = i == first(pair);
        float other = widen(g[is_first ? second(pair) : first(pair)]);
        float c = cos[row + pair], s = sin[row + pair];
        return is_first ? own * c + other * s : own * c - other * s;
    }
};

#define NORMS const float *query_norm, const float *key_norm, float epsilon, float offset, int kind
#define ROTATION const unsigned *rows, const float *cos, const float *sin, int half, int neighbours
#define HEADS int queries, int keys, int dimension
#define NORMS_OF Norms{query_norm, key_norm, epsilon, offset, kind}
#define ROTATION_OF Rotation{rows, cos, sin, half, neighbours}
#define HEADS_OF Heads{queries, keys, dimension}

// Of norms of all heads together, a block for the queries of a token and one for its keys: inverses[token][which] is the inverse
// root mean square, and with gradients inverses[token][2 + which] the factor of x in the gradient of x.
template <typename E>
__device__ void rope_inverses(const E *qkv, const E *dy, float *inverses, Norms norms, Rotation rotation, Heads heads,
                              bool has_gradient) {
    __shared__ float scratch[WARPS];
    int token = blockIdx.x, which = blockIdx.y, width = (which == 0 ? heads.queries : heads.keys) * heads.dimension;
    int64_t first = (static_cast<int64_t>(token) * heads.all() + which * heads.queries) * heads.dimension;
    const float *weight = which == 0 ? norms.query : norms.key;
    float squares = 0, products = 0;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float x = widen(qkv[first + i]);
        squares += x * x;
        if (!has_gradient) continue;
        int column = i % heads.dimension;
        float turned = rotation.back(dy + first + i - column, column, rotation.row(token));
        products += turned * (weight[i] + norms.offset) * x;
    }
    float inverse = rsqrtf(block_sum<THREADS>(squares, scratch) / width + norms.epsilon);
    products = block_sum<THREADS>(products, scratch);
    if (threadIdx.x != 0) return;
    inverses[static_cast<int64_t>(token) * 4 + which] = inverse;
    if (has_gradient) inverses[static_cast<int64_t>(token) * 4 + 2 + which] = inverse * inverse * inverse * (products / width);
}
#define ROPE_INVERSES(E) const E *qkv, const E *dy, float *inverses, NORMS, ROTATION, HEADS, int has_gradient
TWINS(rope_inverses, ROPE_INVERSES, rope_inverses(qkv, dy, inverses, NORMS_OF, ROTATION_OF, HEADS_OF, has_gradient))

// Lane `i` of a head holds the pairs i, i + 32, ..., and every 32nd of the dimensions behind them. `inverses` are read where all
// heads have a norm together.
template <typename E>
__device__ void rope_forward(const E *qkv, E *y, const float *inverses, Norms norms, Rotation rotation, Heads heads) {
    int token = blockIdx.x, head = blockIdx.y * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= heads.all()) return;
    int64_t begin = (static_cast<int64_t>(token) * heads.all() + head) * heads.dimension;
    const E *x = qkv + begin;
    E *out = y + begin;
    if (head >= heads.normed()) {
        for (int i = lane; i < heads.dimension; i += WARP) out[i] = x[i];
        return;
    }
    const float *weight = norms.of(heads, head);
    float inverse = 1;
    if (norms.kind == EACH_HEAD) {
        float sum = 0;
        for (int i = lane; i < heads.dimension; i += WARP) sum += widen(x[i]) * widen(x[i]);
        inverse = rsqrtf(warp_sum(sum) / heads.dimension + norms.epsilon);
    }
    if (norms.kind == ALL_HEADS) inverse = inverses[static_cast<int64_t>(token) * 4 + (head >= heads.queries)];
    auto value = [&](int i) {
        float wide = widen(x[i]);
        return norms.kind == NONE ? wide : (weight[i] + norms.offset) * (wide * inverse);
    };
    int64_t row = rotation.row(token);
    for (int pair = lane; pair < rotation.half; pair += WARP) {
        int first = rotation.first(pair), second = rotation.second(pair);
        float a = value(first), b = value(second), c = rotation.cos[row + pair], s = rotation.sin[row + pair];
        narrow(a * c - b * s, out[first]);
        narrow(b * c + a * s, out[second]);
    }
    for (int i = 2 * rotation.half + lane; i < heads.dimension; i += WARP) narrow(value(i), out[i]);
}
#define ROPE_FORWARD(E) const E *qkv, E *y, const float *inverses, NORMS, ROTATION, HEADS
TWINS(rope_forward, ROPE_FORWARD, rope_forward(qkv, y, inverses, NORMS_OF, ROTATION_OF, HEADS_OF))

// From the gradient of the result to that of qkv, whose rows are `stride` apart: rotated back, then through the norm. The
// inverse of each head's root mean square is kept for the gradient of the norms' weights, where each head has its own; those of
// all heads together are read.
template <typename E>
__device__ void rope_backward(const E *qkv, const E *dy, E *d_qkv, float *inverses, Norms norms, Rotation rotation,
                              Heads heads, int stride) {
    int token = blockIdx.x, head = blockIdx.y * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= heads.all()) return;
    int64_t begin = (static_cast<int64_t>(token) * heads.all() + head) * heads.dimension;
    const E *x = qkv + begin;
    const E *g = dy + begin;
    E *dx = d_qkv + static_cast<int64_t>(token) * stride + head * heads.dimension;
    if (head >= heads.normed()) {
        for (int i = lane; i < heads.dimension; i += WARP) dx[i] = g[i];
        return;
    }
    int64_t row = rotation.row(token);
    const float *weight = norms.of(heads, head);
    // Calls `each` with the first and second dimension of a pair, and their gradients before they were turned.
    auto pairs = [&](auto each) {
        for (int pair = lane; pair < rotation.half; pair += WARP) {
            int first = rotation.first(pair), second = rotation.second(pair);
            float c = rotation.cos[row + pair], s = rotation.sin[row + pair];
            float ga = widen(g[first]), gb = widen(g[second]);
            each(first, second, ga * c + gb * s, gb * c - ga * s);
        }
    };
    float inverse = 1, factor = 0;
    if (norms.kind == EACH_HEAD) {
        float squares = 0, products = 0;
        pairs([&](int first, int second, float da, float db) {
            float a = widen(x[first]), b = widen(x[second]);
            squares += a * a + b * b;
            products += da * (weight[first] + norms.offset) * a + db * (weight[second] + norms.offset) * b;
        });
        for (int i = 2 * rotation.half + lane; i < heads.dimension; i += WARP) {
            float a = widen(x[i]);
            squares += a * a;
            products += widen(g[i]) * (weight[i] + norms.offset) * a;
        }
        inverse = rsqrtf(warp_sum(squares) / heads.dimension + norms.epsilon);
        factor = inverse * inverse * inverse * (warp_sum(products) / heads.dimension);
        if (lane == 0) inverses[static_cast<int64_t>(token) * heads.normed() + head] = inverse;
    }
    if (norms.kind == ALL_HEADS) {
        const float *of_token = inverses + static_cast<int64_t>(token) * 4 + (head >= heads.queries);
        inverse = of_token[0];
        factor = of_token[2];
    }
    auto store = [&](int i, float d) {
        if (norms.kind != NONE) d = d * (weight[i] + norms.offset) * inverse - widen(x[i]) * factor;
        narrow(d, dx[i]);
    };
    pairs([&](int first, int second, float da, float db) {
        store(first, da);
        store(second, db);
    });
    for (int i = 2 * rotation.half + lane; i < heads.dimension; i += WARP) store(i, widen(g[i]));
}
#define ROPE_BACKWARD(E) const E *qkv, const E *dy, E *d_qkv, float *inverses, NORMS, ROTATION, HEADS, int stride
TWINS(rope_backward, ROPE_BACKWARD, rope_backward(qkv, dy, d_qkv, inverses, NORMS_OF, ROTATION_OF, HEADS_OF, stride))

// Of the norms of each head, over `tile` tokens each: partials[t][which][i], queries' weight first. A thread for each scalar
// of a head, a block row for queries and one for keys.
template <typename E>
__device__ void rope_norm_gradient(const E *qkv, const E *dy, const float *inverses, float *partials, Rotation rotation,
                                   Heads heads, int tokens, int tile) {
    int i = threadIdx.x;
    if (i >= heads.dimension) return;
    int begin = blockIdx.y == 0 ? 0 : heads.queries;
    int end = blockIdx.y == 0 ? heads.queries : heads.normed();
    float sum = 0;
    for (int token = blockIdx.x * tile; token < min(static_cast<int>(blockIdx.x + 1) * tile, tokens); token++) {
        int64_t row = rotation.row(token);
        for (int head = begin; head < end; head++) {
            int64_t first = (static_cast<int64_t>(token) * heads.all() + head) * heads.dimension;
            float inverse = inverses[static_cast<int64_t>(token) * heads.normed() + head];
            sum += rotation.back(dy + first, i, row) * (widen(qkv[first + i]) * inverse);
        }
    }
    partials[(static_cast<int64_t>(blockIdx.x) * 2 + blockIdx.y) * heads.dimension + i] = sum;
}
#define ROPE_NORM_GRADIENT(E) \
    const E *qkv, const E *dy, const float *inverses, float *partials, ROTATION, HEADS, int tokens, int tile
TWINS(rope_norm_gradient, ROPE_NORM_GRADIENT, rope_norm_gradient(qkv, dy, inverses, partials, ROTATION_OF, HEADS_OF, tokens,
      tile))

// Of the norms of all heads together, over `tile` tokens each: partials[t][i], the weight of the queries first. A thread for each
// scalar of the queries and keys of a token.
template <typename E>
__device__ void rope_wide_norm_gradient(const E *qkv, const E *dy, const float *inverses, float *partials, Rotation rotation,
                                        Heads heads, int tokens, int tile) {
    int column = blockIdx.x * blockDim.x + threadIdx.x, width = heads.normed() * heads.dimension;
    if (column >= width) return;
    int i = column % heads.dimension, which = column >= heads.queries * heads.dimension;
    int first = blockIdx.y * tile;
    int end = min(first + tile, tokens);
    float sum = 0;
    for (int token = first; token < end; token++) {
        int64_t at = static_cast<int64_t>(token) * heads.all() * heads.dimension + column;
        float turned = rotation.back(dy + at - i, i, rotation.row(token));
        sum += turned * (widen(qkv[at]) * inverses[static_cast<int64_t>(token) * 4 + which]);
    }
    partials[static_cast<int64_t>(blockIdx.y) * width + column] = sum;
}
#define ROPE_WIDE_NORM_GRADIENT(E) \
    const E *qkv, const E *dy, const float *inverses, float *partials, ROTATION, HEADS, int tokens, int tile
TWINS(rope_wide_norm_gradient, ROPE_WIDE_NORM_GRADIENT, rope_wide_norm_gradient(qkv, dy, inverses, partials, ROTATION_OF,
      HEADS_OF, tokens, tile))
