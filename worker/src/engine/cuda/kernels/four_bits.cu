// Weights of 4 bits, widened right before they are multiplied. The arithmetic is that of common/src/nf4.rs, rounding by rounding: a
// level times its block's scale in float32, then rounded to the element.
#include "common.cuh"

constexpr int LEVELS = 16;
constexpr int SCALE_CODES = 256;
// Scalars that a thread widens at a time: four bytes of codes, in one block always.
constexpr int GROUP = 8;

// A matrix in memory: what its codes stand for; where scales are nested, what their codes stand for; the scales of blocks, or of
// blocks of scales; the codes, two a byte, the first in the upper half; the codes of nested scales.
struct Matrix {
    const float *levels, *map, *scales;
    const unsigned char *codes, *scale_codes;
    // Logarithms of the scalars that share a scale, and of the scales that do; negative where none are nested.
    int block, nested_block;
    float offset;

    __device__ __forceinline__ Matrix(const unsigned char *bytes, int64_t codes, int64_t scale_codes, int block,
                                      int nested_block, float offset)
        : levels(reinterpret_cast<const float *>(bytes)), map(levels + LEVELS),
          scales(nested_block < 0 ? map : map + SCALE_CODES), codes(bytes + codes), scale_codes(bytes + scale_codes),
          block(block), nested_block(nested_block), offset(offset) {}

    // The factor on the levels of a scalar's block.
    __device__ __forceinline__ float scale(int64_t scalar) const {
        int64_t at = scalar >> block;
        if (nested_block < 0) return scales[at];
        return __fadd_rn(__fmul_rn(map[scale_codes[at]], scales[at >> nested_block]), offset);
    }

    __device__ __forceinline__ unsigned code(int64_t scalar) const {
        unsigned pair = codes[scalar / 2];
        return scalar % 2 ? pair & 15 : pair >> 4;
    }
};

template <typename E> struct alignas(16) Group {
    E values[GROUP];
};

// A window of `rows` x `columns` of a matrix that is `width` wide, whose first scalar is `first`: to rows `stride` apart.
template <typename E>
__device__ void widen_4bit(Matrix matrix, E *to, int64_t first, int64_t rows, int columns, int width, int stride) {
    __shared__ float levels[LEVELS];
    if (threadIdx.x < LEVELS) levels[threadIdx.x] = matrix.levels[threadIdx.x];
    __syncthreads();
    int groups = (columns + GROUP - 1) / GROUP;
    EACH(i, rows * groups) {
        int64_t row = i / groups;
        int column = static_cast<int>(i - row * groups) * GROUP;
        int64_t scalar = first + row * width + column;
        E *out = to + row * stride + column;
        bool is_whole = column + GROUP <= columns && scalar % GROUP == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
        if (is_whole) {
            float scale = matrix.scale(scalar);
            unsigned pairs = *reinterpret_cast<const unsigned *>(matrix.codes + scalar / 2);
            Group<E> group;
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                // The first of two is in the upper half of its byte.
                unsigned code = pairs >> (j / 2 * 8 + (j % 2 ? 0 : 4)) & 15;
                narrow(__fmul_rn(levels[code], scale), group.values[j]);
            }
            *reinterpret_cast<Group<E> *>(out) = group;
            continue;
        }
        for (int j = 0; j < min(GROUP, columns - column); j++)
            narrow(__fmul_rn(levels[matrix.code(scalar + j)], matrix.scale(scalar + j)), out[j]);
    }
}
#define WIDEN_4BIT(E) \
    const unsigned char *bytes, int64_t codes, int64_t scale_codes, int block, int nested_block, float offset, E *to, \
    int64_t first, int64_t rows, int columns, int width, int stride
TWINS(widen_4bit, WIDEN_4BIT, widen_4bit(Matrix(bytes, codes, scale_codes, block, nested_block, offset), to, first, rows,
      columns, width, stride))

// out[i] = scale * matrix[rows[i]], each scalar rounded to the element before.
template <typename E>
__device__ void gather_4bit(Matrix matrix, const unsigned *rows, float *out, int64_t count, int width, float scale) {
    EACH(i, count * width) {
        int64_t scalar = static_cast<int64_t>(rows[i / width]) * width + i % width;
        E rounded;
        narrow(__fmul_rn(matrix.levels[matrix.code(scalar)], matrix.scale(scalar)), rounded);
        out[i] = scale * widen(rounded);
    }
}
#define GATHER_4BIT(E) \
    const unsigned char *bytes, int64_t codes, int64_t scale_codes, int block, int nested_block, float offset, \
    const unsigned *rows, float *out, int64_t count, int width, float scale
extern "C" __global__ void gather_4bit_f32(GATHER_4BIT(float)) {
    gather_4bit<float>(Matrix(bytes, codes, scale_codes, block, nested_block, offset), rows, out, count, width, scale);
}
EXPORT(gather_4bit_f32)
extern "C" __global__ void gather_4bit_bf16(GATHER_4BIT(bf16)) {
    gather_4bit<bf16>(Matrix(bytes, codes, scale_codes, block, nested_block, offset), rows, out, count, width, scale);
}
EXPORT(gather_4bit_bf16)

// Rows of `columns`, `from_stride` and `to_stride` apart: to = from.
template <typename E>
__device__ void copy_rows(const E *from, E *to, int64_t rows, int columns, int from_stride, int to_stride) {
    EACH(i, rows * columns) {
        int64_t row = i / columns, column = i % columns;
        to[row * to_stride + column] = from[row * from_stride + column];
    }
}
#define COPY_ROWS(E) const E *from, E *to, int64_t rows, int columns, int from_stride, int to_stride
TWINS(copy_rows, COPY_ROWS, copy_rows(from, to, rows, columns, from_stride, to_stride))
