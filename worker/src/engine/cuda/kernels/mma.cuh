// Products of bfloat16 matrices on tensor cores (mma.sync m16n8k16, sums in float32), and the copies that feed them. A tile
// is `[rows, DIM]` in shared memory, its 16-byte chunks swapped within a row so that eight rows of one column lie in
// different banks. Tiles begin at multiples of a row's bytes.
//
// A product of 16 rows by 8 columns leaves in lane 4 i + j of a warp the columns 2 j and 2 j + 1 of the rows i and i + 8.
#pragma once
#include "common.cuh"

// Two bfloat16, the lower one first.
typedef uint32_t Pair;

struct alignas(16) Chunk {
    Pair pairs[4];
};

#ifdef EMULATED
#include <vector>

typedef uintptr_t Address;

namespace emulated {
struct Copy {
    Address to;
    const void *from;
    size_t bytes;
    bool present;
};
// Of each thread of the block, until it waits for them.
inline thread_local std::vector<Copy> copies[1024];

inline float wide(Pair pair, int which) { return __uint_as_float(which == 0 ? pair << 16 : pair & 0xffff0000u); }

struct Factors {
    Pair a[4], b[2];
};

inline void load_matrices(Pair (&to)[4], Address row, bool turned) {
    exchange(row, [&](auto rows) {
        for (int matrix = 0; matrix < 4; matrix++) {
            uint16_t found[2];
            for (int i = 0; i < 2; i++) {
                int outer = lane() / 4, inner = lane() % 4 * 2 + i;
                int line = turned ? inner : outer, column = turned ? outer : inner;
                std::memcpy(&found[i], reinterpret_cast<unsigned char *>(rows(matrix * 8 + line)) + column * 2, 2);
            }
            to[matrix] = found[0] | static_cast<Pair>(found[1]) << 16;
        }
        return 0;
    });
}
} // namespace emulated

inline Address shared_address(const void *at) { return reinterpret_cast<Address>(at); }
inline void copy_chunk(Address to, const void *from, bool present) {
    emulated::copies[threadIdx.x].push_back({to, from, 16, present});
}
inline void copy_word(Address to, const void *from, bool present) {
    emulated::copies[threadIdx.x].push_back({to, from, 4, present});
}
inline void wait_for_copies() {
    auto &copies = emulated::copies[threadIdx.x];
    for (const auto &copy : copies) {
        auto *to = reinterpret_cast<void *>(copy.to);
        copy.present ? std::memcpy(to, copy.from, copy.bytes) : std::memset(to, 0, copy.bytes);
    }
    copies.clear();
}
inline void load_matrices(Pair (&to)[4], Address row) { emulated::load_matrices(to, row, false); }
inline void load_matrices_turned(Pair (&to)[4], Address row) { emulated::load_matrices(to, row, true); }
inline void multiply_add(float (&sum)[4], const Pair (&a)[4], Pair b0, Pair b1) {
    using namespace emulated;
    exchange(Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto factors) {
        for (int i = 0; i < 4; i++) {
            int row = lane() / 4, column = lane() % 4 * 2 + i % 2, lower = i / 2;
            for (int k = 0; k < 16; k++) {
                int from = k % 8 / 2, far = k / 8;
                Pair left = factors(row * 4 + from).a[lower + 2 * far], right = factors(column * 4 + from).b[far];
                sum[i] += wide(left, k % 2) * wide(right, k % 2);
            }
        }
        return 0;
    });
}
inline Pair pack(float low, float high) {
    bf16 pair[2];
    narrow(low, pair[0]);
    narrow(high, pair[1]);
    return pair[0].bits | static_cast<Pair>(pair[1].bits) << 16;
}
inline float fast_exp2(float x) { return std::exp2(x); }
#else
typedef uint32_t Address;

