// CUDA's words for a C++ compiler: the threads of a block run one after another on the processor, each on a stack of its
// own, and change places where they wait for each other. Included in place of CUDA's headers by `nvcc` in this folder.
//
// Slow, exact about what is read and written, and silent about races: a barrier that is missing may go unseen here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
// Several tests launch at once, each from a thread of its own, which runs all threads of its blocks.
#define __shared__ static thread_local
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulated {
// Of the thread that runs.
extern thread_local dim3 thread_index, block_index, block_size, grid_size;

void block_barrier();
void warp_barrier();
// 32 lanes of 64 bytes for the warp that runs.
unsigned char (*warp_board())[64];
// Barriers that the warp that runs has passed.
unsigned warp_epoch();
int lane();
void *dynamic_shared();
void run(dim3 grid, dim3 block, unsigned shared, void (*body)(void *), void *argument);

template <typename T> T shuffle(T value, int source) {
    static_assert(sizeof(T) <= 16, "a shuffled value");
    auto board = warp_board();
    std::memcpy(board[lane()], &value, sizeof(T));
    warp_barrier();
    T found;
    std::memcpy(&found, board[source & 31], sizeof(T));
    warp_barrier();
    return found;
}

// Shows the value of each lane of the warp to `hear`, at the cost of one barrier. Two halves of the board take
// turns, beyond the bytes of a shuffle: who writes to a half again has passed a barrier that all its readers came to later.
template <typename T, typename Hear> auto exchange(const T &mine, Hear hear) {
    static_assert(sizeof(T) <= 24, "half of what a shuffle leaves of a board");
    size_t half = 16 + 24 * (warp_epoch() % 2);
    auto board = warp_board();
    std::memcpy(board[lane()] + half, &mine, sizeof(T));
    warp_barrier();
    return hear([&](int lane) {
        T found;
        std::memcpy(&found, board[lane] + half, sizeof(T));
        return found;
    });
}

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A> *>(arguments[I])...);
}

template <typename... A>
void launch(void (*kernel)(A...), dim3 grid, dim3 block, unsigned shared, void **arguments) {
    struct Call {
        void (*kernel)(A...);
        void **arguments;
    } what{kernel, arguments};
    run(
        grid, block, shared,
        [](void *argument) {
            auto *what = static_cast<Call *>(argument);
            call(what->kernel, what->arguments, std::index_sequence_for<A...>{});
        },
        &what);
}
} // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_size
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulated::warp_barrier(); }
template <typename T> T __shfl_sync(unsigned, T value, int source) { return emulated::shuffle(value, source); }
template <typename T> T __shfl_xor_sync(unsigned, T value, int mask) { return emulated::shuffle(value, emulated::lane() ^ mask); }
template <typename T> T __shfl_down_sync(unsigned, T value, unsigned by) {
    int source = emulated::lane() + static_cast<int>(by);
    return emulated::shuffle(value, source < 32 ? source : emulated::lane());
}
inline unsigned __ballot_sync(unsigned, bool value) {
    return emulated::exchange(value, [](auto of) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; lane++) bits |= static_cast<unsigned>(of(lane)) << lane;
        return bits;
    });
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __uint_as_float(unsigned x) { float f; std::memcpy(&f, &x, 4); return f; }
inline unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
using std::isfinite;

struct bf16 {
    uint16_t bits;
};
inline float widen(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline void narrow(float x, bf16 &to) {
    unsigned bits = __float_as_uint(x);
    to.bits = static_cast<uint16_t>(x != x ? (bits >> 16 | 0x40) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#define SHARED(type, name) type *name = static_cast<type *>(emulated::dynamic_shared())
#define EXPORT(name) \
    extern "C" __attribute__((visibility("default"))) void name##_emulated(dim3 grid, dim3 block, unsigned shared, void **arguments) { \
        emulated::launch(name, grid, block, shared, arguments); \
    }

template <typename T> T atomicAdd(T *to, T by) {
    T before = *to;
    *to += by;
    return before;
}
