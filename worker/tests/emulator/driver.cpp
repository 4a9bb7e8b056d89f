// libcuda.so for machines without a GPU: what the engine calls of NVIDIA's driver, on the processor's memory.
//
// Every buffer ends at a page that nobody may touch, and is full of NaN before it is written, so that a kernel which goes too
// far, or reads what was never written, does not go unseen.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

namespace {
constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500;
constexpr size_t PAGE = 4096;

struct Region {
    void *start;
    size_t bytes;
    size_t asked;
};

std::mutex guard;
std::map<uint64_t, Region> regions;
size_t used = 0, peak = 0;

// 4 GB, or as many MB as the variable says: for tests of what happens where memory is out.
size_t total() {
    static const char *limit = std::getenv("EMULATED_MB");
    static const size_t bytes = limit ? std::strtoull(limit, nullptr, 10) << 20 : size_t{4} << 30;
    return bytes;
}

int allocate(uint64_t *at, size_t bytes) {
    std::lock_guard<std::mutex> lock(guard);
    if (used + bytes > total()) return OUT_OF_MEMORY;
    // As the real one does, buffers begin at multiples of 256, so the last bytes before the page may be nobody's.
    size_t room = (bytes + 255) / 256 * 256;
    size_t mapped = (room + PAGE - 1) / PAGE * PAGE + PAGE;
    void *start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(static_cast<char *>(start) + mapped - PAGE, PAGE, PROT_NONE);
    char *data = static_cast<char *>(start) + mapped - PAGE - room;
    std::memset(data, 0xff, room);
    *at = reinterpret_cast<uint64_t>(data);
    regions[*at] = Region{start, mapped, bytes};
    used += bytes;
    peak = used > peak ? used : peak;
    return SUCCESS;
}

int release(uint64_t at) {
    std::lock_guard<std::mutex> lock(guard);
    auto found = regions.find(at);
    if (found == regions.end()) return INVALID_VALUE;
    used -= found->second.asked;
    munmap(found->second.start, found->second.bytes);
    regions.erase(found);
    return SUCCESS;
}

using Launch = void (*)(struct Dim, struct Dim, unsigned, void **);
struct Dim {
    unsigned x, y, z;
};
// EMULATED_GPUS: how many, one if it is not set. All are the same.
int devices() {
    const char *count = std::getenv("EMULATED_GPUS");
    return count ? std::atoi(count) : 1;
}
thread_local void *current_context = nullptr;
int a_thing;

// What is asked of streams, a line each, while a file is named for it. Everything is done when it is asked for, so this alone
// tells what a GPU could do at the same time.
std::mutex history_guard;
FILE *history = nullptr;
std::map<void *, std::string> kernels;

template <typename... T> void note(const char *format, T... values) {
    std::lock_guard<std::mutex> lock(history_guard);
    if (!history) return;
    std::fprintf(history, format, values...);
    std::fflush(history);
}
} // namespace

