// A block for each row of logits: its loss -log softmax(logits)[target], whether the target was the likeliest, and the
// gradient, softmax minus one at the target.
#include "common.cuh"

constexpr int THREADS = 512;

template <typename E>
__device__ void cross_entropy(const float *logits, const unsigned *targets, E *gradient, float *losses,
                              unsigned *correct, int vocabulary) {
    __shared__ float scratch[THREADS / WARP];
    const float *row = logits + static_cast<int64_t>(blockIdx.x) * vocabulary;
    int target = static_cast<int>(targets[blockIdx.x]);
    float own = row[target];
    float most = -INFINITY;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) most = fmaxf(most, row[i]);
    // A NaN is lost in a maximum; the sum below brings it back.
    most = block_max<THREADS>(most, scratch);
    float sum = 0, before = 0;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        sum += __expf(row[i] - most);
        // Of several that are likeliest the first one counts.
        before += row[i] == most && i < target;
    }
    sum = block_sum<THREADS>(sum, scratch);
    before = block_sum<THREADS>(before, scratch);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = most - own + logf(sum);
        correct[blockIdx.x] = own == most && before == 0;
    }
    if (!gradient) return;
    E *out = gradient + static_cast<int64_t>(blockIdx.x) * vocabulary;
    float inverse = 1.0f / sum;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS)
        narrow(__expf(row[i] - most) * inverse - (i == target ? 1.0f : 0.0f), out[i]);
}

#define CROSS_ENTROPY(E) \
    const float *logits, const unsigned *targets, E *gradient, float *losses, unsigned *correct, int vocabulary, \
    int wants_gradient
TWINS(cross_entropy, CROSS_ENTROPY, cross_entropy(logits, targets, wants_gradient ? gradient : nullptr, losses, correct,
      vocabulary))
