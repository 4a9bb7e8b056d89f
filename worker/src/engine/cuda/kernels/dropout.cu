// Inverted dropout by the counter-based generator of common/src/rng.rs: ChaCha8 (Bernstein, 2008), a key for each tile of
// rows, one word for each scalar in order. A thread draws one block of 16 words.
#include "common.cuh"

constexpr int WORDS = 16;

__device__ __forceinline__ uint32_t rotate(uint32_t x, int by) { return x << by | x >> (32 - by); }

__device__ __forceinline__ void quarter(uint32_t &a, uint32_t &b, uint32_t &c, uint32_t &d) {
    a += b; d = rotate(d ^ a, 16);
    c += d; b = rotate(b ^ c, 12);
    a += b; d = rotate(d ^ a, 8);
    c += d; b = rotate(b ^ c, 7);
}

__device__ __forceinline__ void chacha8(const uint32_t *key, uint64_t block, uint32_t *out) {
    uint32_t s[WORDS] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    for (int i = 0; i < 8; i++) s[4 + i] = key[i];
    s[12] = static_cast<uint32_t>(block);
    s[13] = static_cast<uint32_t>(block >> 32);
    s[14] = s[15] = 0;
    for (int i = 0; i < WORDS; i++) out[i] = s[i];
    for (int round = 0; round < 8; round += 2) {
        quarter(out[0], out[4], out[8], out[12]);
        quarter(out[1], out[5], out[9], out[13]);
        quarter(out[2], out[6], out[10], out[14]);
        quarter(out[3], out[7], out[11], out[15]);
        quarter(out[0], out[5], out[10], out[15]);
        quarter(out[1], out[6], out[11], out[12]);
        quarter(out[2], out[7], out[8], out[13]);
        quarter(out[3], out[4], out[9], out[14]);
    }
    for (int i = 0; i < WORDS; i++) out[i] += s[i];
}

// Rows of `width`, `from_stride` and `to_stride` apart; blockIdx.y is the tile of rows.
template <typename E>
__device__ void dropout(const E *from, E *to, const uint32_t *keys, int rows, int width, int from_stride, int to_stride,
                        int tile, unsigned threshold, float keep_scale) {
    int first = blockIdx.y * tile;
    int64_t scalars = static_cast<int64_t>(min(tile, rows - first)) * width;
    int64_t block = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    if (block * WORDS >= scalars) return;
    uint32_t draws[WORDS];
    chacha8(keys + blockIdx.y * 8, block, draws);
    for (int i = 0; i < WORDS; i++) {
        int64_t at = block * WORDS + i;
        if (at >= scalars) return;
        int64_t row = first + at / width, column = at % width;
        float x = widen(from[row * from_stride + column]);
        narrow(draws[i] < threshold ? 0.0f : x * keep_scale, to[row * to_stride + column]);
    }
}

#define DROPOUT(E) \
    const E *from, E *to, const uint32_t *keys, int rows, int width, int from_stride, int to_stride, int tile, \
    unsigned threshold, float keep_scale
TWINS(dropout, DROPOUT, dropout(from, to, keys, rows, width, from_stride, to_stride, tile, threshold, keep_scale))