extern "C" {
// For tests, and for the other stand-ins.
void emulated_history(const char *path) {
    std::lock_guard<std::mutex> lock(history_guard);
    if (history) std::fclose(history);
    history = path ? std::fopen(path, "w") : nullptr;
}
void emulated_call(void *stream, const char *what) { note("%p call %s\n", stream, what); }

int cuInit(unsigned) { return SUCCESS; }
int cuDriverGetVersion(int *version) {
    const char *told = std::getenv("EMULATED_DRIVER");
    *version = told ? std::atoi(told) : 13000;
    return SUCCESS;
}
int cuDeviceGetCount(int *count) { *count = devices(); return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal >= 0 && ordinal < devices() ? SUCCESS : INVALID_VALUE; }
int cuDeviceGetUuid_v2(char *uuid, int device) {
    std::memset(uuid, 0, 16);
    uuid[15] = static_cast<char>(device + 1);
    return SUCCESS;
}
int cuDeviceGetName(char *name, int length, int) {
    std::snprintf(name, length, "emulated GPU");
    return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case 16: *value = 4; break;   // multiprocessors
    case 75: *value = 9; break;   // compute capability
    case 76: *value = 0; break;
    case 115: *value = 1; break;  // memory pools
    case 97: *value = 227 << 10; break; // shared memory that a block may ask for
    default: *value = 0;
    }
    return SUCCESS;
}
int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = total(); return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int) { *context = &a_thing; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxSetCurrent(void *context) { current_context = context; return SUCCESS; }
int cuCtxGetCurrent(void **context) { *context = current_context; return SUCCESS; }
int cuCtxSynchronize() { return SUCCESS; }
int cuDeviceGetDefaultMemPool(void **pool, int) { *pool = &a_thing; return SUCCESS; }
int cuMemPoolTrimTo(void *, size_t) { return SUCCESS; }
int cuMemPoolSetAttribute(void *, int attribute, void *) {
    std::lock_guard<std::mutex> lock(guard);
    // The most that was used may be set to zero alone, from where it is what is used now.
    if (attribute == 8) peak = used;
    return SUCCESS;
}
int cuMemPoolGetAttribute(void *, int attribute, void *value) {
    std::lock_guard<std::mutex> lock(guard);
    // Used at most, and used now.
    *static_cast<uint64_t *>(value) = attribute == 8 ? peak : used;
    return SUCCESS;
}
int cuMemGetInfo_v2(size_t *available, size_t *all) {
    std::lock_guard<std::mutex> lock(guard);
    *all = total();
    *available = *all - used;
    return SUCCESS;
}
int cuStreamCreate(void **stream, unsigned) { *stream = new char; return SUCCESS; }
int cuStreamDestroy_v2(void *stream) { delete static_cast<char *>(stream); return SUCCESS; }
int cuStreamSynchronize(void *) { return SUCCESS; }
int cuStreamWaitEvent(void *stream, void *event, unsigned) { note("%p wait %p\n", stream, event); return SUCCESS; }
int cuEventCreate(void **event, unsigned) { *event = new char; return SUCCESS; }
int cuEventRecord(void *event, void *stream) { note("%p record %p\n", stream, event); return SUCCESS; }
int cuEventSynchronize(void *) { return SUCCESS; }
int cuEventElapsedTime_v2(float *milliseconds, void *, void *) { *milliseconds = 1; return SUCCESS; }
int cuEventQuery(void *) { return SUCCESS; }
int cuEventDestroy_v2(void *event) { delete static_cast<char *>(event); return SUCCESS; }
int cuMemAllocAsync(uint64_t *at, size_t bytes, void *) { return allocate(at, bytes); }
int cuMemAlloc_v2(uint64_t *at, size_t bytes) { return allocate(at, bytes); }
int cuMemFreeAsync(uint64_t at, void *) { return release(at); }
int cuMemFree_v2(uint64_t at) { return release(at); }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *) {
    std::memcpy(reinterpret_cast<void *>(to), from, bytes);
    return SUCCESS;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *) {
    std::memcpy(to, reinterpret_cast<void *>(from), bytes);
    return SUCCESS;
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *) {
    std::memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes);
    return SUCCESS;
}
int cuMemsetD8Async(uint64_t at, unsigned char value, size_t bytes, void *) {
    std::memset(reinterpret_cast<void *>(at), value, bytes);
    return SUCCESS;
}
// A module is a shared library here, whose length nothing tells: its ELF header says where its last part ends.
int cuModuleLoadData(void **module, const void *image) {
    const auto *bytes = static_cast<const unsigned char *>(image);
    if (std::memcmp(bytes, "\177ELF", 4) != 0) return INVALID_VALUE;
    uint64_t sections;
    uint16_t size, count;
    std::memcpy(&sections, bytes + 40, 8);
    std::memcpy(&size, bytes + 58, 2);
    std::memcpy(&count, bytes + 60, 2);
    size_t length = sections + size_t{size} * count;
    char path[] = "/tmp/muster-kernels-XXXXXX";
    int file = mkstemp(path);
    if (file < 0) return INVALID_VALUE;
    bool written = write(file, image, length) == static_cast<ssize_t>(length);
    close(file);
    *module = written ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!*module) std::fprintf(stderr, "emulator: %s\n", dlerror());
    unlink(path);
    return *module ? SUCCESS : INVALID_VALUE;
}
int cuModuleUnload(void *) { return SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = dlsym(module, (std::string(name) + "_emulated").c_str());
    std::lock_guard<std::mutex> lock(history_guard);
    if (*function) kernels[*function] = name;
    return *function ? SUCCESS : NOT_FOUND;
}
int cuFuncSetAttribute(void *, int, int) { return SUCCESS; }
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **) {
    // As the real one: only a grid's first side may be long.
    if (gx == 0 || gy == 0 || gz == 0 || bx == 0 || gx > 0x7fffffff || gy > 65535 || gz > 65535) return INVALID_VALUE;
    {
        std::unique_lock<std::mutex> lock(history_guard);
        std::string name = history ? kernels[function] : "";
        lock.unlock();
        note("%p call %s\n", stream, name.c_str());
    }
    reinterpret_cast<Launch>(function)(Dim{gx, gy, gz}, Dim{bx, by, bz}, shared, arguments);
    return SUCCESS;
}
int cuGetErrorName(int error, const char **name) {
    *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR";
    return SUCCESS;
}
int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }
}
