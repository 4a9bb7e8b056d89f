// libnccl.so for machines without a GPU: what the worker calls of NCCL, between processes or threads of one machine, through
// files. As NCCL's own communicators that do not block, it begins a call and says later what became of it.
//
// FAKE_NCCL_FAULT makes this process misbehave: "fail", "hang" or "die", then "@init" or "@N" for its Nth collective call. A
// GPU in two ranks is refused by nothing here, so that threads of a test can share one.
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {
constexpr int SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, IN_PROGRESS = 7;
constexpr int INT64 = 4, FLOAT32 = 7, SUM = 0;

struct UniqueId {
    char folder[128];
};

// ncclConfig_t of NCCL 2.18.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share;
};

struct Comm {
    std::string folder;
    int ranks, rank;
    uint64_t calls = 0;
    std::atomic<int> state{SUCCESS};
    std::atomic<bool> aborted{false};
    std::thread work;

    std::string file(const std::string &what, int of) const { return folder + "/" + what + "." + std::to_string(of); }
};

// What this process shall do at this place, 0 where nothing.
char fault_at(const std::string &place) {
    const char *fault = std::getenv("FAKE_NCCL_FAULT");
    const char *at = fault ? std::strchr(fault, '@') : nullptr;
    return at && place == at + 1 ? fault[0] : 0;
}

std::atomic<uint64_t> collective_calls{0};

// False where the call fails or was aborted while it hung.
bool misbehaves(Comm &comm, char fault) {
    if (fault == 'd') std::raise(SIGKILL);
    while (fault == 'h' && !comm.aborted) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return fault != 0;
}

bool publish(const std::string &path, const void *bytes, size_t length) {
    std::string temporary = path + ".new";
    FILE *file = std::fopen(temporary.c_str(), "wb");
    if (!file) return false;
    bool written = std::fwrite(bytes, 1, length, file) == length;
    written = std::fclose(file) == 0 && written;
    return written && std::rename(temporary.c_str(), path.c_str()) == 0;
}

// Waits for a file of a peer, and reads all of it.
bool collect(Comm &comm, const std::string &path, std::vector<char> &bytes) {
    FILE *file;
    while (!(file = std::fopen(path.c_str(), "rb"))) {
        if (comm.aborted) return false;
        std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
    bool read = std::fread(bytes.data(), 1, bytes.size(), file) == bytes.size();
    bool ends = std::fgetc(file) == EOF;
    std::fclose(file);
    return read && ends;
}

template <typename T> void add(void *sum, const char *part, size_t count) {
    auto *to = static_cast<T *>(sum);
    auto *from = reinterpret_cast<const T *>(part);
    for (size_t i = 0; i < count; i++) to[i] += from[i];
}

// Runs `body` as the call in progress.
template <typename Body> int begin(Comm &comm, Body body) {
    if (comm.state != SUCCESS) return INVALID_ARGUMENT;
    if (comm.work.joinable()) comm.work.join();
    comm.state = IN_PROGRESS;
    comm.work = std::thread([&comm, body] { comm.state = body() ? SUCCESS : SYSTEM_ERROR; });
    return IN_PROGRESS;
}

// Every rank sends `sent` bytes and gets all of them, in order of the ranks.
template <typename Take> int exchange(Comm &comm, const void *from, size_t sent, Take take) {
    char fault = fault_at(std::to_string(++collective_calls));
    uint64_t call = ++comm.calls;
    return begin(comm, [=, &comm] {
        if (misbehaves(comm, fault)) return false;
        std::string name = std::to_string(call);
        if (!publish(comm.file(name, comm.rank), from, sent)) return false;
        // All must have been read before anything is written: the memory may be the one that is sent.
        std::vector<std::vector<char>> parts(comm.ranks, std::vector<char>(sent));
        for (int rank = 0; rank < comm.ranks; rank++)
            if (!collect(comm, comm.file(name, rank), parts[rank])) return false;
        // Who has come here has read everything of the call before.
        if (call > 1) unlink(comm.file(std::to_string(call - 1), comm.rank).c_str());
        for (int rank = 0; rank < comm.ranks; rank++) take(rank, parts[rank].data());
        return true;
    });
}

// Into the history of the stand-in for the driver.
void note(void *stream, const char *what) {
    using Note = void (*)(void *, const char *);
    static void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    static auto emulated_call = driver ? reinterpret_cast<Note>(dlsym(driver, "emulated_call")) : nullptr;
    if (emulated_call) emulated_call(stream, what);
}

// Unsigned, so that a sum may leave the range and come back.
int sum(Comm &comm, const void *from, void *to, size_t sent, size_t first, size_t count, int type) {
    size_t size = type == INT64 ? 8 : 4;
    if (type != INT64 && type != FLOAT32) return INVALID_ARGUMENT;
    return exchange(comm, from, sent * size, [=](int rank, const char *part) {
        part += first * size;
        if (rank == 0) std::memcpy(to, part, count * size);
        else if (type == INT64) add<uint64_t>(to, part, count);
        else add<float>(to, part, count);
    });
}
} // namespace

