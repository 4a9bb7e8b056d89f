// Causal attention within segments or windows of them, backward, in bfloat16 (FlashAttention-2, Dao, 2023). Two kernels compute the
// probabilities again: one sums the gradients of a tile of keys and values over all queries that see them, one those of a
// tile of queries over all keys that they see. Each sum has one owner and one order.
#include "attention.cuh"

// Eight scalars of a row.
__device__ __forceinline__ void load_eight(const float *from, bool, float (&to)[8]) {
    for (int i = 0; i < 8; i++) to[i] = from[i];
}
__device__ __forceinline__ void load_eight(const bf16 *from, bool aligned, float (&to)[8]) {
    if (!aligned) {
        for (int i = 0; i < 8; i++) to[i] = widen(from[i]);
        return;
    }
    Chunk chunk = *reinterpret_cast<const Chunk *>(from);
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(chunk.pairs[i] << 16);
        to[2 * i + 1] = __uint_as_float(chunk.pairs[i] & 0xffff0000u);
    }
}

// deltas[head][token] = sum(context * d_context), which equals sum(P dP): eight lanes for each head of each token. Rows of the
// context are `stride` apart.
template <typename E>
__device__ void attention_deltas(const E *context, const E *d_context, float *deltas, int heads, int dimension, int tokens,
                                 int stride) {
    int64_t index = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / 8;
    int lane = threadIdx.x % 8;
    bool present = index < static_cast<int64_t>(tokens) * heads;
    int64_t token = index / heads;
    int head = index % heads;
    float sum = 0;
    if (present) {
        const E *out = context + token * stride + head * dimension, *d_out = d_context + index * dimension;
        bool aligned = reinterpret_cast<uintptr_t>(context) % 16 == 0 && stride % 8 == 0;
        for (int i = lane * 8; i < dimension; i += 64) {
            float a[8], b[8];
            load_eight(out + i, aligned, a);
            load_eight(d_out + i, true, b);
            for (int j = 0; j < 8; j++) sum += a[j] * b[j];
        }
    }
    for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (present && lane == 0) deltas[head * static_cast<int64_t>(tokens) + token] = sum;
}
#define ATTENTION_DELTAS(E) \
    const E *context, const E *d_context, float *deltas, int heads, int dimension, int tokens, int stride
TWINS(attention_deltas, ATTENTION_DELTAS, attention_deltas(context, d_context, deltas, heads, dimension, tokens,
      stride))

// A block for each head: the gradient of its sink, which has the probability P in each row, and no value: -sum(P delta).
extern "C" __global__ void attention_sinks(const float *sinks, const float *log_sums, const float *deltas, float *d_sinks,
                                           int tokens) {
    __shared__ double scratch[THREADS];
    int head = blockIdx.x, thread = threadIdx.x;
    int64_t of_head = static_cast<int64_t>(head) * tokens;
    double sum = 0;
    for (int token = thread; token < tokens; token += THREADS)
        sum -= expf(sinks[head] - log_sums[of_head + token]) * deltas[of_head + token];
    scratch[thread] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half) scratch[thread] += scratch[thread + half];
        __syncthreads();
    }
    if (thread == 0) d_sinks[head] = static_cast<float>(scratch[0]);
}
EXPORT(attention_sinks)

// As `mask`, where the rows are keys and the columns queries.
template <int M, int N>
__device__ __forceinline__ void mask_keys(float (&scores)[M][N][4], const unsigned *ends, int tokens, int first_key,
                                          int first_query) {
    int key_ends[M][2];
    row_values(key_ends, ends, first_key, tokens, 0);
    hide(scores, key_ends, first_key, first_query, [](int key, int query, int end) { return query < key || query >= end; });
}

struct Saved {
    const bf16 *qkv, *d_context;
    const float *log_sums, *deltas;
    // Of each token: the first key that it sees where a kernel's rows are queries, the end of the queries that see it where they are
    // keys. They never decrease.
    const unsigned *borders;
    int tokens;
    float scale, cap;

    // What limited scores are multiplied by, or scores where none is limited.
    template <bool CAPPED> __device__ float multiplier() const { return CAPPED ? cap : scale; }
};

