// The gated delta rule forward (engine/ops/delta_rule/chunk.rs has the mathematics): lengths of queries and keys, what rows of a
// chunk have to do with each other, and the states from chunk to chunk.
#include "delta_rule.cuh"

constexpr float EPSILON = 1e-6f;

// A warp for each query and key of a token, which it divides by its length; queries also by the root of their dimensions.
// `inverses` are one over the lengths.
extern "C" __global__ void delta_normalise(float *qkv, float *inverses, int64_t vectors, int key_heads, int key_dim, int width) {
    int64_t vector = blockIdx.x * static_cast<int64_t>(blockDim.x / WARP) + threadIdx.x / WARP;
    if (vector >= vectors) return;
    int head = static_cast<int>(vector % (2 * key_heads));
    float *x = qkv + vector / (2 * key_heads) * width + head * key_dim, sum = 0;
    for (int i = threadIdx.x % WARP; i < key_dim; i += WARP) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(warp_sum(sum) + EPSILON);
    float scale = head < key_heads ? 1.0f / sqrtf(static_cast<float>(key_dim)) : 1.0f;
    for (int i = threadIdx.x % WARP; i < key_dim; i += WARP) x[i] = x[i] * inverse * scale;
    if (threadIdx.x % WARP == 0) inverses[vector] = inverse;
}
EXPORT(delta_normalise)

constexpr int SQUARE_STRIDE = CHUNK + 1, BLOCK = 16;

// Turns the blocks on the diagonal of 1 + a strictly lower triangle into their inverses: a thread for each column.
__device__ __forceinline__ void invert_blocks(float *square) {
    int first = threadIdx.x / BLOCK * BLOCK, column = threadIdx.x % BLOCK;
    bool is_one = threadIdx.x < CHUNK;
    float own[BLOCK] = {};
    if (is_one) {
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            float x = i == column ? 1.0f : 0.0f;
#pragma unroll
            for (int k = 0; k < i; k++) x -= square[(first + i) * SQUARE_STRIDE + first + k] * own[k];
            own[i] = x;
        }
    }
    __syncthreads();
    if (is_one) {
#pragma unroll
        for (int i = 0; i < BLOCK; i++) square[(first + i) * SQUARE_STRIDE + first + column] = own[i];
    }
    __syncthreads();
}

// Inverts each two blocks that follow each other as one: below them goes -b⁻¹ c a⁻¹ in the place of c.
template <int SIZE> __device__ __forceinline__ void join_blocks(float *square) {
    constexpr int COUNT = CHUNK / 2 * SIZE / THREADS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float part[COUNT];
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            int i = threadIdx.x + n * THREADS, above = i / (SIZE * SIZE) * 2 * SIZE, below = above + SIZE;
            int row = below + i / SIZE % SIZE, column = above + i % SIZE, between = half ? below : above;
            float sum = 0;
            for (int k = 0; k < SIZE; k++)
                sum += square[row * SQUARE_STRIDE + between + k] * square[(between + k) * SQUARE_STRIDE + column];
            part[n] = half ? -sum : sum;
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            int i = threadIdx.x + n * THREADS, above = i / (SIZE * SIZE) * 2 * SIZE;
            square[(above + SIZE + i / SIZE % SIZE) * SQUARE_STRIDE + above + i % SIZE] = part[n];
        }
        __syncthreads();
    }
}

// A block for each chunk and head of values. Writes the sums of what is kept, the inverses of the systems as
// `solutions`, and as `scores` the decayed products of queries with keys up to their own.
extern "C" __global__ void __launch_bounds__(THREADS)
    delta_prepare(const float *qkv, const float *written, const float *kept, Sum *sums_out, float *solutions, float *scores, const Chunk *chunks,
                  DELTA_HEADS) {
    __shared__ float slab[CHUNK * ROW_STRIDE], square[CHUNK * SQUARE_STRIDE], logs[CHUNK];
    __shared__ Sum sums[CHUNK];
    __shared__ Four tile_memory[DEPTH * TILE_STRIDE / PART];
    float *tile = reinterpret_cast<float *>(tile_memory);
    DeltaHeads heads{key_heads, value_heads, key_dim, value_dim};
    Chunk chunk = chunks[blockIdx.x];
    int head = blockIdx.y, key_head = head / heads.group(), rows = chunk.rows, width = heads.width();
    int64_t first = chunk.first * static_cast<int64_t>(value_heads) + head;
    for (int row = threadIdx.x; row < CHUNK; row += THREADS)
        logs[row] = row < rows ? kept[first + static_cast<int64_t>(row) * value_heads] : 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int row = 0; row < CHUNK; row++) {
            sum += logs[row];
            float near = static_cast<float>(sum);
            sums[row] = {near, static_cast<float>(sum - near)};
        }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += THREADS) sums_out[first + static_cast<int64_t>(row) * value_heads] = sums[row];
    Matrix queries = rows_of(qkv, chunk, width, heads.query(key_head), key_dim);
    Matrix keys = rows_of(qkv, chunk, width, heads.key(key_head), key_dim);
    int64_t stride = static_cast<int64_t>(value_heads) * CHUNK, start = chunk.first * stride + head * CHUNK;
    for (int from = 0; from < CHUNK; from += COLUMNS) {
        Tile overlaps, products;
        if (from < rows) {
            multiply<false, true>(overlaps, slab, tile, keys, keys.from_row(from), key_dim);
            multiply<false, true>(products, slab, tile, queries, keys.from_row(from), key_dim);
        }
        EACH_OWN(r, c) {
            int row = own_row() + r, column = from + own_column() + c;
            float left = column <= row ? left_between(sums[row], sums[column]) : 0;
            bool is_there = row < rows && column < row;
            float share = is_there ? written[(chunk.first + static_cast<int64_t>(row)) * value_heads + head] : 0;
            square[row * SQUARE_STRIDE + column] = is_there ? share * left * overlaps.sum[r][c] : 0;
            if (row < rows && column < rows)
                scores[start + row * stride + column] = column <= row ? left * products.sum[r][c] : 0;
        }
    }
    __syncthreads();
    invert_blocks(square);
    join_blocks<BLOCK>(square);
    join_blocks<2 * BLOCK>(square);
    for (int i = threadIdx.x; i < rows * CHUNK; i += THREADS) {
        int row = i / CHUNK, column = i % CHUNK;
        if (column < rows) solutions[start + row * stride + column] = square[row * SQUARE_STRIDE + column];
    }
}
EXPORT(delta_prepare)

