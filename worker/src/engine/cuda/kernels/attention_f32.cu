// Causal attention within segments or windows of them, forward and backward, in float32 without tensor cores: a block for 16 rows, of which a
// warp has four, and tiles of 32 columns, of which a lane has one. Sums of a row lie in its warp, a column of a head in each
// lane.
#include "attention.cuh"

constexpr int PER_WARP = 4, ROWS = WARPS * PER_WARP, TILE = WARP, HELD = 256 / WARP;

// Shared memory: two kinds of rows that stay, two kinds that come in tiles, and what lanes show their warp.
struct Memory {
    float *rows[2], *tiles[2], *shown[2];

    __device__ Memory(float *start, int dimension) {
        int warp = threadIdx.x / WARP;
        for (int i = 0; i < 2; i++) {
            rows[i] = start + i * ROWS * dimension;
            tiles[i] = start + 2 * ROWS * dimension + i * TILE * (dimension + 1);
            shown[i] = start + 2 * ROWS * dimension + 2 * TILE * (dimension + 1) + (i * WARPS + warp) * PER_WARP * WARP;
        }
    }
};

// `count` rows of which `rows` are there, zeros for the rest.
__device__ void load(float *to, int to_stride, const float *from, int stride, int count, int rows, int dimension) {
    for (int row = threadIdx.x / WARP; row < count; row += WARPS)
        for (int i = threadIdx.x % WARP; i < dimension; i += WARP)
            to[row * to_stride + i] = row < rows ? from[static_cast<int64_t>(row) * stride + i] : 0;
}

// A tile of the keys and values that a head looks at. Nobody reads the tiles before it any more when it is loaded.
__device__ __forceinline__ void load_keys_and_values(const Memory &memory, Heads heads, const float *qkv, int head, int from,
                                                     int tokens) {
    int dimension = heads.dimension, width = heads.width();
    const float *at = qkv + static_cast<int64_t>(from) * width;
    __syncthreads();
    load(memory.tiles[0], dimension + 1, at + heads.key_column(head), width, TILE, tokens - from, dimension);
    load(memory.tiles[1], dimension + 1, at + heads.value_column(head), width, TILE, tokens - from, dimension);
    __syncthreads();
}

// The products of the warp's rows with the lane's row of a tile.
__device__ __forceinline__ void multiply(float (&sums)[PER_WARP], const float *rows, const float *tile, int dimension) {
    const float *own = rows + threadIdx.x / WARP * PER_WARP * dimension;
    const float *column = tile + threadIdx.x % WARP * (dimension + 1);
    for (int r = 0; r < PER_WARP; r++) sums[r] = 0;
    for (int i = 0; i < dimension; i++)
#pragma unroll
        for (int r = 0; r < PER_WARP; r++) sums[r] += own[r * dimension + i] * column[i];
}

// sums[r] += the tile's rows, times what each lane has for r.
__device__ __forceinline__ void multiply_rows(float (&sums)[PER_WARP][HELD], const float (&factors)[PER_WARP], float *shown,
                                              const float *tile, int dimension) {
    int lane = threadIdx.x % WARP;
    __syncwarp();
    for (int r = 0; r < PER_WARP; r++) shown[r * WARP + lane] = factors[r];
    __syncwarp();
    for (int row = 0; row < TILE; row++)
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (lane + i * WARP >= dimension) continue;
            float x = tile[row * (dimension + 1) + lane + i * WARP];
#pragma unroll
            for (int r = 0; r < PER_WARP; r++) sums[r][i] += shown[r * WARP + row] * x;
        }
}

// The warp's rows from `first` on, those that are there.
__device__ __forceinline__ void store(const float (&sums)[PER_WARP][HELD], const float (&factors)[PER_WARP], float *to,
                                      int stride, int first, int tokens, int dimension) {
#pragma unroll
    for (int r = 0; r < PER_WARP; r++)
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int column = threadIdx.x % WARP + i * WARP;
            if (first + r < tokens && column < dimension)
                to[static_cast<int64_t>(first + r) * stride + column] = sums[r][i] * factors[r];
        }
}

