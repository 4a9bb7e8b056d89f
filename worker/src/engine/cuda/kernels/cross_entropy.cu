// A block for each row of logits: the loss of its target, whether the target was the likeliest, and the gradient. The loss is
// -log softmax(logits)[target], or what engine/ops/token_loss.rs makes of it. Where there is a cap, a logit x is limited to
// cap tanh(x / cap) first (Gemma Team, 2024), and left as that; the gradient is that of what logits were before they were
// multiplied by `scale`.
#include "common.cuh"

constexpr int THREADS = 512;

// What a token adds to the loss; the numbers are those of ops/cross_entropy.rs.
enum Loss { CROSS_ENTROPY, DFT, EAFT, SMOOTHED };

// Entropy of the k likeliest of a row among themselves: value after value, from the largest down.
__device__ float entropy(const float *row, int vocabulary, int k, float most, float *scratch) {
    float below = INFINITY, sum = 0, weighted = 0, left = k;
    while (left > 0) {
        float largest = -INFINITY, count = 0;
        for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
            float x = row[i];
            if (!(x < below)) continue;
            if (x > largest) count = 0;
            if (x >= largest) {
                largest = x;
                count += 1;
            }
        }
        float top = block_max<THREADS>(largest, scratch);
        count = block_sum<THREADS>(largest == top ? count : 0.0f, scratch);
        if (top == -INFINITY) break;
        count = fminf(count, left);
        float share = expf(top - most);
        sum += count * share;
        weighted += count * share * (top - most);
        left -= count;
        below = top;
    }
    return fmaxf(logf(sum) - weighted / sum, 0.0f);
}

template <typename E>
__device__ void cross_entropy(float *logits, const unsigned *targets, E *gradient, float *losses,
                              unsigned *correct, int vocabulary, int loss, float share, float alpha, float divisor,
                              int k, float scale, float cap) {
    __shared__ float scratch[THREADS / WARP];
    float *row = logits + static_cast<int64_t>(blockIdx.x) * vocabulary;
    int target = static_cast<int>(targets[blockIdx.x]);
    if (cap != 0)
        for (int i = threadIdx.x; i < vocabulary; i += THREADS) row[i] = cap * tanhf(row[i] / cap);
    float most = -INFINITY;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) most = fmaxf(most, row[i]);
    // A NaN is lost in a maximum; the sum below brings it back.
    most = block_max<THREADS>(most, scratch);
    // Limited by another thread, which that barrier waited for.
    float own = row[target];
    float sum = 0, before = 0, all = 0;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        sum += __expf(row[i] - most);
        // Of several that are likeliest the first one counts.
        before += row[i] == most && i < target;
        if (loss == SMOOTHED) all += row[i] - most;
    }
    sum = block_sum<THREADS>(sum, scratch);
    before = block_sum<THREADS>(before, scratch);
    float inverse = 1.0f / sum, weight = 1.0f, everywhere = 0.0f;
    if (loss == DFT) weight = __expf(own - most) * inverse;
    if (loss == EAFT) weight = powf(entropy(row, vocabulary, k, most, scratch) / divisor, alpha);
    if (loss == SMOOTHED) {
        all = block_sum<THREADS>(all, scratch);
        everywhere = share / vocabulary;
    }
    if (threadIdx.x == 0) {
        float log_sum = logf(sum), nats = most - own + log_sum;
        losses[blockIdx.x] = loss == CROSS_ENTROPY ? nats
                             : loss == SMOOTHED    ? (1.0f - share) * nats + share * (log_sum - all / vocabulary)
                                                   : weight * nats;
        correct[blockIdx.x] = own == most && before == 0;
    }
    if (!gradient) return;
    E *out = gradient + static_cast<int64_t>(blockIdx.x) * vocabulary;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        float difference = __expf(row[i] - most) * inverse - (i == target ? 1.0f - share : 0.0f);
        float slope = scale;
        if (cap != 0) {
            float t = row[i] / cap;
            slope *= 1.0f - t * t;
        }
        narrow(slope * (loss == CROSS_ENTROPY ? difference : weight * (difference - everywhere)), out[i]);
    }
}

#define CROSS_ENTROPY_ARGUMENTS(E) \
    float *logits, const unsigned *targets, E *gradient, float *losses, unsigned *correct, int vocabulary, \
    int wants_gradient, int loss, float share, float alpha, float divisor, int k, float scale, float cap
TWINS(cross_entropy, CROSS_ENTROPY_ARGUMENTS, cross_entropy(logits, targets, wants_gradient ? gradient : nullptr, losses,
      correct, vocabulary, loss, share, alpha, divisor, k, scale, cap))
