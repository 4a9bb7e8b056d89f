// Columns of what linear attention reads, key head by key head or part by part (engine/ops/key_groups.rs).
#include "common.cuh"

constexpr int THREADS = 256;

// The column, key head by key head, of one that lies part by part.
__device__ __forceinline__ int grouped(int column, int key_heads, int value_heads, int key_dim, int value_dim) {
    int shared = value_heads / key_heads, values = shared * value_dim, of_head = 2 * (key_dim + values), before = 0;
    // Queries, keys, values and their gates, then both gates of the rule.
    int parts[] = {key_dim, key_dim, values, values};
#pragma unroll
    for (int part = 0; part < 4; part++) {
        int all = key_heads * parts[part];
        if (column < all) return column / parts[part] * of_head + before + column % parts[part];
        column -= all;
        before += parts[part];
    }
    int gate = column / value_heads, head = column % value_heads;
    return key_heads * of_head + head / shared * 2 * shared + gate * shared + head % shared;
}

// A block for each row, `stride` apart, which it has in shared memory meanwhile. Splits it, or joins what was split.
template <typename E>
__device__ void reorder(E *rows, int width, int64_t stride, int joins, int key_heads, int value_heads, int key_dim, int value_dim) {
    SHARED(E, before);
    E *row = rows + blockIdx.x * stride;
    for (int i = threadIdx.x; i < width; i += THREADS) before[i] = row[i];
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS) {
        int other = grouped(i, key_heads, value_heads, key_dim, value_dim);
        if (joins) row[other] = before[i];
        else row[i] = before[other];
    }
}
#define KEY_GROUPS(E) E *rows, int width, int64_t stride, int joins, int key_heads, int value_heads, int key_dim, int value_dim
TWINS(key_groups, KEY_GROUPS, reorder(rows, width, stride, joins, key_heads, value_heads, key_dim, value_dim))
