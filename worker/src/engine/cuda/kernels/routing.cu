// Which experts each token goes through (Shazeer et al., 2017), and the rows that this makes: a row for each token in each of its
// experts, sorted by expert and within an expert by token. No row's place depends on which thread is first.
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP;
// The token of a row that only fills up an expert's rows.
constexpr unsigned NOBODY = 0xffffffffu;

// The token of this thread's warp.
__device__ __forceinline__ int warp_token() { return blockIdx.x * WARPS + threadIdx.x / WARP; }

// Where a probability stands among others: those that are no numbers last.
__device__ __forceinline__ float standing(float p) { return p >= 0 ? p : -1; }

// A warp for each token: logits become probabilities, and the experts of the largest are chosen, ascending. Of equal ones the first
// counts.
extern "C" __global__ void route_tokens(float *probabilities, unsigned *chosen, int tokens, int experts, int per_token) {
    int token = warp_token(), lane = threadIdx.x % WARP;
    if (token >= tokens) return;
    float *row = probabilities + static_cast<int64_t>(token) * experts;
    float most = -INFINITY, sum = 0;
    for (int i = lane; i < experts; i += WARP) most = fmaxf(most, row[i]);
    most = warp_max(most);
    for (int i = lane; i < experts; i += WARP) sum += expf(row[i] - most);
    float inverse = 1.0f / warp_sum(sum);
    for (int i = lane; i < experts; i += WARP) row[i] = expf(row[i] - most) * inverse;
    // What was found last: the next is the largest of those that stand behind it.
    float last = INFINITY;
    int last_at = -1;
    for (int found = 0; found < per_token; found++) {
        float best = -INFINITY;
        int at = experts;
        for (int i = lane; i < experts; i += WARP) {
            float p = standing(row[i]);
            bool is_behind = p < last || (p == last && i > last_at);
            if (!is_behind || p <= best) continue;
            best = p;
            at = i;
        }
        for (int other = WARP / 2; other > 0; other /= 2) {
            float p = __shfl_xor_sync(0xffffffffu, best, other);
            int i = __shfl_xor_sync(0xffffffffu, at, other);
            if (p < best || (p == best && i > at)) continue;
            best = p;
            at = i;
        }
        last = best;
        last_at = at;
    }
    unsigned *out = chosen + static_cast<int64_t>(token) * per_token;
    for (int first = 0; first < experts; first += WARP) {
        int i = first + lane;
        float p = i < experts ? standing(row[i]) : -INFINITY;
        bool is_chosen = p > last || (p == last && i <= last_at);
        unsigned found = __ballot_sync(0xffffffffu, is_chosen);
        if (is_chosen) out[__popc(found & ((1u << lane) - 1))] = i;
        out += __popc(found);
    }
}
EXPORT(route_tokens)

// Of the threads of a block those that have something: how many come before this one, and how many there are. `scratch` has a number
// for each warp; may be called again at once.
struct Found {
    int before, all;

    __device__ __forceinline__ Found(bool has, int *scratch) : all(0) {
        int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        unsigned found = __ballot_sync(0xffffffffu, has);
        before = __popc(found & ((1u << lane) - 1));
        if (lane == 0) scratch[warp] = __popc(found);
        __syncthreads();
        for (int i = 0; i < WARPS; i++) {
            if (i < warp) before += scratch[i];
            all += scratch[i];
        }
        __syncthreads();
    }
};

// Where a token's expert is among those that were chosen; -1 if it is none of them.
__device__ __forceinline__ int64_t place_of(const unsigned *chosen, int token, unsigned expert, int per_token) {
    int64_t first = static_cast<int64_t>(token) * per_token;
    for (int i = 0; i < per_token; i++)
        if (chosen[first + i] == expert) return first + i;
    return -1;
}

// A block for each expert: how many tokens go through it.
extern "C" __global__ void count_routes(const unsigned *chosen, unsigned *counts, int tokens, int per_token) {
    __shared__ int scratch[WARPS];
    int count = 0;
    for (int first = 0; first < tokens; first += THREADS) {
        int token = first + threadIdx.x;
        count += Found(token < tokens && place_of(chosen, token, blockIdx.x, per_token) >= 0, scratch).all;
    }
    if (threadIdx.x == 0) counts[blockIdx.x] = count;
}
EXPORT(count_routes)