// What scores x are limited to: cap tanh(x / cap), or as they are where the cap is 0; and the slope there.
struct Limited {
    float score, slope;

    __device__ __forceinline__ Limited(float x, float cap) : score(x), slope(1) {
        if (cap == 0) return;
        // tanh, in fewer registers than tanhf.
        float t = 1 - 2 / (1 + expf(2 * x / cap));
        score = cap * t;
        slope = 1 - t * t;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward_f32(
    const float *qkv, float *context, float *log_sums, const unsigned *starts, const float *sinks, int queries, int keys,
    int dimension, int tokens, int stride, float scale, float cap) {
    SHARED(float, start);
    Memory memory(start, dimension);
    Heads heads{queries, keys, dimension};
    int head = blockIdx.x, first = (gridDim.y - 1 - blockIdx.y) * ROWS, width = heads.width();
    int own = first + threadIdx.x / WARP * PER_WARP, lane = threadIdx.x % WARP;
    const float *rows = qkv + static_cast<int64_t>(first) * width + head * dimension;
    load(memory.rows[0], dimension, rows, width, ROWS, tokens - first, dimension);
    float largest[PER_WARP], sums[PER_WARP] = {}, result[PER_WARP][HELD] = {}, p[PER_WARP];
    for (int r = 0; r < PER_WARP; r++) largest[r] = -INFINITY;
    int end = min(first + ROWS, tokens);
    for (int from = starts[first] / TILE * TILE; from < end; from += TILE) {
        load_keys_and_values(memory, heads, qkv, head, from, tokens);
        multiply(p, memory.rows[0], memory.tiles[0], dimension);
#pragma unroll
        for (int r = 0; r < PER_WARP; r++) {
            int row = own + r, key = from + lane;
            bool seen = row < tokens && key <= row && key >= static_cast<int>(starts[row]);
            float score = seen ? Limited(p[r] * scale, cap).score : -INFINITY;
            float most = fmaxf(largest[r], warp_max(score));
            // A row that has seen no key yet.
            float shift = most == -INFINITY ? 0 : most, shrink = expf(largest[r] - shift);
            largest[r] = most;
            p[r] = expf(score - shift);
            sums[r] = sums[r] * shrink + p[r];
            for (int i = 0; i < HELD; i++) result[r][i] *= shrink;
        }
        multiply_rows(result, p, memory.shown[0], memory.tiles[1], dimension);
    }
    // A sink takes part in the sum, and has no value (Xiao et al., 2023).
    float factors[PER_WARP], sink = sinks ? sinks[head] : -INFINITY;
    for (int r = 0; r < PER_WARP; r++) {
        float shift = fmaxf(largest[r], sink), shrink = expf(largest[r] - shift);
        float sum = warp_sum(sums[r]) * shrink + expf(sink - shift);
        factors[r] = shrink / sum;
        if (own + r < tokens && lane == 0)
            log_sums[static_cast<int64_t>(head) * tokens + own + r] = shift + logf(sum);
    }
    store(result, factors, context + head * dimension, stride, own, tokens, dimension);
}
EXPORT(attention_forward_f32)

// Of a tile of keys and values, over the queries of all their heads.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_keys_f32(
    const float *qkv, const float *d_context, const float *log_sums, const float *deltas, const unsigned *ends,
    float *d_qkv, int queries, int keys, int dimension, int tokens, float scale, float cap) {
    SHARED(float, start);
    Memory memory(start, dimension);
    Heads heads{queries, keys, dimension};
    int first = blockIdx.y * ROWS, width = heads.width(), out_width = queries * dimension;
    int own = first + threadIdx.x / WARP * PER_WARP, lane = threadIdx.x % WARP;
    int first_head = blockIdx.x * heads.group(), columns[2] = {heads.key_column(first_head), heads.value_column(first_head)};
    for (int i = 0; i < 2; i++) {
        const float *rows = qkv + static_cast<int64_t>(first) * width + columns[i];
        load(memory.rows[i], dimension, rows, width, ROWS, tokens - first, dimension);
    }
    float d_keys[PER_WARP][HELD] = {}, d_values[PER_WARP][HELD] = {}, p[PER_WARP], d_p[PER_WARP];
    int end = ends[min(first + ROWS, tokens) - 1];
    for (int head = first_head; head < first_head + heads.group(); head++)
        for (int from = first / TILE * TILE; from < end; from += TILE) {
            __syncthreads();
            const float *at = qkv + static_cast<int64_t>(from) * width + head * dimension;
            load(memory.tiles[0], dimension + 1, at, width, TILE, tokens - from, dimension);
            at = d_context + static_cast<int64_t>(from) * out_width + head * dimension;
            load(memory.tiles[1], dimension + 1, at, out_width, TILE, tokens - from, dimension);
            __syncthreads();
            multiply(p, memory.rows[0], memory.tiles[0], dimension);
            multiply(d_p, memory.rows[1], memory.tiles[1], dimension);
            int query = from + lane;
            int64_t of_head = static_cast<int64_t>(head) * tokens;
            for (int r = 0; r < PER_WARP; r++) {
                int key = own + r;
                bool seen = key < tokens && query >= key && query < static_cast<int>(ends[key]);
                Limited limited(p[r] * scale, cap);
                p[r] = seen ? expf(limited.score - log_sums[of_head + query]) : 0;
                d_p[r] = seen ? p[r] * (d_p[r] - deltas[of_head + query]) * limited.slope : 0;
            }
            multiply_rows(d_values, p, memory.shown[0], memory.tiles[1], dimension);
            multiply_rows(d_keys, d_p, memory.shown[1], memory.tiles[0], dimension);
        }
    float factors[2][PER_WARP];
    for (int r = 0; r < PER_WARP; r++) {
        factors[0][r] = scale;
        factors[1][r] = 1;
    }
    store(d_keys, factors[0], d_qkv + columns[0], width, own, tokens, dimension);
    store(d_values, factors[1], d_qkv + columns[1], width, own, tokens, dimension);
}
EXPORT(attention_backward_keys_f32)

// Of a tile of queries of a head.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_queries_f32(
    const float *qkv, const float *d_context, const float *log_sums, const float *deltas, const unsigned *starts,
    float *d_qkv, int queries, int keys, int dimension, int tokens, float scale, float cap) {
    SHARED(float, start);
    Memory memory(start, dimension);
    Heads heads{queries, keys, dimension};
    int head = blockIdx.x, first = (gridDim.y - 1 - blockIdx.y) * ROWS, width = heads.width();
    int own = first + threadIdx.x / WARP * PER_WARP, lane = threadIdx.x % WARP, out_width = queries * dimension;
    int64_t row = first, of_head = static_cast<int64_t>(head) * tokens;
    const float *rows = qkv + row * width + head * dimension, *d_rows = d_context + row * out_width + head * dimension;
    load(memory.rows[0], dimension, rows, width, ROWS, tokens - first, dimension);
    load(memory.rows[1], dimension, d_rows, out_width, ROWS, tokens - first, dimension);
    float result[PER_WARP][HELD] = {}, p[PER_WARP], d_p[PER_WARP], factors[PER_WARP];
    int end = min(first + ROWS, tokens);
    for (int from = starts[first] / TILE * TILE; from < end; from += TILE) {
        load_keys_and_values(memory, heads, qkv, head, from, tokens);
        multiply(p, memory.rows[0], memory.tiles[0], dimension);
        multiply(d_p, memory.rows[1], memory.tiles[1], dimension);
        for (int r = 0; r < PER_WARP; r++) {
            int query = own + r, key = from + lane;
            bool seen = query < tokens && key <= query && key >= static_cast<int>(starts[query]);
            Limited limited(p[r] * scale, cap);
            float probability = seen ? expf(limited.score - log_sums[of_head + query]) : 0;
            d_p[r] = seen ? probability * (d_p[r] - deltas[of_head + query]) * limited.slope : 0;
        }
        multiply_rows(result, d_p, memory.shown[0], memory.tiles[0], dimension);
    }
    for (int r = 0; r < PER_WARP; r++) factors[r] = scale;
    store(result, factors, d_qkv + head * dimension, width, own, tokens, dimension);
}
EXPORT(attention_backward_queries_f32)