// The gradients of a tile of keys and of values; the four warps have 16 M of its rows each, as the rows of all products. KEYS
// and VALUES say which of the two. Shared memory: keys and values, and twice a tile of queries, one of d_context; then
// twice the log sums and deltas of such a tile.
template <int DIM, int M, int QUERIES, bool KEYS, bool VALUES, bool CAPPED>
__device__ __forceinline__ void backward_keys(Heads heads, Saved saved, bf16 *d_qkv) {
    constexpr int ROWS = WARPS * M * 16, KEY_BYTES = ROWS * DIM * 2, TILE_BYTES = QUERIES * DIM * 2;
    // Behind all tiles, which begin at multiples of their rows' bytes.
    constexpr int SUMS = 2 * KEY_BYTES + 4 * TILE_BYTES;
    SHARED(unsigned char, shared);
    int shared_head = blockIdx.x, first = blockIdx.y * ROWS, tokens = saved.tokens;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, width = heads.width();
    Address keys = shared_address(shared), stages = keys + 2 * KEY_BYTES;
    int64_t row_at = static_cast<int64_t>(first) * width;
    int group = heads.group(), first_head = shared_head * group;
    int key_column = heads.key_column(first_head), value_column = heads.value_column(first_head);
    load_tile<ROWS, DIM, THREADS>(keys, saved.qkv + row_at + key_column, width, tokens - first, heads.dimension);
    load_tile<ROWS, DIM, THREADS>(keys + KEY_BYTES, saved.qkv + row_at + value_column, width, tokens - first, heads.dimension);
    int begin = first / QUERIES, end = (saved.borders[min(first + ROWS, tokens) - 1] + QUERIES - 1) / QUERIES;
    auto load = [&](int head, int tile, int parity) {
        int from = tile * QUERIES, rows = tokens - from;
        int column = head * heads.dimension, out_width = heads.queries * heads.dimension;
        Address stage = stages + parity * 2 * TILE_BYTES, sums = keys + SUMS + parity * 2 * QUERIES * 4;
        const bf16 *queries = saved.qkv + static_cast<int64_t>(from) * width + column;
        load_tile<QUERIES, DIM, THREADS>(stage, queries, width, rows, heads.dimension);
        const bf16 *d_context = saved.d_context + static_cast<int64_t>(from) * out_width + column;
        load_tile<QUERIES, DIM, THREADS>(stage + TILE_BYTES, d_context, out_width, rows, heads.dimension);
        for (int i = threadIdx.x; i < 2 * QUERIES; i += THREADS) {
            const float *of_rows = i < QUERIES ? saved.log_sums : saved.deltas;
            bool present = i % QUERIES < rows;
            int64_t at = static_cast<int64_t>(head) * tokens + from + (present ? i % QUERIES : 0);
            copy_word(sums + i * 4, of_rows + at, present);
        }
    };
    load(first_head, begin, 0);

    int own = first + warp * M * 16, last = min(own + M * 16, tokens) - 1;
    // Queries that see one of the warp's keys end where the last one's segment does, those that see all where the first's.
    int last_end = own <= last ? saved.borders[last] : 0, first_end = own <= last ? saved.borders[own] : 0;
    float d_keys[KEYS ? M : 1][DIM / 8][4] = {}, d_values[VALUES ? M : 1][DIM / 8][4] = {};
    Address own_keys = keys + warp * M * 16 * DIM * 2;
    float scale_of_2 = saved.multiplier<CAPPED>() * LOG2_E;
    int parity = 0, head = first_head, tile = begin;
    while (head < first_head + group) {
        wait_for_copies();
        // This tile is there, and nobody reads the one before any more.
        __syncthreads();
        int from = tile * QUERIES, part = parity;
        parity ^= 1;
        if (++tile == end) {
            tile = begin;
            head++;
        }
        if (head < first_head + group) load(head, tile, parity);
        if (from >= last_end || from + QUERIES <= own) continue;
        Address stage = stages + part * 2 * TILE_BYTES;
        const auto *log_sums = reinterpret_cast<const float *>(shared + SUMS) + part * 2 * QUERIES;
        float p[M][QUERIES / 8][4] = {};
        multiply<DIM>(p, own_keys, stage);
        if constexpr (CAPPED) limit(p, saved.scale / saved.cap);
        if (from < last || from + QUERIES > first_end) mask_keys(p, saved.borders, tokens, own, from);
        // Of the limit of each score, which the probabilities overwrite.
        constexpr bool SLOPES = CAPPED && KEYS;
        float slopes[SLOPES ? M : 1][SLOPES ? QUERIES / 8 : 1][4];
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float log_sum = log_sums[n * 8 + lane % 4 * 2 + i % 2] * LOG2_E;
#pragma unroll
                for (int m = 0; m < M; m++) {
                    if constexpr (SLOPES) slopes[m][n][i] = slope_at(p[m][n][i]);
                    p[m][n][i] = fast_exp2(p[m][n][i] * scale_of_2 - log_sum);
                }
            }
        if constexpr (VALUES) multiply_rows<DIM>(d_values, p, stage + TILE_BYTES);
        if constexpr (KEYS) {
            float d_p[M][QUERIES / 8][4] = {};
            multiply<DIM>(d_p, own_keys + KEY_BYTES, stage + TILE_BYTES);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float delta = log_sums[QUERIES + n * 8 + lane % 4 * 2 + i % 2];
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        p[m][n][i] *= d_p[m][n][i] - delta;
                        if constexpr (SLOPES) p[m][n][i] *= slopes[m][n][i];
                    }
                }
            multiply_rows<DIM>(d_keys, p, stage);
        }
    }
    unsigned char *scratch = shared + warp * M * 16 * DIM * 2;
    bf16 *to = d_qkv + static_cast<int64_t>(own) * width;
    float factors[M][2];
    auto store = [&](const auto &sums, float factor, int column, unsigned char *scratch) {
#pragma unroll
        for (int m = 0; m < M; m++) factors[m][0] = factors[m][1] = factor;
        store_rows<DIM>(sums, factors, scratch, to + column, width, tokens - own, heads.dimension);
    };
    if constexpr (KEYS) store(d_keys, saved.scale, key_column, scratch);
    if constexpr (VALUES) store(d_values, 1, value_column, scratch + KEY_BYTES);
}

