// Fibers that take turns as the threads of a block, or of a cluster of blocks, and the table of functions of api.h on
// top of them.
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
#include "machine.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

constexpr size_t kStackBytes = 64 * 1024;

struct Warp {
    uint64_t     values[2][32]; // by turn: nobody gives for the next but one before all have read
    const char * what    = nullptr;
    int          arrived = 0, turn = 0, synced = 0;
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

struct Team { // threads first to end, which wait for each other
    int                  first, end, alive, at_barrier, turn;
    bool                 begun;
    std::vector<uint8_t> memory; // of a block
};

struct Machine {
    std::vector<Thread>           threads; // of all blocks of the cluster
    std::vector<Warp>             warps;
    std::vector<Team>             blocks;
    Team                          cluster;
    Place                         scheduler;
    const std::function<void()> * kernel  = nullptr;
    int                           current = -1;
    uint32_t                      run     = 0;
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

Team & own_block() {
    Machine & m = machine();
    return m.blocks[m.current / static_cast<int>(blockDim.x)];
}

void release_barrier(Team & team) {
    team.at_barrier = 0;
    ++team.turn;
    for (int i = team.first; i < team.end; ++i) {
        machine().threads[i].ready = true;
    }
}

void wait_for(Team & team) {
    if (++team.at_barrier == team.alive) {
        release_barrier(team);
    } else {
        yield();
    }
}

// The current thread has ended: nobody waits for it any more, and with the last one of a block its memory is gone.
void leave(Team & team) {
    if (--team.alive > 0 && team.at_barrier == team.alive) {
        release_barrier(team);
    }
    if (team.alive == 0) {
        std::fill(team.memory.begin(), team.memory.end(), 0xff);
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

// Threads of a block in an order of their own, each until it waits; whether any of them moved.
bool run_block(Team & block, const std::vector<int> & order) {
    Machine & m     = machine();
    bool      moved = false;
    block.begun     = true;
    for (const int i : order) {
        Thread & t = m.threads[block.first + i];
        if (t.done || !t.ready) {
            continue;
        }
        moved     = true;
        m.current = block.first + i;
        threadIdx = dim3(static_cast<unsigned>(i), 0, 0);
        resume();
        if (t.done) {
            leave(own_block());
            leave(m.cluster);
        }
    }
    m.current = -1;
    return moved;
}

// One block at a time, by chance, as far as it comes without the others. first: the first block.
void run_cluster(dim3 first, size_t bytes) {
    Machine & m   = machine();
    const int own = static_cast<int>(blockDim.x), n_block = static_cast<int>(m.blocks.size()), n = own * n_block;
    m.cluster = {0, n, n, 0, 0, false, {}};
    m.error.clear(); // of a test before
    ++m.run;
    for (int i = 0; i < n_block; ++i) {
        m.blocks[i] = {own * i, own * (i + 1), own, 0, 0, false, std::vector<uint8_t>(bytes + 16, 0xff)};
    }
    std::vector<int> order(own);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), m.rng);
    m.warps.assign(n / 32, {});
    for (int i = 0; i < n; ++i) {
        begin(m.threads[i]);
    }
    while (m.cluster.alive > 0) {
        bool      moved = false;
        const int begin = static_cast<int>(m.rng() % n_block);
        for (int i = begin; i < begin + n_block && !moved; ++i) {
            blockIdx = dim3(first.x + static_cast<unsigned>(i % n_block), first.y, first.z);
            while (m.error.empty() && run_block(m.blocks[i % n_block], order)) {
                moved = true;
            }
        }
        if (!m.error.empty()) {
            throw std::runtime_error(m.error);
        }
        if (!moved) {
            throw std::runtime_error("threads wait for each other at different places");
        }
    }
}

uint8_t * dynamic_memory_of(int rank) {
    const auto at = reinterpret_cast<uintptr_t>(machine().blocks[rank].memory.data());
    return reinterpret_cast<uint8_t *>((at + 15) / 16 * 16);
}

} // namespace

int lane() { return machine().current % 32; }

bool is_running(uint32_t * run, Moment * moment) {
    const Machine & m = machine();
    if (m.current < 0) {
        return false;
    }
    const int block = m.current / static_cast<int>(blockDim.x), warp = m.current / 32;
    *run    = m.run;
    *moment = {m.current, warp, block, m.cluster.turn, m.blocks[block].turn, m.warps[warp].synced};
    return true;
}

bool is_on_stack(const void * p) {
    const uint8_t * stack = machine().threads[machine().current].stack.get();
    return p >= stack && p < stack + kStackBytes;
}

std::string place_of(const void * p) {
    const auto & blocks = machine().blocks;
    for (size_t i = 0; i < blocks.size(); ++i) {
        const auto * memory = dynamic_memory_of(static_cast<int>(i));
        if (p >= memory && p < memory + blocks[i].memory.size()) {
            return "byte " + std::to_string(static_cast<const uint8_t *>(p) - memory) + " of block " +
                   std::to_string(i) + "'s shared memory";
        }
    }
    return "the same memory";
}

void report(const std::string & error) {
    if (machine().error.empty()) {
        machine().error = error;
    }
}

int rank_in_cluster() { return machine().current / static_cast<int>(blockDim.x); }

uint8_t * dynamic_memory(int rank) {
    const Team & block = machine().blocks[rank];
    if (!block.begun || block.alive == 0) {
        report("the memory of a thread block that has ended or not begun is used");
    }
    return dynamic_memory_of(rank);
}

uint8_t * dynamic_memory() { return dynamic_memory(rank_in_cluster()); }

void wait_for_block() { wait_for(own_block()); }

void wait_for_cluster() { wait_for(machine().cluster); }

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
        w.synced += std::strcmp(what, "__syncwarp") == 0 ? 1 : 0; // other exchanges say nothing about memory
        for (int i = 0; i < 32; ++i) {
            m.threads[warp * 32 + i].ready = true;
        }
    } else {
        yield();
    }
    return w.values[turn];
}

