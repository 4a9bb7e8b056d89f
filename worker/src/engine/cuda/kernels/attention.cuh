// What attention forward and backward share: where heads lie, and what a warp's rows see.
#pragma once
#include "mma.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr float LOG2_E = 1.4426950408889634f;

// A row of qkv: the heads of the queries, those of the keys, those of the values.
struct Heads {
    int queries, keys, dimension;

    __device__ int width() const { return (queries + 2 * keys) * dimension; }
    __device__ int group() const { return queries / keys; }
    // Of the head that a query head looks at.
    __device__ int key_column(int head) const { return (queries + head / group()) * dimension; }
    __device__ int value_column(int head) const { return (queries + keys + head / group()) * dimension; }
};

// Of the tokens of this lane's rows among a warp's rows from `first`; `absent` beyond the last token.
template <int M, typename From, typename To>
__device__ __forceinline__ void row_values(To (&values)[M][2], const From *of_tokens, int first, int tokens, To absent) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + m * 16 + half * 8 + threadIdx.x % WARP / 4;
            values[m][half] = row < tokens ? static_cast<To>(of_tokens[row]) : absent;
        }
}

// Consecutive queries of a warp: the first sees from `first_start` on, the last from `last_start` to itself.
struct WarpRows {
    int first, last, first_start, last_start;

    __device__ __forceinline__ WarpRows(const unsigned *starts, int row, int rows, int tokens)
        : first(row), last(min(row + rows, tokens) - 1), first_start(0), last_start(0) {
        if (first > last) return;
        first_start = starts[first];
        last_start = starts[last];
    }
    // Whether all of them see none, or all, of `count` keys.
    __device__ __forceinline__ bool none(int key, int count) const {
        return key > last || key + count <= first_start || first > last;
    }
    __device__ __forceinline__ bool all(int key, int count) const { return key >= last_start && key + count - 1 <= first; }
};

// Scores become -inf where `is_hidden(row, column, border)`; `borders` are those of this lane's rows.
template <int M, int N, typename Hidden>
__device__ __forceinline__ void hide(float (&scores)[M][N][4], const int (&borders)[M][2], int first_row, int first_column,
                                     Hidden is_hidden) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = first_row + m * 16 + i / 2 * 8 + lane / 4, column = first_column + n * 8 + lane % 4 * 2 + i % 2;
                if (is_hidden(row, column, borders[m][i / 2])) scores[m][n][i] = -INFINITY;
            }
}

// Scores x become tanh(factor x): a soft cap (Gemma Team, 2024) makes cap tanh(scale x / cap) of them, and what follows multiplies
// by the cap where it would multiply by the scale.
template <int M, int N> __device__ __forceinline__ void limit(float (&scores)[M][N][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[m][n][i] = fast_tanh(scores[m][n][i] * factor);
}

// The slope of tanh where it is t; 0 for scores that nobody sees, which are -inf.
__device__ __forceinline__ float slope_at(float t) { return fmaxf(1.0f - t * t, 0.0f); }

// Scores that nobody sees become -inf. Rows beyond the last token are nobody's.
template <int M, int N>
__device__ __forceinline__ void mask(float (&scores)[M][N][4], const unsigned *starts, int tokens, int first_row,
                                     int first_key) {
    int row_starts[M][2];
    row_values(row_starts, starts, first_row, tokens, tokens);
    hide(scores, row_starts, first_row, first_key, [](int row, int key, int start) { return key > row || key < start; });
}