extern "C" {
int ncclGetVersion(int *version) { *version = 22703; return SUCCESS; }

int ncclGetUniqueId(UniqueId *id) {
    const char *parent = std::getenv("TMPDIR");
    std::memset(id, 0, sizeof *id);
    int length = std::snprintf(id->folder, sizeof id->folder, "%s/fake-nccl-XXXXXX", parent ? parent : "/tmp");
    if (length >= static_cast<int>(sizeof id->folder)) return INVALID_ARGUMENT;
    return mkdtemp(id->folder) ? SUCCESS : SYSTEM_ERROR;
}

int ncclCommInitRankConfig(void **comm, int ranks, UniqueId id, int rank, const Config *config) {
    *comm = nullptr;
    // Only what does not block is of use to the tests.
    if (config->magic != 0xcafebeef || config->size < sizeof(Config) || config->blocking != 0) return INVALID_ARGUMENT;
    if (rank < 0 || rank >= ranks || std::memchr(id.folder, 0, sizeof id.folder) == nullptr) return INVALID_ARGUMENT;
    auto *made = new Comm;
    made->folder = id.folder;
    made->ranks = ranks;
    made->rank = rank;
    *comm = made;
    char fault = fault_at("init");
    return begin(*made, [made, fault] {
        if (misbehaves(*made, fault)) return false;
        if (!publish(made->file("init", made->rank), "", 0)) return false;
        std::vector<char> nothing;
        for (int rank = 0; rank < made->ranks; rank++)
            if (!collect(*made, made->file("init", rank), nothing)) return false;
        return true;
    });
}

int ncclCommGetAsyncError(Comm *comm, int *state) { *state = comm->state; return SUCCESS; }

int ncclCommAbort(Comm *comm) {
    comm->aborted = true;
    if (comm->work.joinable()) comm->work.join();
    // What a peer may still read stays until TMPDIR is emptied.
    delete comm;
    return SUCCESS;
}

const char *ncclGetErrorString(int code) {
    return code == SYSTEM_ERROR ? "unhandled system error" : code == INVALID_ARGUMENT ? "invalid argument" : "an error";
}
const char *ncclGetLastError(Comm *) { return ""; }

int ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation, Comm *comm, void *stream) {
    note(stream, "ReduceScatter");
    if (operation != SUM) return INVALID_ARGUMENT;
    return sum(*comm, from, to, count * comm->ranks, count * comm->rank, count, type);
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, Comm *comm, void *stream) {
    note(stream, "AllReduce");
    if (operation != SUM) return INVALID_ARGUMENT;
    return sum(*comm, from, to, count, 0, count, type);
}

int ncclAllGather(const void *from, void *to, size_t count, int type, Comm *comm, void *stream) {
    note(stream, "AllGather");
    if (type != INT64 && type != FLOAT32) return INVALID_ARGUMENT;
    size_t bytes = count * (type == INT64 ? 8 : 4);
    return exchange(*comm, from, bytes,
                    [=](int rank, const char *part) { std::memcpy(static_cast<char *>(to) + rank * bytes, part, bytes); });
}
}
