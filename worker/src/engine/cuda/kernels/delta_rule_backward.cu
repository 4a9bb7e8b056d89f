// The gated delta rule backward (engine/ops/delta_rule/gradient.rs has the mathematics): the gradients of the states from the last
// chunk to the first, then of all that a chunk reads.
#include "delta_rule.cuh"

// A block for each segment, head of values and tile of its columns. Writes the gradients of the states at the borders of chunks, and
// those of what the chunks' systems are solved for, into the columns of values.
extern "C" __global__ void __launch_bounds__(THREADS)
    delta_states_backward(const float *qkv, const float *written, const Sum *sums, const float *solutions, const float *scores,
                          const float *d_out, const Chunk *chunks, const unsigned *segments, float *d_states, float *d_qkv,
                          DELTA_HEADS) {
    __shared__ Fading fading;
    __shared__ float taken[CHUNK];
    SHARED(float, d_state);
    DeltaHeads heads{key_heads, value_heads, key_dim, value_dim};
    float *d_read = d_state + key_dim * TILE_STRIDE, *solved = d_read + CHUNK * TILE_STRIDE;
    float *slab = solved + CHUNK * TILE_STRIDE;
    int head = blockIdx.y, key_head = head / heads.group(), from = blockIdx.z * COLUMNS, width = heads.width();
    int columns = min(COLUMNS, value_dim - from), own = own_column();
    for (int i = threadIdx.x; i < key_dim * TILE_STRIDE; i += THREADS) d_state[i] = 0;
    for (unsigned number = segments[blockIdx.x + 1]; number-- > segments[blockIdx.x];) {
        Chunk chunk = chunks[number];
        int rows = chunk.rows;
        __syncthreads();
        fading.load(written, sums, chunk, value_heads, head);
        load_tile<false>(d_read, rows_of(d_out, chunk, heads.values(), head * value_dim + from, columns), 0, CHUNK);
        __syncthreads();
        for (int row = threadIdx.x; row < CHUNK; row += THREADS) taken[row] = -fading.since[row] * fading.written[row];
        Matrix queries = rows_of(qkv, chunk, width, heads.query(key_head), key_dim);
        Matrix keys = rows_of(qkv, chunk, width, heads.key(key_head), key_dim);
        // Of the values that are written, then of what the system is solved for.
        Tile d_values, d_solved;
        multiply<true>(d_values, slab, pairs_of(scores, chunk, heads, head), d_read, rows);
        if (chunk.behind != NONE) multiply<false>(d_values, slab, keys.times(fading.until), d_state, key_dim);
        EACH_OWN(r, c) solved[(own_row() + r) * TILE_STRIDE + own + c] = d_values.sum[r][c];
        multiply<true>(d_solved, slab, pairs_of(solutions, chunk, heads, head), solved, rows);
        __syncthreads();
        EACH_OWN(r, c) {
            int row = own_row() + r;
            solved[row * TILE_STRIDE + own + c] = d_solved.sum[r][c];
            if (row < rows && own + c < columns)
                d_qkv[(chunk.first + static_cast<int64_t>(row)) * width + heads.value(head) + from + own + c] = d_solved.sum[r][c];
        }
        if (chunk.before == NONE) continue;
        float left = fading.left(chunk);
        for (int key = 0; key < key_dim; key += CHUNK) {
            Tile added;
            multiply<true>(added, slab, queries.from_column(key).times(fading.since), d_read, rows);
            multiply<true>(added, slab, keys.from_column(key).times(taken), solved, rows);
            EACH_OWN(r, c) {
                int row = key + own_row() + r;
                if (row >= key_dim) continue;
                float &x = d_state[row * TILE_STRIDE + own + c];
                x = left * x + added.sum[r][c];
                if (own + c < columns)
                    d_states[heads.state(chunk.before, head) + static_cast<int64_t>(row) * value_dim + from + own + c] = x;
            }
        }
    }
}
EXPORT(delta_states_backward)

// The sums of a tile's columns, by the first COLUMNS threads. `scratch` has WARPS * COLUMNS scalars.
__device__ __forceinline__ float column_sum(const Tile &tile, float *scratch) {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < PART; c++) {
        float sum = 0;
#pragma unroll
        for (int r = 0; r < PART; r++) sum += tile.sum[r][c];
        for (int lane = COLUMNS / PART; lane < WARP; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
        if (threadIdx.x % WARP < COLUMNS / PART) scratch[threadIdx.x / WARP * COLUMNS + own_column() + c] = sum;
    }
    __syncthreads();
    float sum = 0;
    if (threadIdx.x < COLUMNS)
        for (int warp = 0; warp < WARPS; warp++) sum += scratch[warp * COLUMNS + threadIdx.x];
    return sum;
}