// The gradient of a tile of queries of a head. Shared memory: queries and d_context, and twice a tile of keys and one of
// values.
template <int DIM, int M, int KEYS, bool CAPPED>
__device__ __forceinline__ void backward_queries(Heads heads, Saved saved, bf16 *d_qkv) {
    constexpr int ROWS = WARPS * M * 16, QUERY_BYTES = ROWS * DIM * 2, TILE_BYTES = KEYS * DIM * 2;
    SHARED(unsigned char, shared);
    int head = blockIdx.x, first = (gridDim.y - 1 - blockIdx.y) * ROWS, tokens = saved.tokens;
    int warp = threadIdx.x / WARP, width = heads.width(), out_width = heads.queries * heads.dimension;
    Address queries = shared_address(shared), stages = queries + 2 * QUERY_BYTES;
    auto load = [&](int tile) {
        Address stage = stages + tile % 2 * 2 * TILE_BYTES;
        const bf16 *from = saved.qkv + static_cast<int64_t>(tile) * KEYS * width;
        int rows = tokens - tile * KEYS;
        load_tile<KEYS, DIM, THREADS>(stage, from + heads.key_column(head), width, rows, heads.dimension);
        load_tile<KEYS, DIM, THREADS>(stage + TILE_BYTES, from + heads.value_column(head), width, rows, heads.dimension);
    };
    int begin = saved.borders[first] / KEYS, end = (min(first + ROWS, tokens) + KEYS - 1) / KEYS;
    int64_t row_at = first, column = head * heads.dimension;
    load_tile<ROWS, DIM, THREADS>(queries, saved.qkv + row_at * width + column, width, tokens - first, heads.dimension);
    load_tile<ROWS, DIM, THREADS>(queries + QUERY_BYTES, saved.d_context + row_at * out_width + column, out_width,
                                  tokens - first, heads.dimension);
    load(begin);

    int own = first + warp * M * 16;
    WarpRows seen(saved.borders, own, M * 16, tokens);
    float log_sums[M][2], deltas[M][2], result[M][DIM / 8][4] = {};
    row_values(log_sums, saved.log_sums + static_cast<int64_t>(head) * tokens, own, tokens, 0.0f);
    row_values(deltas, saved.deltas + static_cast<int64_t>(head) * tokens, own, tokens, 0.0f);
    Address own_queries = queries + warp * M * 16 * DIM * 2;
    float scale_of_2 = saved.multiplier<CAPPED>() * LOG2_E;
    for (int tile = begin; tile < end; tile++) {
        wait_for_copies();
        // This tile is there, and nobody reads the one before any more.
        __syncthreads();
        if (tile + 1 < end) load(tile + 1);
        int first_key = tile * KEYS;
        if (seen.none(first_key, KEYS)) continue;
        Address stage = stages + tile % 2 * 2 * TILE_BYTES;
        float p[M][KEYS / 8][4] = {}, d_p[M][KEYS / 8][4] = {};
        multiply<DIM>(p, own_queries, stage);
        if constexpr (CAPPED) limit(p, saved.scale / saved.cap);
        if (!seen.all(first_key, KEYS)) mask(p, saved.borders, tokens, own, first_key);
        multiply<DIM>(d_p, own_queries + QUERY_BYTES, stage + TILE_BYTES);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float score = p[m][n][i], probability = fast_exp2(score * scale_of_2 - log_sums[m][i / 2] * LOG2_E);
                    p[m][n][i] = probability * (d_p[m][n][i] - deltas[m][i / 2]);
                    if constexpr (CAPPED) p[m][n][i] *= slope_at(score);
                }
        multiply_rows<DIM>(result, p, stage);
    }
    float factors[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factors[m][0] = factors[m][1] = saved.scale;
    bf16 *to = d_qkv + static_cast<int64_t>(own) * width + column;
    store_rows<DIM>(result, factors, shared + warp * M * 16 * DIM * 2, to, width, tokens - own, heads.dimension);
}