// A block for each expert: its rows, which begin where those of the experts before it end, and are filled up to a `multiple`.
extern "C" __global__ void place_routes(const unsigned *chosen, const float *probabilities, const unsigned *counts,
                                        unsigned *row_tokens, unsigned *row_experts, float *weights, unsigned *of_token,
                                        int tokens, int experts, int per_token, int multiple) {
    __shared__ int scratch[WARPS];
    unsigned expert = blockIdx.x;
    int row = 0;
    for (unsigned i = 0; i < expert; i++) row += (counts[i] + multiple - 1) / multiple * multiple;
    int end = row + (counts[expert] + multiple - 1) / multiple * multiple;
    for (int first = 0; first < tokens; first += THREADS) {
        int token = first + threadIdx.x;
        int64_t at = token < tokens ? place_of(chosen, token, expert, per_token) : -1;
        Found found(at >= 0, scratch);
        if (at >= 0) {
            int own = row + found.before;
            row_tokens[own] = token;
            row_experts[own] = expert;
            weights[own] = probabilities[static_cast<int64_t>(token) * experts + expert];
            of_token[at] = own;
        }
        row += found.all;
    }
    for (int i = row + threadIdx.x; i < end; i += THREADS) {
        row_tokens[i] = NOBODY;
        row_experts[i] = expert;
        weights[i] = 0;
    }
}
EXPORT(place_routes)

// Divides the weights of each token's experts by their sum.
extern "C" __global__ void normalise_routes(const unsigned *of_token, float *weights, int tokens, int per_token) {
    EACH(token, tokens) {
        const unsigned *rows = of_token + token * per_token;
        float sum = 0;
        for (int i = 0; i < per_token; i++) sum += weights[rows[i]];
        for (int i = 0; i < per_token; i++) weights[rows[i]] /= sum;
    }
}
EXPORT(normalise_routes)

// A warp for each token: the gradient of the logits from that of each row's weight, as engine/ops/routing.rs has it. `of_loss`, where
// it is given, is what the router's own loss adds to that of each probability.
template <typename E>
__device__ void routing_backward(const float *probabilities, const unsigned *chosen, const unsigned *of_token,
                                 const float *weights, const float *d_weights, const float *of_loss, E *d_logits, int tokens,
                                 int experts, int per_token, int normalises) {
    int token = warp_token(), lane = threadIdx.x % WARP;
    if (token >= tokens) return;
    int64_t first = static_cast<int64_t>(token) * per_token, at = static_cast<int64_t>(token) * experts;
    const float *p = probabilities + at;
    float mean = 0, sum = 1, inner = 0, inner_of_loss = 0;
    if (normalises) {
        sum = 0;
        for (int i = 0; i < per_token; i++) {
            unsigned row = of_token[first + i];
            sum += p[chosen[first + i]];
            mean += d_weights[row] * weights[row];
        }
    }
    for (int i = 0; i < per_token; i++) inner += (d_weights[of_token[first + i]] - mean) / sum * p[chosen[first + i]];
    if (of_loss) {
        for (int i = lane; i < experts; i += WARP) inner_of_loss += of_loss[i] * p[i];
        inner_of_loss = warp_sum(inner_of_loss);
    }
    for (int i = lane; i < experts; i += WARP) {
        int64_t place = place_of(chosen, token, i, per_token);
        float dp = place < 0 ? 0 : (d_weights[of_token[place]] - mean) / sum;
        float gradient = p[i] * (dp - inner);
        if (of_loss) gradient += p[i] * (of_loss[i] - inner_of_loss);
        narrow(gradient, d_logits[at + i]);
    }
}
#define ROUTING_BACKWARD(E) \
    const float *probabilities, const unsigned *chosen, const unsigned *of_token, const float *weights, \
        const float *d_weights, const float *of_loss, E *d_logits, int tokens, int experts, int per_token, int normalises
TWINS(routing_backward, ROUTING_BACKWARD, routing_backward(probabilities, chosen, of_token, weights, d_weights, of_loss,
      d_logits, tokens, experts, per_token, normalises))

// A block for each expert: the sum of its probability over all tokens.
extern "C" __global__ void probability_sums(const float *probabilities, double *sums, int tokens, int experts) {
    __shared__ double scratch[THREADS];
    int thread = threadIdx.x;
    double sum = 0;
    for (int token = thread; token < tokens; token += THREADS)
        sum += probabilities[static_cast<int64_t>(token) * experts + blockIdx.x];
    scratch[thread] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half) scratch[thread] += scratch[thread + half];
        __syncthreads();
    }
    if (thread == 0) sums[blockIdx.x] = scratch[0];
}
EXPORT(probability_sums)