// A block for each chunk and head of values: what pairs of rows are decayed by, and what they are products of. `scores` become the
// gradients of products of queries with keys, `solutions` those of keys with the keys before them. Begins the gradients of how much
// is written, and of the sums of logarithms of what is kept.
extern "C" __global__ void __launch_bounds__(THREADS)
    delta_pairs_backward(const float *qkv, const float *written, const Sum *sums, const float *values, const float *d_out,
                         const float *d_qkv, float *solutions, float *scores, float *d_written, float *d_kept,
                         const Chunk *chunks, DELTA_HEADS) {
    __shared__ float slab[CHUNK * ROW_STRIDE], scratch[WARPS * COLUMNS], of_written[CHUNK], of_kept[CHUNK];
    __shared__ Four tile_memory[DEPTH * TILE_STRIDE / PART];
    float *tile = reinterpret_cast<float *>(tile_memory);
    __shared__ Fading fading;
    DeltaHeads heads{key_heads, value_heads, key_dim, value_dim};
    Chunk chunk = chunks[blockIdx.x];
    int head = blockIdx.y, rows = chunk.rows, width = heads.width(), all = heads.values();
    fading.load(written, sums, chunk, value_heads, head);
    Matrix keys = rows_of(qkv, chunk, width, heads.key(head / heads.group()), key_dim);
    Matrix given = rows_of(qkv, chunk, width, heads.value(head), value_dim);
    Matrix d_solved = rows_of(d_qkv, chunk, width, heads.value(head), value_dim);
    Matrix read = rows_of(d_out, chunk, all, head * value_dim, value_dim);
    Matrix wrote = rows_of(values, chunk, all, head * value_dim, value_dim);
    // What a row has by its own value.
    for (int row = threadIdx.x / WARP; row < CHUNK; row += WARPS) {
        float sum = 0;
        for (int i = threadIdx.x % WARP; i < value_dim; i += WARP) sum += d_solved.at(row, i) * given.at(row, i);
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) {
            of_written[row] = sum;
            of_kept[row] = 0;
        }
    }
    int64_t stride = static_cast<int64_t>(value_heads) * CHUNK, start = chunk.first * stride + head * CHUNK;
    for (int from = 0; from < rows; from += COLUMNS) {
        Tile d_scores, d_system, overlaps;
        multiply<false, true>(d_scores, slab, tile, read, wrote.from_row(from), value_dim);
        multiply<false, true>(d_system, slab, tile, d_solved, wrote.from_row(from), value_dim);
        multiply<false, true>(overlaps, slab, tile, keys, keys.from_row(from), key_dim);
        // From here on they are gradients of sums, by way of the pair's decay.
        Tile &of_sums = overlaps;
        float of_shares[PART] = {};
        EACH_OWN(r, c) {
            int row = own_row() + r, column = from + own_column() + c;
            bool is_pair = column <= row && row < rows;
            float left = is_pair ? left_between(fading.sums[row], fading.sums[column]) : 0, share = fading.written[row];
            float overlap = is_pair && column < row ? left * overlaps.sum[r][c] * d_system.sum[r][c] : 0;
            int64_t at = start + row * stride + column;
            // A row is by itself as it is: what it would add it would take again, but for its rounding.
            float score = is_pair && column < row ? scores[at] * d_scores.sum[r][c] : 0;
            of_shares[r] += overlap;
            of_sums.sum[r][c] = score - share * overlap;
            if (row >= rows || column >= rows) continue;
            scores[at] = left * d_scores.sum[r][c];
            solutions[at] = column < row ? -(share * left * d_system.sum[r][c]) : 0;
        }
        float behind = column_sum(of_sums, scratch);
        if (threadIdx.x < COLUMNS) of_kept[from + threadIdx.x] -= behind;
        __syncthreads();
#pragma unroll
        for (int r = 0; r < PART; r++) {
            float sum = 0;
#pragma unroll
            for (int c = 0; c < PART; c++) sum += of_sums.sum[r][c];
            sum = row_sum(sum);
            float of_share = row_sum(of_shares[r]);
            if (own_column() == 0) {
                of_kept[own_row() + r] += sum;
                of_written[own_row() + r] -= of_share;
            }
        }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        int64_t at = (chunk.first + static_cast<int64_t>(row)) * value_heads + head;
        d_written[at] = of_written[row];
        d_kept[at] = of_kept[row];
    }
}
EXPORT(delta_pairs_backward)

