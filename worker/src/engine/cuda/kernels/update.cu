// The exact sum and the update. The arithmetic is that of the processor's, rounding by rounding (common/src/exact.rs,
// engine/optim.rs), so the same gradients give the same bits on either.
#include "common.cuh"

#define EACH(i, n) \
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < (n); \
         i += static_cast<int64_t>(gridDim.x) * blockDim.x)

constexpr double UNIT = 281474976710656.0; // 2^48

// sum += round_half_even(g * 2^48 / T); what is not finite or beyond the limit is counted and adds nothing.
__device__ __forceinline__ void add_exact(long long &sum, float gradient, unsigned long long *invalid,
                                          double trained_tokens, double limit) {
    double scaled = rint(static_cast<double>(gradient) * UNIT / trained_tokens);
    if (fabs(scaled) <= limit) {
        // Wrapping, because partial sums may leave the range and come back.
        sum = static_cast<long long>(static_cast<unsigned long long>(sum) +
                                     static_cast<unsigned long long>(static_cast<long long>(scaled)));
    } else {
        // A count has no order.
        atomicAdd(invalid, 1ull);
    }
}

extern "C" __global__ void exact_accumulate(long long *sums, const float *gradient, unsigned long long *invalid,
                                            int64_t n, double trained_tokens, double limit) {
    EACH(i, n) add_exact(sums[i], gradient[i], invalid, trained_tokens, limit);
}
EXPORT(exact_accumulate)

// The same for single rows of a matrix: gradient[i] goes to the row rows[i], and no two are the same.
extern "C" __global__ void exact_accumulate_rows(long long *sums, const float *gradient, const unsigned *rows,
                                                 unsigned long long *invalid, int64_t count, int width,
                                                 double trained_tokens, double limit) {
    EACH(i, count * width) {
        add_exact(sums[static_cast<int64_t>(rows[i / width]) * width + i % width], gradient[i], invalid, trained_tokens,
                  limit);
    }
}
EXPORT(exact_accumulate_rows)

// sums += factor * g
extern "C" __global__ void fast_accumulate(float *sums, const float *gradient, int64_t n, float factor) {
    EACH(i, n) sums[i] = __fadd_rn(sums[i], __fmul_rn(gradient[i], factor));
}
EXPORT(fast_accumulate)

extern "C" __global__ void fast_accumulate_rows(float *sums, const float *gradient, const unsigned *rows, int64_t count,
                                                int width, float factor) {
    EACH(i, count * width) {
        float &sum = sums[static_cast<int64_t>(rows[i / width]) * width + i % width];
        sum = __fadd_rn(sum, __fmul_rn(gradient[i], factor));
    }
}
EXPORT(fast_accumulate_rows)

__device__ __forceinline__ float mean_of(long long sum) {
    return static_cast<float>(static_cast<double>(sum) * (1.0 / UNIT));
}

extern "C" __global__ void exact_means(const long long *sums, float *means, int64_t n) {
    EACH(i, n) means[i] = mean_of(sums[i]);
}
EXPORT(exact_means)

// A block for each chunk: the sum of its squares in float64.
extern "C" __global__ void squares(const float *x, double *sums, int64_t n, int64_t chunk) {
    SHARED(double, partial);
    int64_t first = blockIdx.x * chunk, end = min(first + chunk, n);
    double sum = 0;
    for (int64_t i = first + threadIdx.x; i < end; i += blockDim.x) sum += static_cast<double>(x[i]) * x[i];
    partial[threadIdx.x] = sum;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}
EXPORT(squares)

// Adam with decoupled weight decay (Loshchilov & Hutter, 2019).
extern "C" __global__ void adamw(float *weights, float *exp_avg, float *exp_avg_sq, const float *gradient, int64_t n,
                                 float gradient_scale, float keep, float one_minus_beta1, float beta2,
                                 float one_minus_beta2, float correction2_sqrt, float epsilon, float step_size) {
    EACH(i, n) {
        float g = __fmul_rn(gradient[i], gradient_scale);
        float m = exp_avg[i], v = exp_avg_sq[i];
        m = __fadd_rn(m, __fmul_rn(__fsub_rn(g, m), one_minus_beta1));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(__fmul_rn(g, g), one_minus_beta2));
        float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), correction2_sqrt), epsilon);
        weights[i] = __fsub_rn(__fmul_rn(weights[i], keep), __fmul_rn(step_size, __fdiv_rn(m, denominator)));
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
    }
}
EXPORT(adamw)

// The sign of an interpolation between gradient and moment, with decoupled weight decay (Chen et al., 2023).
extern "C" __global__ void lion(float *weights, float *moment, const float *gradient, int64_t n, float gradient_scale,
                                float keep, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2,
                                float learning_rate) {
    EACH(i, n) {
        float g = __fmul_rn(gradient[i], gradient_scale), m = moment[i];
        float direction = __fadd_rn(__fmul_rn(m, beta1), __fmul_rn(g, one_minus_beta1));
        float sign = static_cast<float>((direction > 0) - (direction < 0));
        weights[i] = __fsub_rn(__fmul_rn(weights[i], keep), __fmul_rn(learning_rate, sign));
        moment[i] = __fadd_rn(__fmul_rn(m, beta2), __fmul_rn(g, one_minus_beta2));
    }
}
EXPORT(lion)

// Gradient descent, the weight decay added to the gradient.
__device__ __forceinline__ float decayed(float gradient, float scale, float weight, float weight_decay) {
    return __fadd_rn(__fmul_rn(gradient, scale), __fmul_rn(weight, weight_decay));
}

extern "C" __global__ void sgd(float *weights, const float *gradient, int64_t n, float gradient_scale,
                               float weight_decay, float learning_rate) {
    EACH(i, n) {
        float g = decayed(gradient[i], gradient_scale, weights[i], weight_decay);
        weights[i] = __fsub_rn(weights[i], __fmul_rn(learning_rate, g));
    }
}
EXPORT(sgd)

extern "C" __global__ void sgd_momentum(float *weights, float *momentum, const float *gradient, int64_t n,
                                        float gradient_scale, float weight_decay, float kept,
                                        float one_minus_dampening, int is_nesterov, float share, float learning_rate) {
    EACH(i, n) {
        float g = decayed(gradient[i], gradient_scale, weights[i], weight_decay);
        float m = __fadd_rn(__fmul_rn(momentum[i], kept), __fmul_rn(g, one_minus_dampening));
        float direction = is_nesterov ? __fadd_rn(g, __fmul_rn(m, share)) : m;
        weights[i] = __fsub_rn(weights[i], __fmul_rn(learning_rate, direction));
        momentum[i] = m;
    }
}
EXPORT(sgd_momentum)
