// Updates of what has moments of 8 bits, a thread block for each of their blocks. The arithmetic is that of the processor's
// (engine/optim/eight_bits.rs), rounding by rounding.
#include "common.cuh"

constexpr int BLOCK_SCALARS = 256;

// The values of the codes, and above which limit a code is higher (Codebook).
struct Codebook {
    const float *map, *limits;
};

__device__ __forceinline__ Codebook signed_codes(const float *books) { return {books, books + BLOCK_SCALARS}; }
__device__ __forceinline__ Codebook unsigned_codes(const float *books) {
    return {books + 2 * BLOCK_SCALARS, books + 3 * BLOCK_SCALARS};
}

// The number of limits below x.
__device__ __forceinline__ unsigned char code_of(Codebook codes, float x) {
    if (!isfinite(x)) return 255;
    int low = 0;
    for (int step = 128; step > 0; step /= 2) {
        if (x > codes.limits[low + step - 1]) low += step;
    }
    return static_cast<unsigned char>(low);
}

// The largest magnitude of a block, to all its threads. A NaN is passed over.
__device__ __forceinline__ float largest_magnitude(float x, float *shared) {
    float magnitude = fabsf(x);
    shared[threadIdx.x] = magnitude > 0 ? magnitude : 0;
    for (unsigned half = BLOCK_SCALARS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            float other = shared[threadIdx.x + half];
            if (other > shared[threadIdx.x]) shared[threadIdx.x] = other;
        }
    }
    __syncthreads();
    float most = shared[0];
    // Before the next one is looked for.
    __syncthreads();
    return most > 3.402823466e38f ? 3.402823466e38f : most;
}

// Writes the code of a thread's moment, and for the block its largest magnitude.
__device__ __forceinline__ void close(Codebook codes, float x, bool is_there, unsigned char *code, float *absmax,
                                      float *shared) {
    float most = largest_magnitude(x, shared);
    if (is_there) *code = most > 0 ? code_of(codes, __fdiv_rn(x, most)) : 0;
    if (threadIdx.x == 0) *absmax = most;
}

extern "C" __global__ void adamw_8bit(float *weights, unsigned char *first_codes, float *first_absmax,
                                      unsigned char *second_codes, float *second_absmax, const float *gradient,
                                      const float *books, int64_t n, float gradient_scale, float keep,
                                      float one_minus_beta1, float beta2, float one_minus_beta2,
                                      float correction2_sqrt, float epsilon, float step_size) {
    SHARED(float, shared);
    int64_t block = blockIdx.x, i = block * BLOCK_SCALARS + threadIdx.x;
    Codebook first = signed_codes(books), second = unsigned_codes(books);
    bool is_there = i < n;
    float m = 0, v = 0;
    if (is_there) {
        float g = __fmul_rn(gradient[i], gradient_scale);
        m = __fmul_rn(first.map[first_codes[i]], first_absmax[block]);
        v = __fmul_rn(second.map[second_codes[i]], second_absmax[block]);
        m = __fadd_rn(m, __fmul_rn(__fsub_rn(g, m), one_minus_beta1));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(__fmul_rn(g, g), one_minus_beta2));
        float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), correction2_sqrt), epsilon);
        weights[i] = __fsub_rn(__fmul_rn(weights[i], keep), __fmul_rn(step_size, __fdiv_rn(m, denominator)));
    }
    // Every thread has read what its block's magnitudes were: the first step of the search waits for all.
    close(first, m, is_there, first_codes + i, first_absmax + block, shared);
    close(second, v, is_there, second_codes + i, second_absmax + block, shared);
}
EXPORT(adamw_8bit)

extern "C" __global__ void lion_8bit(float *weights, unsigned char *codes, float *absmax, const float *gradient,
                                     const float *books, int64_t n, float gradient_scale, float keep, float beta1,
                                     float one_minus_beta1, float beta2, float one_minus_beta2, float learning_rate) {
    SHARED(float, shared);
    int64_t block = blockIdx.x, i = block * BLOCK_SCALARS + threadIdx.x;
    Codebook book = signed_codes(books);
    bool is_there = i < n;
    float m = 0;
    if (is_there) {
        float g = __fmul_rn(gradient[i], gradient_scale);
        m = __fmul_rn(book.map[codes[i]], absmax[block]);
        float direction = __fadd_rn(__fmul_rn(m, beta1), __fmul_rn(g, one_minus_beta1));
        float sign = static_cast<float>((direction > 0) - (direction < 0));
        weights[i] = __fsub_rn(__fmul_rn(weights[i], keep), __fmul_rn(learning_rate, sign));
        m = __fadd_rn(__fmul_rn(m, beta2), __fmul_rn(g, one_minus_beta2));
    }
    close(book, m, is_there, codes + i, absmax + block, shared);
}
EXPORT(lion_8bit)