// Adds a tile to another, by a factor for each row; and what of each row the products with a matrix are, by the same factor, from a
// column on.
__device__ __forceinline__ void add_faded(Tile &to, const Tile &x, const float *factors, float sign, Matrix products, int from,
                                          float (&of_rows)[PART]) {
    EACH_OWN(r, c) {
        int row = own_row() + r;
        float faded = factors[row] * x.sum[r][c];
        to.sum[r][c] += sign * faded;
        of_rows[r] += faded * products.at(row, from + own_column() + c);
    }
}

// What a head's chunk reads of the states at its borders, and their gradients.
struct Borders {
    const float *before, *d_behind;
    bool has_before, has_behind;
    int key_dim, value_dim;

    __device__ __forceinline__ Borders(const float *states, const float *d_states, Chunk chunk, DeltaHeads heads, int head)
        : has_before(chunk.before != NONE), has_behind(chunk.behind != NONE), key_dim(heads.key_dim), value_dim(heads.value_dim) {
        before = has_before ? states + heads.state(chunk.before, head) : nullptr;
        d_behind = has_behind ? d_states + heads.state(chunk.behind, head) : nullptr;
    }
    // Some rows of a state.
    __device__ __forceinline__ Matrix rows(const float *state, int from) const {
        return {state + static_cast<int64_t>(from) * value_dim, value_dim, key_dim - from, value_dim, nullptr};
    }
    // The thread's part of the products of a state before with the gradient of that behind, in some rows.
    __device__ __forceinline__ float products(int from) const {
        if (!has_before || !has_behind) return 0;
        float sum = 0;
        int64_t start = static_cast<int64_t>(from) * value_dim;
        int count = min(COLUMNS, key_dim - from) * value_dim;
        for (int i = threadIdx.x; i < count; i += THREADS) sum += before[start + i] * d_behind[start + i];
        return sum;
    }
};

