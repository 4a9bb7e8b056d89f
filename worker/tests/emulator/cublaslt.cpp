// libcublasLt.so for machines without a GPU: products of column-major matrices, summed in float32 in the order of k.
#include <cstdint>
#include <cstring>
#include <vector>

namespace {
constexpr int SUCCESS = 0, INVALID_VALUE = 7;
constexpr int FLOAT32 = 0, BFLOAT16 = 14;
constexpr int TRANSPOSE_A = 3, TRANSPOSE_B = 4;

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t leading;
};

struct Description {
    int32_t transpose_a = 0, transpose_b = 0;
};

float load(const void *data, int type, size_t index) {
    if (type == FLOAT32) return static_cast<const float *>(data)[index];
    uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(data)[index]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

void store(void *data, int type, size_t index, float value) {
    if (type == FLOAT32) {
        static_cast<float *>(data)[index] = value;
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    static_cast<uint16_t *>(data)[index] =
        static_cast<uint16_t>(value != value ? (bits >> 16 | 0x40) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The operand as rows of float32.
std::vector<float> widened(const void *data, const Layout &layout, bool transpose) {
    size_t rows = transpose ? layout.columns : layout.rows, columns = transpose ? layout.rows : layout.columns;
    std::vector<float> values(rows * columns);
    for (size_t row = 0; row < rows; row++)
        for (size_t column = 0; column < columns; column++) {
            size_t index = transpose ? row * layout.leading + column : column * layout.leading + row;
            values[row * columns + column] = load(data, layout.type, index);
        }
    return values;
}
} // namespace

extern "C" {
int cublasLtCreate(void **handle) { *handle = new int; return SUCCESS; }
int cublasLtDestroy(void *handle) { delete static_cast<int *>(handle); return SUCCESS; }
size_t cublasLtGetVersion() { return 0; }
int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    if (leading < static_cast<int64_t>(rows) || (type != FLOAT32 && type != BFLOAT16)) return INVALID_VALUE;
    *layout = new Layout{type, rows, columns, leading};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(void *layout) { delete static_cast<Layout *>(layout); return SUCCESS; }
int cublasLtMatrixLayoutSetAttribute(void *, int, const void *, size_t) { return INVALID_VALUE; }
int cublasLtMatmulDescCreate(void **description, int, int) { *description = new Description; return SUCCESS; }
int cublasLtMatmulDescDestroy(void *description) { delete static_cast<Description *>(description); return SUCCESS; }
int cublasLtMatmulDescSetAttribute(void *description, int attribute, const void *value, size_t size) {
    auto *what = static_cast<Description *>(description);
    if (size != 4 || (attribute != TRANSPOSE_A && attribute != TRANSPOSE_B)) return INVALID_VALUE;
    std::memcpy(attribute == TRANSPOSE_A ? &what->transpose_a : &what->transpose_b, value, 4);
    return SUCCESS;
}
int cublasLtMatmulPreferenceCreate(void **preference) { *preference = new int; return SUCCESS; }
int cublasLtMatmulPreferenceDestroy(void *preference) { delete static_cast<int *>(preference); return SUCCESS; }
int cublasLtMatmulPreferenceSetAttribute(void *, int, const void *, size_t) { return SUCCESS; }
// The result begins with the algorithm (64 bytes), the workspace (8) and the state (4).
int cublasLtMatmulAlgoGetHeuristic(void *, void *, void *, void *, void *, void *, void *, int, void *result, int *count) {
    std::memset(result, 0, 64 + 8 + 4);
    *count = 1;
    return SUCCESS;
}
int cublasLtMatmul(void *, void *description, const void *alpha, const void *a, void *a_layout, const void *b,
                   void *b_layout, const void *beta, const void *c, void *c_layout, void *d, void *d_layout,
                   const void *, void *, size_t, void *) {
    const auto &what = *static_cast<Description *>(description);
    const auto &out = *static_cast<Layout *>(d_layout);
    const auto &old = *static_cast<Layout *>(c_layout);
    float scale = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
    const auto &la = *static_cast<Layout *>(a_layout);
    const auto &lb = *static_cast<Layout *>(b_layout);
    auto left = widened(a, la, what.transpose_a);
    // Columns of b beside each other.
    auto right = widened(b, lb, !what.transpose_b);
    size_t sums = what.transpose_a ? la.rows : la.columns;
    if ((what.transpose_b ? lb.columns : lb.rows) != sums) return INVALID_VALUE;
    if (left.size() != out.rows * sums || right.size() != out.columns * sums) return INVALID_VALUE;
    for (size_t column = 0; column < out.columns; column++)
        for (size_t row = 0; row < out.rows; row++) {
            float sum = 0;
            for (size_t k = 0; k < sums; k++) sum += left[row * sums + k] * right[column * sums + k];
            float before = keep == 0 ? 0 : keep * load(c, old.type, column * old.leading + row);
            store(d, out.type, column * out.leading + row, scale * sum + before);
        }
    return SUCCESS;
}
}
