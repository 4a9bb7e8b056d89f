// Rows of tokens in their experts: taken out of the rows of all tokens, and added to them again, a block for each row. A sum over a
// token's experts has one owner, and runs from the first to the last.
#include "common.cuh"

constexpr int THREADS = 256;
// The token of a row that only fills up an expert's rows.
constexpr unsigned NOBODY = 0xffffffffu;

#define COLUMNS(i) for (int i = threadIdx.x; i < width; i += THREADS)

// The row of this block in a matrix.
template <typename E> __device__ __forceinline__ E *own_row(E *x, int stride) {
    return x + static_cast<int64_t>(blockIdx.x) * stride;
}

// rows[i] = x[tokens[i]], or zeros where that is nobody's.
template <typename From, typename To>
__device__ void gather(const From *x, const unsigned *tokens, To *rows, int width) {
    unsigned token = tokens[blockIdx.x];
    const From *from = x + static_cast<int64_t>(token == NOBODY ? 0 : token) * width;
    To *to = own_row(rows, width);
    COLUMNS(i) narrow(token == NOBODY ? 0 : widen(from[i]), to[i]);
}
#define GATHER_TOKENS(E) const E *x, const unsigned *tokens, E *rows, int width
TWINS(gather_tokens, GATHER_TOKENS, gather(x, tokens, rows, width))
#define GATHER_ROUNDED(E) const float *x, const unsigned *tokens, E *rows, int width
TWINS(gather_rounded, GATHER_ROUNDED, gather(x, tokens, rows, width))

// y = x + the sum of the rows of each token, each times its weight.
extern "C" __global__ void add_expert_rows(const float *x, const float *rows, const float *weights, const unsigned *of_token,
                                           float *y, int per_token, int width) {
    const unsigned *own = own_row(of_token, per_token);
    const float *from = own_row(x, width);
    float *to = own_row(y, width);
    COLUMNS(i) {
        float sum = from[i];
        for (int k = 0; k < per_token; k++) sum += weights[own[k]] * rows[static_cast<int64_t>(own[k]) * width + i];
        to[i] = sum;
    }
}
EXPORT(add_expert_rows)

// y = the sum of the rows of each token.
extern "C" __global__ void sum_expert_rows(const float *rows, const unsigned *of_token, float *y, int per_token, int width) {
    const unsigned *own = own_row(of_token, per_token);
    float *to = own_row(y, width);
    COLUMNS(i) {
        float sum = 0;
        for (int k = 0; k < per_token; k++) sum += rows[static_cast<int64_t>(own[k]) * width + i];
        to[i] = sum;
    }
}
EXPORT(sum_expert_rows)

// y += each row times its weight.
extern "C" __global__ void add_weighted_rows(float *y, const float *rows, const float *weights, int width) {
    float weight = weights[blockIdx.x], *to = own_row(y, width);
    const float *from = own_row(rows, width);
    COLUMNS(i) to[i] += weight * from[i];
}
EXPORT(add_weighted_rows)

// Each row times its weight, where it lies.
template <typename E> __device__ void scale_rows(E *rows, const float *weights, int width) {
    float weight = weights[blockIdx.x];
    E *row = own_row(rows, width);
    COLUMNS(i) narrow(weight * widen(row[i]), row[i]);
}
#define SCALE_ROWS(E) E *rows, const float *weights, int width
TWINS(scale_rows, SCALE_ROWS, scale_rows(rows, weights, width))

// Each row times its weight, rounded, to rows that are `stride` apart.
template <typename E> __device__ void weigh_rows(const float *x, const float *weights, E *rows, int width, int stride) {
    float weight = weights[blockIdx.x];
    const float *from = own_row(x, width);
    E *to = own_row(rows, stride);
    COLUMNS(i) narrow(weight * from[i], to[i]);
}
#define WEIGH_ROWS(E) const float *x, const float *weights, E *rows, int width, int stride
TWINS(weigh_rows, WEIGH_ROWS, weigh_rows(x, weights, rows, width, stride))

// Adds to each row the bias of its expert.
template <typename E> __device__ void add_expert_biases(E *rows, const float *biases, const unsigned *experts, int width) {
    const float *bias = biases + static_cast<int64_t>(experts[blockIdx.x]) * width;
    E *row = own_row(rows, width);
    COLUMNS(i) narrow(widen(row[i]) + bias[i], row[i]);
}
#define ADD_EXPERT_BIASES(E) E *rows, const float *biases, const unsigned *experts, int width
TWINS(add_expert_biases, ADD_EXPERT_BIASES, add_expert_biases(rows, biases, experts, width))

// products[i] += the product of each row with the bias of its expert.
template <typename E>
__device__ void add_bias_products(const E *rows, const float *biases, const unsigned *experts, float *products, int width) {
    __shared__ float scratch[THREADS / WARP];
    const float *bias = biases + static_cast<int64_t>(experts[blockIdx.x]) * width;
    const E *row = own_row(rows, width);
    float sum = 0;
    COLUMNS(i) sum += widen(row[i]) * bias[i];
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) products[blockIdx.x] += sum;
}
#define ADD_BIAS_PRODUCTS(E) const E *rows, const float *biases, const unsigned *experts, float *products, int width
TWINS(add_bias_products, ADD_BIAS_PRODUCTS, add_bias_products(rows, biases, experts, products, width))

// x = sigmoid(x)
extern "C" __global__ void sigmoid_in_place(float *x, int64_t n) { EACH(i, n) x[i] = 1.0f / (1.0f + __expf(-x[i])); }
EXPORT(sigmoid_in_place)

// The gradient of what goes through a sigmoid to a row's weight, from that of the weighted row: weight (1 - weight) dy · row. Numbers
// of the result are `stride` apart.
template <typename E>
__device__ void gate_gradient(const float *dy, const float *rows, const float *weights, E *d_gate, int width, int stride) {
    __shared__ float scratch[THREADS / WARP];
    const float *a = own_row(dy, width), *b = own_row(rows, width);
    float sum = 0, weight = weights[blockIdx.x];
    COLUMNS(i) sum += a[i] * b[i];
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) narrow(sum * weight * (1.0f - weight), *own_row(d_gate, stride));
}
#define GATE_GRADIENT(E) const float *dy, const float *rows, const float *weights, E *d_gate, int width, int stride
TWINS(gate_gradient, GATE_GRADIENT, gate_gradient(dy, rows, weights, d_gate, width, stride))