__device__ __forceinline__ Address shared_address(const void *at) {
    return static_cast<Address>(__cvta_generic_to_shared(at));
}
// 16 bytes from global memory, or zeros; there after wait_for_copies, for other threads after a barrier as well.
__device__ __forceinline__ void copy_chunk(Address to, const void *from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_word(Address to, const void *from, bool present) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(present ? 4 : 0) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Four matrices of 8 by 8: lane i gives the address of row i % 8 of matrix i / 8, and gets of each matrix the columns
// 2 (i % 4) and the next of its row i / 4; turned, these rows of that column.
__device__ __forceinline__ void load_matrices(Pair (&to)[4], Address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_turned(Pair (&to)[4], Address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void multiply_add(float (&sum)[4], const Pair (&a)[4], Pair b0, Pair b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ Pair pack(float low, float high) {
    Pair pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// tanh(x) = 1 - 2 / (1 + exp(2 x)), to float32's last places of 1, which suffices where what is large is of interest.
__device__ __forceinline__ float fast_tanh(float x) {
    constexpr float TWICE_LOG2_E = 2.8853900817779268f;
    return 1.0f - __fdividef(2.0f, 1.0f + fast_exp2(x * TWICE_LOG2_E));
}

// Bytes from the start of a tile to a chunk of it.
template <int DIM> __device__ __forceinline__ int chunk_offset(int row, int chunk) {
    return row * DIM * 2 + ((chunk ^ (row & 7)) << 4);
}

// Starts to copy rows that are `stride` apart, the first `rows` of ROWS, `dimension` of DIM wide; zeros for the rest.
template <int ROWS, int DIM, int THREADS>
__device__ __forceinline__ void load_tile(Address tile, const bf16 *from, int stride, int rows, int dimension) {
    constexpr int CHUNKS = DIM / 8;
    static_assert(ROWS * CHUNKS % THREADS == 0 && THREADS % CHUNKS == 0, "whole rows of chunks");
    int first = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    // No row is there where no part of it is wanted.
    int wanted = chunk * 8 < dimension ? rows - first : 0;
    const bf16 *at = from + (first * stride + chunk * 8);
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int row = i * (THREADS / CHUNKS);
        copy_chunk(tile + chunk_offset<DIM>(first + row, chunk), at, row < wanted);
        at += THREADS / CHUNKS * stride;
    }
}

// To the 16 columns of `right` from 16 n on, in all 16 M rows of `left`.
template <int M, int N>
__device__ __forceinline__ void multiply_add_16(float (&sums)[M][N][4], const Pair (&left)[M][4], const Pair (&right)[4], int n) {
#pragma unroll
    for (int m = 0; m < M; m++) {
        multiply_add(sums[m][2 * n], left[m], right[0], right[1]);
        multiply_add(sums[m][2 * n + 1], left[m], right[2], right[3]);
    }
}

// sums += a bᵀ: `a` begins at the warp's rows of a tile, 16 for each M; `b` has 8 rows for each N.
template <int DIM, int M, int N>
__device__ __forceinline__ void multiply(float (&sums)[M][N][4], Address a, Address b) {
    int lane = threadIdx.x % WARP;
    // The chunks of step k are 2 k further, and as a row's chunks are swapped by their lowest bits, and rows begin at multiples of
    // their bytes, adding is exclusive or.
    Address a_row = a + chunk_offset<DIM>(lane % 16, lane / 16);
    Address b_row = b + chunk_offset<DIM>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll (DIM / 32)
    for (int k = 0; k < DIM / 16; k++) {
        Pair left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
            load_matrices(left[m], (a_row ^ k * 32) + m * 16 * DIM * 2);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            Pair right[4];
            load_matrices(right, (b_row ^ k * 32) + n * 16 * DIM * 2);
            multiply_add_16(sums, left, right, n);
        }
    }
}

// sums += p b: `p` as `multiply` leaves it, rounded to bfloat16 here; `b` has 8 rows for each K.
template <int DIM, int M, int K>
__device__ __forceinline__ void multiply_rows(float (&sums)[M][DIM / 8][4], const float (&p)[M][K][4], Address b) {
    int lane = threadIdx.x % WARP;
    Address row = b + chunk_offset<DIM>(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < K / 2; k++) {
        Pair left[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *from = p[m][2 * k + i / 2] + i % 2 * 2;
                left[m][i] = pack(from[0], from[1]);
            }
#pragma unroll
        for (int n = 0; n < DIM / 16; n++) {
            Pair right[4];
            load_matrices_turned(right, (row ^ n * 32) + k * 16 * DIM * 2);
            multiply_add_16(sums, left, right, n);
        }
    }
}

// The warp's sums times the factor of each row, rounded, to rows that are `stride` apart: the first `rows` of them,
// `dimension` wide. Goes by way of `scratch`, the warp's own 16 M rows of a tile.
template <int DIM, int M>
__device__ __forceinline__ void store_rows(const float (&sums)[M][DIM / 8][4], const float (&factors)[M][2],
                                           unsigned char *scratch, bf16 *to, int stride, int rows, int dimension) {
    constexpr int CHUNKS = DIM / 8;
    int lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < CHUNKS; n++) {
                int row = m * 16 + half * 8 + lane / 4;
                float factor = factors[m][half];
                Pair pair = pack(sums[m][n][half * 2] * factor, sums[m][n][half * 2 + 1] * factor);
                *reinterpret_cast<Pair *>(scratch + chunk_offset<DIM>(row, n) + lane % 4 * 4) = pair;
            }
    __syncwarp();
    bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0 && stride % 8 == 0;
    for (int i = lane; i < M * 16 * CHUNKS; i += WARP) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        if (row >= rows || chunk * 8 >= dimension) continue;
        const unsigned char *from = scratch + chunk_offset<DIM>(row, chunk);
        bf16 *at = to + static_cast<int64_t>(row) * stride + chunk * 8;
        if (aligned) {
            *reinterpret_cast<Chunk *>(at) = *reinterpret_cast<const Chunk *>(from);
        } else {
            for (int j = 0; j < 8; j++) at[j] = reinterpret_cast<const bf16 *>(from)[j];
        }
    }
}
