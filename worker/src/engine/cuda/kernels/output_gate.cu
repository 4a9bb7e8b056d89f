// A gate of what attention gives, y = context sigmoid(gate), which is projected with the queries, behind the query of each head.
#include "gates.cuh"

// Where a column of a projection goes: to which column of queries, keys and values, or beyond these of the gates.
struct Place {
    int column;
    bool is_gate;

    __device__ __forceinline__ Place(int from, int gated, int size) {
        bool is_head = from < 2 * gated;
        is_gate = is_head && from / size % 2 == 1;
        column = is_head ? from / (2 * size) * size + from % size : from - gated;
    }
};

// Takes rows of `width` and `gated` columns together apart. `gated` are heads by their `size`.
template <typename E>
__device__ void split(const E *projected, E *qkv, E *gates, int64_t tokens, int width, int gated, int size) {
    int columns = width + gated;
    EACH(i, tokens * columns) {
        int64_t token = i / columns;
        Place place(static_cast<int>(i % columns), gated, size);
        if (place.is_gate) gates[token * gated + place.column] = projected[i];
        else qkv[token * width + place.column] = projected[i];
    }
}
#define OUTPUT_GATE_SPLIT(E) const E *projected, E *qkv, E *gates, int64_t tokens, int width, int gated, int size
TWINS(output_gate_split, OUTPUT_GATE_SPLIT, split(projected, qkv, gates, tokens, width, gated, size))

// Puts them together again, in rows that are `stride` apart.
template <typename E>
__device__ void join(const E *qkv, const E *gates, E *projected, int64_t tokens, int width, int gated, int size, int64_t stride) {
    int columns = width + gated;
    EACH(i, tokens * columns) {
        int64_t token = i / columns;
        int column = static_cast<int>(i % columns);
        Place place(column, gated, size);
        projected[token * stride + column] = place.is_gate ? gates[token * gated + place.column] : qkv[token * width + place.column];
    }
}
#define OUTPUT_GATE_JOIN(E) \
    const E *qkv, const E *gates, E *projected, int64_t tokens, int width, int gated, int size, int64_t stride
TWINS(output_gate_join, OUTPUT_GATE_JOIN, join(qkv, gates, projected, tokens, width, gated, size, stride))

// Rows of y are `stride` apart.
template <typename E>
__device__ void forward(const E *context, const E *gates, E *y, int64_t tokens, int columns, int64_t stride) {
    EACH(i, tokens * columns) narrow(widen(context[i]) * sigmoid(widen(gates[i])), y[i / columns * stride + i % columns]);
}
#define OUTPUT_GATE_FORWARD(E) const E *context, const E *gates, E *y, int64_t tokens, int columns, int64_t stride
TWINS(output_gate_forward, OUTPUT_GATE_FORWARD, forward(context, gates, y, tokens, columns, stride))

// Turns the gradient of y into that of the context.
template <typename E> __device__ void backward(const E *context, const E *gates, E *dy, E *d_gates, int64_t n) {
    EACH(i, n) {
        float open = sigmoid(widen(gates[i])), d = widen(dy[i]);
        narrow(d * widen(context[i]) * open * (1.0f - open), d_gates[i]);
        narrow(d * open, dy[i]);
    }
}
#define OUTPUT_GATE_BACKWARD(E) const E *context, const E *gates, E *dy, E *d_gates, int64_t n
TWINS(output_gate_backward, OUTPUT_GATE_BACKWARD, backward(context, gates, dy, d_gates, n))
