// One pass each over flat scalars or rows: rounding, adding, sums of columns, gates, rows by number.
#include "gates.cuh"

// Rows of `columns`, `from_stride` and `to_stride` apart: to = scale * from.
template <typename E>
__device__ void narrow_rows(const float *from, E *to, int64_t rows, int columns, int from_stride, int to_stride,
                            float scale) {
    EACH(i, rows * columns) {
        int64_t row = i / columns, column = i % columns;
        narrow(scale * from[row * from_stride + column], to[row * to_stride + column]);
    }
}
#define NARROW_ROWS(E) const float *from, E *to, int64_t rows, int columns, int from_stride, int to_stride, float scale
TWINS(narrow_rows, NARROW_ROWS, narrow_rows(from, to, rows, columns, from_stride, to_stride, scale))

// sum += x
#define ADD_IN_PLACE(E) E *sum, const E *x, int64_t n
TWINS(add_in_place, ADD_IN_PLACE, EACH(i, n) narrow(widen(sum[i]) + widen(x[i]), sum[i]))

// Adds scale * row to every row of y.
template <typename E>
__device__ void add_to_rows(E *y, const float *row, int64_t rows, int columns, int stride, float scale) {
    EACH(i, rows * columns) {
        E &out = y[i / columns * stride + i % columns];
        narrow(widen(out) + scale * row[i % columns], out);
    }
}
#define ADD_TO_ROWS(E) E *y, const float *row, int64_t rows, int columns, int stride, float scale
TWINS(add_to_rows, ADD_TO_ROWS, add_to_rows(y, row, rows, columns, stride, scale))

// Sums over `tile` rows each, in order; a thread for each column. partials[t][c]
template <typename E>
__device__ void tile_sums(const E *x, float *partials, int rows, int columns, int stride, int tile) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    int first = blockIdx.y * tile;
    int end = min(first + tile, rows);
    float sum = 0;
    for (int row = first; row < end; row++) sum += widen(x[static_cast<int64_t>(row) * stride + column]);
    partials[static_cast<int64_t>(blockIdx.y) * columns + column] = sum;
}
#define TILE_SUMS(E) const E *x, float *partials, int rows, int columns, int stride, int tile
TWINS(tile_sums, TILE_SUMS, tile_sums(x, partials, rows, columns, stride, tile))

// gate_up is [tokens, 2 * width], the gates first; rows of h are `stride` apart. h = activation(gate) * up (Shazeer, 2020)
template <typename E>
__device__ void swiglu_forward(const E *gate_up, E *h, int64_t tokens, int width, int stride, int activation) {
    EACH(i, tokens * width) {
        int64_t token = i / width, column = i % width;
        float g = widen(gate_up[token * 2 * width + column]), u = widen(gate_up[token * 2 * width + width + column]);
        narrow(Gate(g, activation).value * u, h[token * stride + column]);
    }
}
#define SWIGLU_FORWARD(E) const E *gate_up, E *h, int64_t tokens, int width, int stride, int activation
TWINS(swiglu_forward, SWIGLU_FORWARD, swiglu_forward(gate_up, h, tokens, width, stride, activation))

// Rows of d_gate_up are `d_stride` apart, of h `h_stride`; h is what the forward pass had.
template <typename E>
__device__ void swiglu_backward(const E *gate_up, const E *dh, E *d_gate_up, E *h, int64_t tokens, int width,
                                int d_stride, int h_stride, int activation) {
    EACH(i, tokens * width) {
        int64_t token = i / width, column = i % width;
        float g = widen(gate_up[token * 2 * width + column]), u = widen(gate_up[token * 2 * width + width + column]);
        float d = widen(dh[i]);
        Gate gate(g, activation);
        narrow(gate.value * u, h[token * h_stride + column]);
        narrow(d * u * gate.slope, d_gate_up[token * d_stride + column]);
        narrow(d * gate.value, d_gate_up[token * d_stride + width + column]);
    }
}
#define SWIGLU_BACKWARD(E) \
    const E *gate_up, const E *dh, E *d_gate_up, E *h, int64_t tokens, int width, int d_stride, int h_stride, int activation
TWINS(swiglu_backward, SWIGLU_BACKWARD, swiglu_backward(gate_up, dh, d_gate_up, h, tokens, width, d_stride, h_stride,
      activation))

// out[i] = scale * x[rows[i]]
template <typename E>
__device__ void gather_rows(const E *x, const unsigned *rows, float *out, int64_t count, int width, float scale) {
    EACH(i, count * width) out[i] = scale * widen(x[static_cast<int64_t>(rows[i / width]) * width + i % width]);
}
#define GATHER_ROWS(E) const E *x, const unsigned *rows, float *out, int64_t count, int width, float scale
TWINS(gather_rows, GATHER_ROWS, gather_rows(x, rows, out, count, width, scale))

// out[rows[i]] += x[i]; no two rows are the same.
extern "C" __global__ void scatter_rows(const float *x, const unsigned *rows, float *out, int64_t count, int width) {
    EACH(i, count * width) out[static_cast<int64_t>(rows[i / width]) * width + i % width] += x[i];
}
EXPORT(scatter_rows)

// A block for each group of tokens with the same id: out[group] = scale * sum of their rows, in the order of `tokens`.
// `ends` says where each group ends in `tokens`.
extern "C" __global__ void embedding_gradient(const float *gradient, const unsigned *tokens, const unsigned *ends,
                                              float *out, int width, float scale) {
    unsigned first = blockIdx.x == 0 ? 0 : ends[blockIdx.x - 1];
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
        float sum = 0;
        for (unsigned i = first; i < ends[blockIdx.x]; i++)
            sum += gradient[static_cast<int64_t>(tokens[i]) * width + column];
        out[static_cast<int64_t>(blockIdx.x) * width + column] = scale * sum;
    }
}
EXPORT(embedding_gradient)
