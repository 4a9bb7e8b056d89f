// The gated delta rule chunk by chunk (engine/ops/delta_rule): where chunks lie, and products of their matrices in tiles.
//
// All of it is float32, on the plain cores: states, decays, and what the system of a chunk is solved for lose too much in bfloat16.
#pragma once
#include "common.cuh"

// Tokens of a chunk; that of common/src/memory.
constexpr int CHUNK = 64;
constexpr int THREADS = 128, WARPS = THREADS / WARP;
// A tile of a result is CHUNK rows by COLUMNS, of which each thread has PART by PART. Operands come in slabs of DEPTH.
constexpr int COLUMNS = 32, PART = 4, DEPTH = 32;
constexpr int ROW_STRIDE = DEPTH + 1, TILE_STRIDE = COLUMNS + 4;
constexpr unsigned NONE = 0xffffffffu;

// Tokens that follow each other in a segment. `before` and `behind` are the numbers of the states at the chunk's borders, none at
// those of the segment.
struct Chunk {
    unsigned first, rows, before, behind;
};

struct DeltaHeads {
    int key_heads, value_heads, key_dim, value_dim;

    __device__ __forceinline__ int width() const { return 2 * key_heads * key_dim + values(); }
    __device__ __forceinline__ int values() const { return value_heads * value_dim; }
    __device__ __forceinline__ int group() const { return value_heads / key_heads; }
    __device__ __forceinline__ int query(int key_head) const { return key_head * key_dim; }
    __device__ __forceinline__ int key(int key_head) const { return (key_heads + key_head) * key_dim; }
    __device__ __forceinline__ int value(int head) const { return 2 * key_heads * key_dim + head * value_dim; }
    // The scalars of a state, that of a head behind that of another.
    __device__ __forceinline__ int64_t state(unsigned number, int head) const {
        return (static_cast<int64_t>(number) * value_heads + head) * key_dim * value_dim;
    }
};

// What is left, of its logarithm; nothing where that is below what is far beyond the last place of anything that is read.
__device__ __forceinline__ float left_of(float log) { return log < -50.0f ? 0.0f : expf(log); }

// A sum of logarithms from the beginning of a chunk on, and what float32 leaves out of it: between two that are large lie small
// differences.
struct Sum {
    float near, rest;
};

// What is left of a row at a later one.
__device__ __forceinline__ float left_between(Sum later, Sum row) { return left_of((later.near - row.near) + (later.rest - row.rest)); }

// A matrix in memory, whose rows may have factors. Beyond its borders there are zeros.
struct Matrix {
    const float *start;
    int64_t stride;
    int rows, columns;
    const float *factors;

    __device__ __forceinline__ float at(int row, int column) const {
        if (row >= rows || column >= columns) return 0;
        float x = start[row * stride + column];
        return factors ? factors[row] * x : x;
    }
    // From a column on.
    __device__ __forceinline__ Matrix from_column(int column) const {
        return {start + column, stride, rows, columns - column, factors};
    }
    __device__ __forceinline__ Matrix from_row(int row) const {
        return {start + row * stride, stride, rows - row, columns, factors ? factors + row : nullptr};
    }
    __device__ __forceinline__ Matrix times(const float *of_rows) const {
        return {start, stride, rows, columns, of_rows};
    }
};

// `rows` by `columns` of an array that has `stride` scalars for each token.
__device__ __forceinline__ Matrix rows_of(const float *x, Chunk chunk, int64_t stride, int column, int columns) {
    return {x + chunk.first * stride + column, stride, static_cast<int>(chunk.rows), columns, nullptr};
}

// Pairs of a chunk's rows, of a head.
__device__ __forceinline__ Matrix pairs_of(const float *x, Chunk chunk, DeltaHeads heads, int head) {
    return rows_of(x, chunk, static_cast<int64_t>(heads.value_heads) * CHUNK, head * CHUNK, chunk.rows);
}

// Four scalars that are loaded at once.
struct alignas(16) Four {
    float x[PART];
};

// The first of a thread's rows and columns in a tile: eight threads have the same rows, and are in one warp.
__device__ __forceinline__ int own_row() { return threadIdx.x / (COLUMNS / PART) * PART; }
__device__ __forceinline__ int own_column() { return threadIdx.x % (COLUMNS / PART) * PART; }