// A block for each segment, head of values and tile of its columns, which goes from chunk to chunk with its columns of the state.
// Either writes what is read of the states (READS), or the states themselves and the values that are written into them.
template <typename E, bool READS>
__device__ __forceinline__ void scan(const float *qkv, const float *written, const Sum *sums, const float *solutions,
                                     const float *scores, const Chunk *chunks, const unsigned *segments, E *out, float *states,
                                     float *values, DeltaHeads heads) {
    __shared__ Fading fading;
    SHARED(float, state);
    float *solved = state + heads.key_dim * TILE_STRIDE, *slab = solved + CHUNK * TILE_STRIDE;
    int head = blockIdx.y, key_head = head / heads.group(), from = blockIdx.z * COLUMNS, width = heads.width();
    int columns = min(COLUMNS, heads.value_dim - from), own = own_column();
    for (int i = threadIdx.x; i < heads.key_dim * TILE_STRIDE; i += THREADS) state[i] = 0;
    for (unsigned number = segments[blockIdx.x]; number < segments[blockIdx.x + 1]; number++) {
        Chunk chunk = chunks[number];
        int rows = chunk.rows;
        __syncthreads();
        fading.load(written, sums, chunk, heads.value_heads, head);
        __syncthreads();
        Matrix queries = rows_of(qkv, chunk, width, heads.query(key_head), heads.key_dim);
        Matrix keys = rows_of(qkv, chunk, width, heads.key(key_head), heads.key_dim);
        Matrix given = rows_of(qkv, chunk, width, heads.value(head) + from, columns);
        bool has_state = chunk.before != NONE;
        Tile reads, solution;
        if (has_state) multiply<false>(reads, slab, keys, state, heads.key_dim);
        EACH_OWN(r, c) {
            int row = own_row() + r;
            float rest = given.at(row, own + c) - fading.since[row] * reads.sum[r][c];
            solved[row * TILE_STRIDE + own + c] = fading.written[row] * rest;
        }
        multiply<false>(solution, slab, pairs_of(solutions, chunk, heads, head), solved, rows);
        __syncthreads();
        EACH_OWN(r, c) solved[(own_row() + r) * TILE_STRIDE + own + c] = solution.sum[r][c];
        int64_t start = chunk.first * static_cast<int64_t>(heads.values()) + head * heads.value_dim + from;
        if (READS) {
            Tile result;
            if (has_state) {
                multiply<false>(result, slab, queries, state, heads.key_dim);
                EACH_OWN(r, c) result.sum[r][c] *= fading.since[own_row() + r];
            }
            multiply<false>(result, slab, pairs_of(scores, chunk, heads, head), solved, rows);
            EACH_OWN(r, c) {
                int row = own_row() + r;
                if (row < rows && own + c < columns)
                    narrow(result.sum[r][c], out[start + static_cast<int64_t>(row) * heads.values() + own + c]);
            }
        } else {
            EACH_OWN(r, c) {
                int row = own_row() + r;
                if (row < rows && own + c < columns)
                    values[start + static_cast<int64_t>(row) * heads.values() + own + c] = solution.sum[r][c];
            }
        }
        if (chunk.behind == NONE) continue;
        float left = fading.left(chunk);
        for (int key = 0; key < heads.key_dim; key += CHUNK) {
            Tile added;
            multiply<true>(added, slab, keys.from_column(key).times(fading.until), solved, rows);
            EACH_OWN(r, c) {
                int row = key + own_row() + r;
                if (row >= heads.key_dim) continue;
                float &x = state[row * TILE_STRIDE + own + c];
                x = left * x + added.sum[r][c];
                if (!READS && own + c < columns)
                    states[heads.state(chunk.behind, head) + static_cast<int64_t>(row) * heads.value_dim + from + own + c] = x;
            }
        }
    }
}

#define DELTA_FORWARD(name, E) \
    extern "C" __global__ void __launch_bounds__(THREADS) name( \
        const float *qkv, const float *written, const Sum *sums, const float *solutions, const float *scores, \
        const Chunk *chunks, const unsigned *segments, E *out, DELTA_HEADS) { \
        scan<E, true>(qkv, written, sums, solutions, scores, chunks, segments, out, nullptr, nullptr, \
                            DeltaHeads{key_heads, value_heads, key_dim, value_dim}); \
    } \
    EXPORT(name)
DELTA_FORWARD(delta_forward_f32, float)
DELTA_FORWARD(delta_forward_bf16, bf16)

extern "C" __global__ void __launch_bounds__(THREADS)
    delta_states(const float *qkv, const float *written, const Sum *sums, const float *solutions, const Chunk *chunks,
                 const unsigned *segments, float *states, float *values, DELTA_HEADS) {
    scan<float, false>(qkv, written, sums, solutions, nullptr, chunks, segments, nullptr, states, values,
                       DeltaHeads{key_heads, value_heads, key_dim, value_dim});
}
EXPORT(delta_states)
