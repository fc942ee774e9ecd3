// Finds races between the emulated threads of a cluster: two of them use the same memory, one of them writes, and no
// barrier is between. The kernels are compiled with -fsanitize=thread, which calls a function at each use of memory;
// these take the place of the sanitizer's own, which knows no fibers that are in step by barriers.
//
// Of each word, and of each byte that is used alone, the last write and the last reads of two threads are kept. Blocks
// that are not of one cluster run one after another: what these do to each other is not seen.
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "machine.h"

namespace emulation {

namespace {

struct Access {
    uint32_t run = 0; // 0: none
    Moment   when;
    bool     atomic = false;
};

struct Cell {
    Access write;
    Access reads[2]; // of two threads
};

constexpr uintptr_t kPage = 4096;

struct Shadow {
    std::unordered_map<uintptr_t, std::unique_ptr<std::array<Cell, kPage>>> pages;
    uintptr_t                                                               last = ~uintptr_t{0};
    std::array<Cell, kPage> *                                               page = nullptr;

    Cell & at(uintptr_t number) {
        if (number / kPage != last) {
            auto & entry = pages[number / kPage];
            if (entry == nullptr) {
                entry = std::make_unique<std::array<Cell, kPage>>();
            }
            last = number / kPage, page = entry.get();
        }
        return (*page)[number % kPage];
    }
};

Shadow words, bytes;

// Whether what was done before could also come after, or at the same time.
bool is_race(const Access & before, const Access & now) {
    if (before.run != now.run || before.when.thread == now.when.thread || (before.atomic && now.atomic)) {
        return false;
    }
    if (before.when.cluster_turn < now.when.cluster_turn) {
        return false;
    }
    if (before.when.block != now.when.block) {
        return true;
    }
    return before.when.block_turn == now.when.block_turn &&
           (before.when.warp != now.when.warp || before.when.warp_turn == now.when.warp_turn);
}

void check(const Access & before, const Access & now, const void * p) {
    if (is_race(before, now)) {
        report("threads " + std::to_string(before.when.thread) + " and " + std::to_string(now.when.thread) +
               " of a cluster use " + place_of(p) + " without a barrier between, and one of them writes");
    }
}

void note_cell(Cell & cell, const Access & now, bool writes, const void * p) {
    check(cell.write, now, p);
    if (writes) {
        check(cell.reads[0], now, p);
        check(cell.reads[1], now, p);
        cell.write = now;
    } else {
        cell.reads[cell.reads[0].run != now.run || cell.reads[0].when.thread == now.when.thread ? 0 : 1] = now;
    }
}

} // namespace

void note(const void * p, size_t size, bool writes, bool atomic) {
    const auto at = reinterpret_cast<uintptr_t>(p);
    Access     now;
    if (!is_running(&now.run, &now.when) || is_on_stack(p)) {
        return;
    }
    now.atomic = atomic;
    if (size < 4) {
        for (size_t i = 0; i < size; ++i) {
            note_cell(bytes.at(at + i), now, writes, p);
        }
    } else {
        for (uintptr_t word = at / 4; word < (at + size + 3) / 4; ++word) {
            note_cell(words.at(word), now, writes, p);
        }
    }
}

} // namespace emulation

// What the compiler calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}

#define FASA_USES(SIZE)                                                                                                \
    void __tsan_read##SIZE(void * p) { emulation::note(p, SIZE, false, false); }                                       \
    void __tsan_write##SIZE(void * p) { emulation::note(p, SIZE, true, false); }                                       \
    void __tsan_unaligned_read##SIZE(void * p) { emulation::note(p, SIZE, false, false); }                             \
    void __tsan_unaligned_write##SIZE(void * p) { emulation::note(p, SIZE, true, false); }
FASA_USES(1)
FASA_USES(2)
FASA_USES(4)
FASA_USES(8)
FASA_USES(16)
#undef FASA_USES

void __tsan_read_range(void * p, unsigned long size) { emulation::note(p, size, false, false); }
void __tsan_write_range(void * p, unsigned long size) { emulation::note(p, size, true, false); }
}