// A block for each chunk and head of keys: the gradients of queries and keys of length one, from all heads of values that share
// them, one after the other; and the rest of those of what is written and kept. Those of the values, which until then are of what the
// systems are solved for, are scaled at the end.
extern "C" __global__ void __launch_bounds__(THREADS)
    delta_inputs_backward(const float *qkv, const float *written, const Sum *sums, const float *values, const float *d_out,
                          const float *states, const float *d_states, const float *solutions, const float *scores,
                          float *d_qkv, float *d_written, float *d_kept, const Chunk *chunks, DELTA_HEADS) {
    __shared__ float slab[CHUNK * ROW_STRIDE], of_written[CHUNK], of_kept[CHUNK], shares[CHUNK], scratch[WARPS];
    __shared__ Four tile_memory[DEPTH * TILE_STRIDE / PART];
    float *tile = reinterpret_cast<float *>(tile_memory);
    __shared__ Fading fading;
    DeltaHeads heads{key_heads, value_heads, key_dim, value_dim};
    Chunk chunk = chunks[blockIdx.x];
    int key_head = blockIdx.y, rows = chunk.rows, width = heads.width(), all = heads.values(), group = heads.group();
    Matrix queries = rows_of(qkv, chunk, width, heads.query(key_head), key_dim);
    Matrix keys = rows_of(qkv, chunk, width, heads.key(key_head), key_dim);
    for (int from = 0; from < key_dim; from += COLUMNS) {
        Tile d_queries, d_keys;
        for (int head = key_head * group; head < (key_head + 1) * group; head++) {
            Borders borders(states, d_states, chunk, heads, head);
            __syncthreads();
            fading.load(written, sums, chunk, value_heads, head);
            __syncthreads();
            for (int row = threadIdx.x; row < CHUNK; row += THREADS) shares[row] = fading.since[row] * fading.written[row];
            float of_queries[PART] = {}, of_keys[PART] = {}, of_faded[PART] = {}, of_all = 0;
            if (borders.has_before) {
                Matrix read = rows_of(d_out, chunk, all, head * value_dim, value_dim);
                Matrix d_solved = rows_of(d_qkv, chunk, width, heads.value(head), value_dim);
                Tile reads, takes;
                multiply<false, true>(reads, slab, tile, read, borders.rows(borders.before, from), value_dim);
                add_faded(d_queries, reads, fading.since, 1, queries, from, of_queries);
                multiply<false, true>(takes, slab, tile, d_solved, borders.rows(borders.before, from), value_dim);
                // By what is left alone: what a row writes of it is in the share.
                EACH_OWN(r, c) {
                    int row = own_row() + r;
                    d_keys.sum[r][c] -= shares[row] * takes.sum[r][c];
                    of_keys[r] += fading.since[row] * takes.sum[r][c] * keys.at(row, from + own_column() + c);
                }
            }
            if (borders.has_behind) {
                Matrix wrote = rows_of(values, chunk, all, head * value_dim, value_dim);
                Tile writes;
                multiply<false, true>(writes, slab, tile, wrote, borders.rows(borders.d_behind, from), value_dim);
                add_faded(d_keys, writes, fading.until, 1, keys, from, of_faded);
                of_all = fading.left(chunk) * borders.products(from);
            }
            Matrix d_scores = pairs_of(scores, chunk, heads, head), d_system = pairs_of(solutions, chunk, heads, head);
            multiply<false, false>(d_queries, slab, tile, d_scores, keys.from_column(from), rows);
            multiply<true, false>(d_keys, slab, tile, d_scores, queries.from_column(from), rows);
            // Of a key with another both get what the other is multiplied by.
            multiply<false, false>(d_keys, slab, tile, d_system, keys.from_column(from), rows);
            multiply<true, false>(d_keys, slab, tile, d_system, keys.from_column(from), rows);
#pragma unroll
            for (int r = 0; r < PART; r++) {
                int row = own_row() + r;
                float of_query = row_sum(of_queries[r]), of_key = row_sum(of_keys[r]), faded = row_sum(of_faded[r]);
                // The last row is as it is behind the chunk.
                if (row >= rows - 1) faded = 0;
                if (own_column() == 0) {
                    of_written[row] = -of_key;
                    of_kept[row] = of_query - fading.written[row] * of_key - faded;
                    of_all += faded;
                }
            }
            of_all = block_sum<THREADS>(of_all, scratch);
            for (int row = threadIdx.x; row < rows; row += THREADS) {
                int64_t at = (chunk.first + static_cast<int64_t>(row)) * value_heads + head;
                d_written[at] += of_written[row];
                d_kept[at] += of_kept[row] + (row == rows - 1 ? of_all : 0);
            }
        }
        EACH_OWN(r, c) {
            int row = own_row() + r, column = from + own_column() + c;
            if (row >= rows || column >= key_dim) continue;
            float *out = d_qkv + (chunk.first + static_cast<int64_t>(row)) * width;
            out[heads.query(key_head) + column] = d_queries.sum[r][c];
            out[heads.key(key_head) + column] = d_keys.sum[r][c];
        }
    }
    __syncthreads();
    int own = group * value_dim;
    for (int i = threadIdx.x; i < rows * own; i += THREADS) {
        int64_t token = chunk.first + static_cast<int64_t>(i / own);
        int head = key_head * group + i % own / value_dim;
        d_qkv[token * width + heads.value(key_head * group) + i % own] *= written[token * value_heads + head];
    }
}
EXPORT(delta_inputs_backward)

// Of each head of a chunk: what is kept at a token is in the sums of all from there on.
extern "C" __global__ void delta_kept_backward(float *d_kept, const Chunk *chunks, int heads) {
    Chunk chunk = chunks[blockIdx.x];
    for (int head = threadIdx.x; head < heads; head += blockDim.x) {
        float *own = d_kept + chunk.first * static_cast<int64_t>(heads) + head, sum = 0;
        for (int row = chunk.rows - 1; row >= 0; row--) {
            float &x = own[static_cast<int64_t>(row) * heads];
            sum += x;
            x = sum;
        }
    }
}
EXPORT(delta_kept_backward)

// A warp for each query and key of a token: the gradient goes back through its length. Of y = s x / |x| it is
// s (dy - y (y · dy) / s²) / |x|.
extern "C" __global__ void delta_normalise_backward(const float *qkv, const float *inverses, float *d_qkv, int64_t vectors,
                                                    int key_heads, int key_dim, int width) {
    int64_t vector = blockIdx.x * static_cast<int64_t>(blockDim.x / WARP) + threadIdx.x / WARP;
    if (vector >= vectors) return;
    int head = static_cast<int>(vector % (2 * key_heads));
    int64_t start = vector / (2 * key_heads) * width + head * key_dim;
    const float *y = qkv + start;
    float *d = d_qkv + start, sum = 0;
    for (int i = threadIdx.x % WARP; i < key_dim; i += WARP) sum += y[i] * d[i];
    float square = head < key_heads ? 1.0f / key_dim : 1.0f, along = warp_sum(sum) / square;
    float factor = sqrtf(square) * inverses[vector];
    for (int i = threadIdx.x % WARP; i < key_dim; i += WARP) d[i] = factor * (d[i] - y[i] * along);
}
EXPORT(delta_normalise_backward)
