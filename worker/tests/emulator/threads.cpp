// The threads of a block, one after another. Compiled into every module that the stand-in nvcc makes.
#include "emulated.h"

#include <algorithm>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulated {
thread_local dim3 thread_index, block_index, block_size, grid_size;

namespace {
constexpr size_t STACK = 64 << 10;
// A launch may have 227 KiB on Hopper.
constexpr unsigned MAX_SHARED = 227 << 10;

struct Barrier {
    unsigned expected = 0, arrived = 0, passed = 0;
};

// A place to go on at. The system's own switch asks the kernel for the signal mask each time, which takes a hundred times as
// long as the rest, so there is one for the usual processor.
#ifdef __x86_64__
using Context = void *;

extern "C" void emulated_switch(Context *from, Context to);
asm(R"(
.text
.hidden emulated_switch
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");

void change(Context &from, Context &to) { emulated_switch(&from, to); }

void prepare(Context &context, unsigned char *stack, size_t bytes, void (*entry)()) {
    auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
    // Six registers, where to go, and what would be the caller's place.
    auto *frame = reinterpret_cast<void **>(top) - 8;
    for (int i = 0; i < 8; i++) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void *>(entry);
    context = frame;
}
#else
using Context = ucontext_t;

void change(Context &from, Context &to) { swapcontext(&from, &to); }

void prepare(Context &context, unsigned char *stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

struct Thread {
    Context context;
    dim3 index;
    bool done;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Barrier> warps;
    std::unique_ptr<unsigned char[][32][64]> boards;
    Barrier all;
    Context scheduler;
    size_t running = 0;
    void (*body)(void *);
    void *argument;
};

thread_local Block *current = nullptr;
thread_local unsigned char *shared_memory = nullptr;
thread_local unsigned char *stacks = nullptr;

void yield() {
    Thread &mine = current->threads[current->running];
    dim3 index = thread_index;
    change(mine.context, current->scheduler);
    thread_index = index;
}

void wait(Barrier &barrier) {
    unsigned seen = barrier.passed;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.passed++;
        return;
    }
    while (barrier.passed == seen) yield();
}

// A thread that has ended is waited for no more.
void leave(Barrier &barrier) {
    barrier.expected--;
    if (barrier.expected > 0 && barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.passed++;
    }
}

void enter() {
    current->body(current->argument);
    leave(current->warps[current->running / 32]);
    leave(current->all);
    Thread &mine = current->threads[current->running];
    mine.done = true;
    change(mine.context, current->scheduler);
}

void run_block(Block &block) {
    size_t threads = block.threads.size();
    block.all = Barrier{static_cast<unsigned>(threads)};
    for (size_t warp = 0; warp < block.warps.size(); warp++)
        block.warps[warp] = Barrier{static_cast<unsigned>(std::min<size_t>(32, threads - warp * 32))};
    for (size_t i = 0; i < threads; i++) {
        Thread &thread = block.threads[i];
        thread.done = false;
        prepare(thread.context, stacks + i * STACK, STACK, enter);
    }
    for (size_t left = threads; left > 0;) {
        for (size_t i = 0; i < threads; i++) {
            Thread &thread = block.threads[i];
            if (thread.done) continue;
            block.running = i;
            thread_index = thread.index;
            change(block.scheduler, thread.context);
            left -= thread.done;
        }
    }
}
} // namespace

void block_barrier() { wait(current->all); }
void warp_barrier() { wait(current->warps[current->running / 32]); }
unsigned char (*warp_board())[64] { return current->boards[current->running / 32]; }
unsigned warp_epoch() { return current->warps[current->running / 32].passed; }
int lane() { return static_cast<int>(current->running % 32); }
void *dynamic_shared() { return shared_memory; }

void run(dim3 grid, dim3 size, unsigned shared, void (*body)(void *), void *argument) {
    size_t threads = size_t{size.x} * size.y * size.z;
    if (threads == 0 || threads > 1024 || shared > MAX_SHARED) {
        std::fprintf(stderr, "emulator: a launch of %zu threads and %u bytes of shared memory\n", threads, shared);
        std::abort();
    }
    if (!stacks) stacks = static_cast<unsigned char *>(std::malloc(1024 * STACK));
    std::unique_ptr<unsigned char[]> memory(new unsigned char[shared + 1024]);
    shared_memory = memory.get() + (1024 - reinterpret_cast<uintptr_t>(memory.get()) % 1024) % 1024;
    Block block;
    block.body = body;
    block.argument = argument;
    block.threads.resize(threads);
    block.warps.resize((threads + 31) / 32);
    block.boards.reset(new unsigned char[block.warps.size()][32][64]);
    size_t at = 0;
    for (unsigned z = 0; z < size.z; z++)
        for (unsigned y = 0; y < size.y; y++)
            for (unsigned x = 0; x < size.x; x++) block.threads[at++].index = dim3{x, y, z};
    block_size = size;
    grid_size = grid;
    current = &block;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = dim3{x, y, z};
                // Whoever reads what no thread of this block wrote finds no number.
                std::memset(shared_memory, 0xff, shared);
                run_block(block);
            }
    current = nullptr;
}
} // namespace emulated