cudaError_t run(const cudaLaunchConfig_t & config, const std::function<void()> & kernel) {
    Machine & m       = machine();
    unsigned  cluster = 1;
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
            cluster = config.attrs[i].val.clusterDim.x;
        }
    }
    if (config.blockDim.x % 32 != 0 || config.gridDim.x * config.gridDim.y * config.gridDim.z == 0 ||
        config.gridDim.x % cluster != 0) {
        return cudaErrorInvalidConfiguration;
    }
    while (m.threads.size() < config.blockDim.x * cluster) {
        m.threads.emplace_back();
        m.threads.back().stack = std::make_unique<uint8_t[]>(kStackBytes);
    }
    m.blocks.resize(cluster);
    m.kernel = &kernel;
    gridDim = config.gridDim, blockDim = config.blockDim;
    const unsigned        columns = gridDim.x / cluster;
    std::vector<unsigned> clusters(columns * gridDim.y * gridDim.z);
    std::iota(clusters.begin(), clusters.end(), 0u);
    std::shuffle(clusters.begin(), clusters.end(), m.rng);
    for (const unsigned c : clusters) {
        run_cluster(dim3(c % columns * cluster, c / columns % gridDim.y, c / columns / gridDim.y),
                    config.dynamicSmemBytes);
    }
    return cudaSuccess;
}

namespace {

Work * captured = nullptr; // what runs is put off while there is one

} // namespace

int32_t run_now_or_later(std::function<int32_t()> step) {
    if (captured == nullptr) {
        return step();
    }
    captured->push_back(std::move(step));
    return 0;
}

} // namespace emulation

namespace fasa::gpu {

struct Device {};

struct Capture {
    emulation::Work work;
};

namespace {

Device          only;
emulation::Work being_captured;

// An older device or a newer one, by chance. Few multiprocessors, so that thread blocks have to take turns; a cache so
// small that calls ahead end inside a matrix.
Queue some_queue() {
    const bool is_hopper = emulation::machine().rng() % 2 == 0;
    return {nullptr, is_hopper, is_hopper ? 64 : 0, 2, 1 << 20};
}

template <cudaError_t (*LAUNCH)(const Node &, const Queue &)> int32_t phase(Device *, const Node * node) {
    return emulation::run_now_or_later([node = *node] { return LAUNCH(node, some_queue()); });
}

int32_t move(Device *, void * to, const void * from, size_t bytes) {
    std::memcpy(to, from, bytes);
    return 0;
}

int32_t end_capture(Device *, Capture ** inout) {
    emulation::captured = nullptr;
    *inout              = *inout != nullptr ? *inout : new Capture;
    (*inout)->work      = std::move(being_captured);
    return 0;
}

const Api kApi = [] {
    Api api           = {};
    api.version       = kApiVersion;
    api.node_bytes    = sizeof(Node);
    api.error_text    = [](int32_t) { return "a kernel was launched with a shape that no device takes"; };
    api.device_count  = [] { return 1; };
    api.architectures = [] { return "emulation"; };
    api.open          = [](const void *, Device ** out) {
        *out = &only;
        return 0;
    };
    api.close    = [](Device *) {};
    api.allocate = [](Device *, size_t bytes, void ** out) {
        const bool ok = posix_memalign(out, 256, bytes) == 0; // its end is the one that was asked for
        return ok ? (std::memset(*out, 0, bytes), 0) : 1;
    };
    api.release  = [](Device *, void * memory) { std::free(memory); };
    api.upload   = move;
    api.download = move;
    api.copy     = [](Device *, void * to, const void * from, size_t bytes) {
        return emulation::run_now_or_later([=] { return move(nullptr, to, from, bytes); });
    };
    api.allocate_host = api.allocate;
    api.release_host  = api.release;
    api.is_idle       = [](Device *) { return true; };
    api.wait          = [](Device *) { return 0; };
    api.wait_event    = [](Device *, void *) { return 0; };
    api.record_event  = api.wait_event;
    api.transfer      = [](Device *, const Transfer * pieces, int32_t n, int64_t cell, int32_t back) {
        return static_cast<int32_t>(launch_transfer(pieces, n, cell, back != 0, some_queue()));
    };
    api.rebuild = [](Device *, const Node * node, int64_t first_block, int32_t max_block_bytes, int64_t * n_different) {
        return static_cast<int32_t>(launch_rebuild(*node, first_block, max_block_bytes, n_different, some_queue()));
    };
    api.prepare       = phase<launch_prepare>;
    api.encode        = phase<launch_encode>;
    api.score         = phase<launch_score>;
    api.select        = phase<launch_select>;
    api.attend        = phase<launch_attend>;
    api.begin_capture = [](Device *) {
        being_captured.clear();
        emulation::captured = &being_captured;
        return 0;
    };
    api.end_capture = end_capture;
    api.launch      = [](Device *, Capture * capture) {
        int32_t error = 0;
        for (const auto & step : capture->work) {
            error = error == 0 ? step() : error;
        }
        return error;
    };
    api.free_capture = [](Capture * capture) { delete capture; };
    return api;
}();

} // namespace

} // namespace fasa::gpu

extern "C" __attribute__((visibility("default"))) const fasa::gpu::Api * fasa_cuda_api() { return &fasa::gpu::kApi; }
