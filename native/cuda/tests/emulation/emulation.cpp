// Fibers that take turns as the threads of a block, and the table of functions of api.h on top of them.
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../api.h"
#include "../../kernels.cuh"
#include "harness.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

constexpr size_t kStackBytes = 64 * 1024;

struct Warp {
    uint64_t     values[2][32]; // by turn: nobody gives for the next but one before all have read
    const char * what    = nullptr;
    int          arrived = 0, turn = 0;
};

// Where to go on. The compiler's own jumps leave alone what swapcontext changes at each turn: signals, and with ASan
// the shadow of a whole stack.
struct Place {
    void * at[5];
};

// ASan would clean the stack before each jump, as if nobody came back.
#define FASA_JUMPS [[gnu::noinline, gnu::no_sanitize_address]]

FASA_JUMPS void go_on_at(Place & place) { __builtin_longjmp(place.at, 1); }

struct Thread {
    ucontext_t                 context; // how it begins
    Place                      place;
    std::unique_ptr<uint8_t[]> stack;
    bool                       ready = false, done = true, begun = false;
};

struct Machine {
    std::vector<Thread>           threads;
    std::vector<Warp>             warps;
    std::vector<uint8_t>          memory;
    Place                         scheduler;
    const std::function<void()> * kernel  = nullptr;
    int                           current = 0, at_barrier = 0, alive = 0;
    std::string                   error;
    std::mt19937                  rng{fasa_test::run_seed()}; // FASA_TEST_SEED repeats it
};

Machine & machine() {
    static Machine m;
    return m;
}

FASA_JUMPS void enter() {
    (*machine().kernel)();
    machine().threads[machine().current].done = true;
    go_on_at(machine().scheduler);
}

FASA_JUMPS void yield() {
    Machine & m = machine();
    Thread &  t = m.threads[m.current];
    t.ready     = false;
    if (__builtin_setjmp(t.place.at) == 0) {
        go_on_at(m.scheduler);
    }
}

// Until the current thread waits or ends.
FASA_JUMPS void resume() {
    Machine & m = machine();
    Thread &  t = m.threads[m.current];
    if (__builtin_setjmp(m.scheduler.at) == 0) {
        if (t.begun) {
            go_on_at(t.place);
        }
        t.begun = true;
        setcontext(&t.context);
    }
}

void release_barrier() {
    Machine & m  = machine();
    m.at_barrier = 0;
    for (Thread & t : m.threads) {
        t.ready = true;
    }
}

void begin(Thread & t) {
    getcontext(&t.context);
    t.context.uc_stack.ss_sp   = t.stack.get();
    t.context.uc_stack.ss_size = kStackBytes;
    t.context.uc_link          = nullptr; // it jumps
    t.ready = true, t.done = false, t.begun = false;
    makecontext(&t.context, enter, 0);
}

// Threads of a block in an order of their own, each until it waits.
void run_block(int n) {
    Machine &        m = machine();
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), m.rng);
    std::fill(m.memory.begin(), m.memory.end(), 0xff);
    m.warps.assign((n + 31) / 32, {});
    m.at_barrier = 0;
    m.alive      = n;
    for (int i = 0; i < n; ++i) {
        begin(m.threads[i]);
    }
    while (m.alive > 0) {
        bool moved = false;
        for (const int i : order) {
            Thread & t = m.threads[i];
            if (t.done || !t.ready) {
                continue;
            }
            moved     = true;
            m.current = i;
            threadIdx = dim3(static_cast<unsigned>(i), 0, 0);
            resume();
            if (t.done && --m.alive > 0 && m.at_barrier == m.alive) {
                release_barrier();
            }
        }
        if (!moved) {
            throw std::runtime_error("threads of a block wait for each other at different places");
        }
        if (!m.error.empty()) {
            throw std::runtime_error(m.error);
        }
    }
}

} // namespace

int lane() { return machine().current % 32; }

uint8_t * dynamic_memory() {
    auto at = reinterpret_cast<uintptr_t>(machine().memory.data());
    return reinterpret_cast<uint8_t *>((at + 15) / 16 * 16);
}

void wait_for_block() {
    Machine & m = machine();
    if (++m.at_barrier == m.alive) {
        release_barrier();
    } else {
        yield();
    }
}

const uint64_t * of_all_lanes(uint64_t own, const char * what) {
    Machine & m    = machine();
    const int warp = m.current / 32;
    Warp &    w    = m.warps[warp];
    if (w.arrived > 0 && std::strcmp(w.what, what) != 0) {
        m.error = std::string("lanes of a warp are at ") + w.what + " and at " + what;
    }
    const int turn         = w.turn;
    w.what                 = what;
    w.values[turn][lane()] = own;
    if (++w.arrived == 32) {
        w.arrived = 0;
        w.turn ^= 1;
        for (int i = 0; i < 32; ++i) {
            m.threads[warp * 32 + i].ready = true;
        }
    } else {
        yield();
    }
    return w.values[turn];
}

cudaError_t run(const cudaLaunchConfig_t & config, const std::function<void()> & kernel) {
    Machine & m = machine();
    const int n = static_cast<int>(config.blockDim.x);
    if (n % 32 != 0 || config.gridDim.x * config.gridDim.y * config.gridDim.z == 0) {
        return cudaErrorInvalidConfiguration;
    }
    while (static_cast<int>(m.threads.size()) < n) {
        m.threads.emplace_back();
        m.threads.back().stack = std::make_unique<uint8_t[]>(kStackBytes);
    }
    m.memory.resize(config.dynamicSmemBytes + 16);
    m.kernel = &kernel;
    gridDim = config.gridDim, blockDim = config.blockDim;
    std::vector<unsigned> blocks(gridDim.x * gridDim.y * gridDim.z);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::shuffle(blocks.begin(), blocks.end(), m.rng);
    for (const unsigned b : blocks) {
        blockIdx = dim3(b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y);
        run_block(n);
    }
    return cudaSuccess;
}

} // namespace emulation

namespace fasa::gpu {

struct Device {};

namespace {

Device only;

template <cudaError_t (*LAUNCH)(const Node &, cudaStream_t)> int32_t phase(Device *, const Node * node) {
    return LAUNCH(*node, nullptr);
}

int32_t move(Device *, void * to, const void * from, size_t bytes) {
    std::memcpy(to, from, bytes);
    return 0;
}

const Api kApi = [] {
    Api api        = {};
    api.version    = kApiVersion;
    api.node_bytes = sizeof(Node);
    api.error_text = [](int32_t) { return "a kernel was launched with a shape that no device takes"; };
    api.open       = [](const void *, Device ** out) {
        *out = &only;
        return 0;
    };
    api.close    = [](Device *) {};
    api.allocate = [](Device *, size_t bytes, void ** out) {
        *out = std::calloc(bytes, 1);
        return *out != nullptr ? 0 : 1;
    };
    api.release  = [](Device *, void * memory) { std::free(memory); };
    api.upload   = move;
    api.download = move;
    api.copy     = move;
    api.rebuild = [](Device *, const Node * node, int64_t first_block, int32_t max_block_bytes, int64_t * n_different) {
        return static_cast<int32_t>(launch_rebuild(*node, first_block, max_block_bytes, n_different, nullptr));
    };
    api.prepare = phase<launch_prepare>;
    api.encode  = phase<launch_encode>;
    api.score   = phase<launch_score>;
    api.select  = phase<launch_select>;
    api.attend  = phase<launch_attend>;
    return api;
}();

} // namespace

} // namespace fasa::gpu

extern "C" const fasa::gpu::Api * fasa_cuda_api() { return &fasa::gpu::kApi; }