// A thread's part of a tile.
struct Tile {
    float sum[PART][PART] = {};

    // Adds the product of a slab of rows with rows of a tile in shared memory.
    __device__ __forceinline__ void add(const float *slab, const float *tile, int depth) {
        slab += own_row() * ROW_STRIDE;
        tile += own_column();
#pragma unroll 8
        for (int k = 0; k < depth; k++) {
            Four b = *reinterpret_cast<const Four *>(tile + k * TILE_STRIDE);
#pragma unroll
            for (int r = 0; r < PART; r++) {
                float a = slab[r * ROW_STRIDE + k];
#pragma unroll
                for (int c = 0; c < PART; c++) sum[r][c] += a * b.x[c];
            }
        }
    }
};

#define EACH_OWN(r, c) \
    _Pragma("unroll") for (int r = 0; r < PART; r++) _Pragma("unroll") for (int c = 0; c < PART; c++)

// Loads a slab of the left factor; where it is turned, rows are columns of the matrix.
template <bool TURNED> __device__ __forceinline__ void load_slab(float *slab, Matrix a, int from) {
    for (int i = threadIdx.x; i < CHUNK * DEPTH; i += THREADS) {
        int row = TURNED ? i % CHUNK : i / DEPTH, k = TURNED ? i / CHUNK : i % DEPTH;
        slab[row * ROW_STRIDE + k] = TURNED ? a.at(from + k, row) : a.at(row, from + k);
    }
}

// Loads `rows` rows of a tile from a matrix; where it is turned, rows are columns of the matrix.
template <bool TURNED> __device__ __forceinline__ void load_tile(float *tile, Matrix b, int from, int rows) {
    for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS) {
        int row = TURNED ? i % rows : i / COLUMNS, column = TURNED ? i / rows : i % COLUMNS;
        tile[row * TILE_STRIDE + column] = TURNED ? b.at(column, from + row) : b.at(from + row, column);
    }
}

// result += a b, where b is a tile in shared memory of `depth` rows. Waits for all threads before it reads the tile, and before it
// writes the slab.
template <bool TURNED>
__device__ __forceinline__ void multiply(Tile &result, float *slab, Matrix a, const float *b, int depth) {
    for (int from = 0; from < depth; from += DEPTH) {
        __syncthreads();
        load_slab<TURNED>(slab, a, from);
        __syncthreads();
        result.add(slab, b + from * TILE_STRIDE, min(DEPTH, depth - from));
    }
}

// The same, where b comes in tiles, too.
template <bool A_TURNED, bool B_TURNED>
__device__ __forceinline__ void multiply(Tile &result, float *slab, float *tile, Matrix a, Matrix b, int depth) {
    for (int from = 0; from < depth; from += DEPTH) {
        __syncthreads();
        load_slab<A_TURNED>(slab, a, from);
        load_tile<B_TURNED>(tile, b, from, DEPTH);
        __syncthreads();
        result.add(slab, tile, min(DEPTH, depth - from));
    }
}

// The sum over the eight threads that have the same rows, in each of them.
__device__ __forceinline__ float row_sum(float x) {
    for (int lane = COLUMNS / PART / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// How much each row writes, and what is left: of the state before the chunk at each row, and of each row behind it.
struct Fading {
    float written[CHUNK], since[CHUNK], until[CHUNK];
    Sum sums[CHUNK];

    // From the sums of logarithms up to each token. Waits for nobody.
    __device__ __forceinline__ void load(const float *of_written, const Sum *of_sums, Chunk chunk, int heads, int head) {
        for (int row = threadIdx.x; row < CHUNK; row += THREADS) {
            int last = chunk.rows - 1;
            int64_t at = (chunk.first + static_cast<int64_t>(min(row, last))) * heads + head;
            Sum sum = of_sums[at], whole = of_sums[(chunk.first + static_cast<int64_t>(last)) * heads + head];
            written[row] = row <= last ? of_written[at] : 0;
            sums[row] = sum;
            since[row] = left_of(sum.near);
            until[row] = left_between(whole, sum);
        }
    }
    // What is left of the state before the chunk behind it.
    __device__ __forceinline__ float left(Chunk chunk) const { return since[chunk.rows - 1]; }
};

#define DELTA_HEADS int key_heads, int value_heads, int key_dim, int value_dim
