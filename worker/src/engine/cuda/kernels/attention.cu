// Causal attention within segments or windows of them, forward, in bfloat16 (FlashAttention-2, Dao, 2023): a block for each tile of query rows
// and each head, four warps of 16 M rows each. Keys and values come in tiles, the next one while this one is worked on;
// tiles that no row sees are left out, and only tiles that some row sees a part of are masked.
#include "attention.cuh"

// Scores into exponentials against the largest score of each row so far; what was summed before shrinks to match. `sums` are
// those of this lane's columns.
template <int DIM, int M, int N>
__device__ __forceinline__ void softmax(float (&scores)[M][N][4], float (&largest)[M][2], float (&sums)[M][2],
                                        float (&context)[M][DIM / 8][4], float scale) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = largest[m][half];
#pragma unroll
            for (int n = 0; n < N; n++)
                most = fmaxf(most, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            // A row that has seen no key yet.
            float shift = most == -INFINITY ? 0 : most * scale;
            float shrink = fast_exp2(largest[m][half] * scale - shift);
            largest[m][half] = most;
            float sum = sums[m][half] * shrink;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; i++) {
                    scores[m][n][i] = fast_exp2(scores[m][n][i] * scale - shift);
                    sum += scores[m][n][i];
                }
            sums[m][half] = sum;
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                context[m][n][half * 2] *= shrink;
                context[m][n][half * 2 + 1] *= shrink;
            }
        }
}

// Rows of the context are `stride` apart. `starts` are the first keys that each query sees, which never decrease. Where there are
// `sinks`, that of a head takes part in the softmax of each row, and has no value (Xiao et al., 2023). Shared memory: the queries, and
// twice a tile of keys and one of values.
template <int DIM, int M, int KEYS, bool CAPPED>
__device__ __forceinline__ void forward(Heads heads, const bf16 *qkv, bf16 *context, float *log_sums,
                                        const unsigned *starts, const float *sinks, int tokens, int stride, float scale,
                                        float cap) {
    constexpr int ROWS = WARPS * M * 16, QUERY_BYTES = ROWS * DIM * 2, TILE_BYTES = KEYS * DIM * 2;
    SHARED(unsigned char, shared);
    int head = blockIdx.x, first = (gridDim.y - 1 - blockIdx.y) * ROWS;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, width = heads.width();
    Address queries = shared_address(shared), stages = queries + QUERY_BYTES;
    auto load = [&](int tile) {
        Address stage = stages + tile % 2 * 2 * TILE_BYTES;
        const bf16 *from = qkv + static_cast<int64_t>(tile) * KEYS * width;
        int rows = tokens - tile * KEYS;
        load_tile<KEYS, DIM, THREADS>(stage, from + heads.key_column(head), width, rows, heads.dimension);
        load_tile<KEYS, DIM, THREADS>(stage + TILE_BYTES, from + heads.value_column(head), width, rows, heads.dimension);
    };
    int begin = starts[first] / KEYS, end = (min(first + ROWS, tokens) + KEYS - 1) / KEYS;
    const bf16 *rows = qkv + static_cast<int64_t>(first) * width + head * heads.dimension;
    load_tile<ROWS, DIM, THREADS>(queries, rows, width, tokens - first, heads.dimension);
    load(begin);

    int own = first + warp * M * 16;
    WarpRows seen(starts, own, M * 16, tokens);
    float largest[M][2], sums[M][2] = {}, result[M][DIM / 8][4] = {};
#pragma unroll
    for (int m = 0; m < M; m++) largest[m][0] = largest[m][1] = -INFINITY;
    Address own_queries = queries + warp * M * 16 * DIM * 2;
    float multiplier = CAPPED ? cap : scale, scale_of_2 = multiplier * LOG2_E;
    for (int tile = begin; tile < end; tile++) {
        wait_for_copies();
        // This tile is there, and nobody reads the one before any more.
        __syncthreads();
        if (tile + 1 < end) load(tile + 1);
        int first_key = tile * KEYS;
        if (seen.none(first_key, KEYS)) continue;
        Address stage = stages + tile % 2 * 2 * TILE_BYTES;
        float scores[M][KEYS / 8][4] = {};
        multiply<DIM>(scores, own_queries, stage);
        if constexpr (CAPPED) limit(scores, scale / cap);
        if (!seen.all(first_key, KEYS)) mask(scores, starts, tokens, own, first_key);
        softmax<DIM>(scores, largest, sums, result, scale_of_2);
        multiply_rows<DIM>(result, scores, stage + TILE_BYTES);
    }
    float factors[M][2], sink = sinks ? sinks[head] : -INFINITY;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = sums[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            float most = largest[m][half] * multiplier, shift = fmaxf(most, sink), shrink = expf(most - shift);
            sum = sum * shrink + expf(sink - shift);
            factors[m][half] = shrink / sum;
            int row = own + m * 16 + half * 8 + lane / 4;
            if (lane % 4 == 0 && row < tokens)
                log_sums[static_cast<int64_t>(head) * tokens + row] = shift + logf(sum);
        }
    bf16 *to = context + static_cast<int64_t>(own) * stride + head * heads.dimension;
    store_rows<DIM>(result, factors, shared + warp * M * 16 * DIM * 2, to, stride, tokens - own, heads.dimension);
}

#define FORWARD(KIND, DIM, M, KEYS, CAPPED) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_forward_##KIND##_##DIM( \
        const bf16 *qkv, bf16 *context, float *log_sums, const unsigned *starts, const float *sinks, int queries, int keys, \
        int dimension, int tokens, int stride, float scale, float cap) { \
        Heads heads{queries, keys, dimension}; \
        forward<DIM, M, KEYS, CAPPED>(heads, qkv, context, log_sums, starts, sinks, tokens, stride, scale, cap); \
    } \
    EXPORT(attention_forward_##KIND##_##DIM)
FORWARD(bf16, 64, 2, 64, false)
FORWARD(bf16, 128, 2, 64, false)
FORWARD(bf16, 256, 1, 32, false)
FORWARD(capped_bf16, 64, 2, 64, true)
FORWARD(capped_bf16, 128, 2, 64, true)
FORWARD(capped_bf16, 256, 1, 32, true)