#define ARGUMENTS \
    const bf16 *qkv, const bf16 *d_context, const float *log_sums, const float *deltas, const unsigned *borders, \
        bf16 *d_qkv, int queries, int keys, int dimension, int tokens, float scale, float cap
#define SAVED Heads{queries, keys, dimension}, Saved{qkv, d_context, log_sums, deltas, borders, tokens, scale, cap}, d_qkv

#define BACKWARD_QUERIES(KIND, DIM, M, KEYS, CAPPED) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries_##KIND##_##DIM(ARGUMENTS) { \
        backward_queries<DIM, M, KEYS, CAPPED>(SAVED); \
    } \
    EXPORT(attention_backward_queries_##KIND##_##DIM)
BACKWARD_QUERIES(bf16, 64, 2, 64, false)
BACKWARD_QUERIES(bf16, 128, 2, 32, false)
BACKWARD_QUERIES(bf16, 256, 1, 32, false)
BACKWARD_QUERIES(capped_bf16, 64, 2, 64, true)
BACKWARD_QUERIES(capped_bf16, 128, 2, 32, true)
BACKWARD_QUERIES(capped_bf16, 256, 1, 32, true)

#define BACKWARD_KEYS(KIND, DIM, M, QUERIES, CAPPED) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_##KIND##_##DIM(ARGUMENTS) { \
        backward_keys<DIM, M, QUERIES, true, true, CAPPED>(SAVED); \
    } \
    EXPORT(attention_backward_keys_##KIND##_##DIM)
BACKWARD_KEYS(bf16, 64, 2, 32, false)
BACKWARD_KEYS(bf16, 128, 1, 64, false)
BACKWARD_KEYS(capped_bf16, 64, 2, 32, true)
BACKWARD_KEYS(capped_bf16, 128, 1, 64, true)

// A second layer of blocks for the values: both sums do not fit into the registers.
#define BACKWARD_WIDE_KEYS(KIND, CAPPED) \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_backward_keys_##KIND##_256(ARGUMENTS) { \
        if (blockIdx.z == 0) { \
            backward_keys<256, 1, 32, true, false, CAPPED>(SAVED); \
        } else { \
            backward_keys<256, 1, 32, false, true, CAPPED>(SAVED); \
        } \
    } \
    EXPORT(attention_backward_keys_##KIND##_256)
BACKWARD_WIDE_KEYS(bf16, false)
BACKWARD_WIDE_KEYS(capped_bf16, true)
