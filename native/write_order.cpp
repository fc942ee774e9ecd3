#include "write_order.h"

#include <algorithm>

namespace fasa {

namespace {

bool has(const WriteOrder::Words & words, int32_t cell) {
    return static_cast<size_t>(cell) / 64 < words.size() && (words[cell / 64] >> (cell % 64) & 1u) != 0;
}

} // namespace

WriteOrder::WriteOrder(const ggml_tensor * root) : root_(*root), logs_(root_.n_stream) {
    for (Log & log : logs_) {
        log.latest.assign(root_.n_cell, -1);
        log.known.assign((root_.n_cell + 63) / 64, 0);
        log.begin = 0;
    }
}

void WriteOrder::cell_written(int64_t cell) {
    const int64_t n_cell = root_.n_cell;
    if (cell < 0 || cell >= n_cell * root_.n_stream) {
        return;
    }
    Log &      log       = logs_[cell / n_cell];
    const auto of_stream = static_cast<int32_t>(cell % n_cell);
    if (static_cast<int64_t>(log.cells.size()) >= 4 * n_cell) {
        forget_old_entries(log);
    }
    log.latest[of_stream] = static_cast<int32_t>(log.cells.size());
    log.cells.push_back(of_stream);
    log.known[of_stream / 64] |= uint64_t{1} << (of_stream % 64);
    while (log.latest[log.cells[log.begin]] != static_cast<int32_t>(log.begin)) {
        ++log.begin;
    }
}

void WriteOrder::bytes_written(const void * first, size_t size) {
    for_cells_in(root_.data, root_.row_bytes, root_.n_cell * root_.n_stream, first, size,
                 [this](int64_t cell) { cell_written(cell); });
}

bool WriteOrder::Log::counts(size_t i, const Words & visible) const {
    return latest[cells[i]] == static_cast<int32_t>(i) && has(visible, cells[i]);
}

void WriteOrder::first(int64_t stream, int32_t n, const Words & visible, std::vector<int32_t> * out) const {
    const Log & log = logs_[stream];
    for (size_t b = 0; b < std::min(visible.size(), log.known.size()) && n > 0; ++b) {
        for (uint64_t bits = visible[b] & ~log.known[b]; bits != 0 && n > 0; bits &= bits - 1, --n) {
            out->push_back(static_cast<int32_t>(b * 64) + __builtin_ctzll(bits));
        }
    }
    for (size_t i = log.begin; i < log.cells.size() && n > 0; ++i) {
        if (log.counts(i, visible)) {
            out->push_back(log.cells[i]);
            --n;
        }
    }
}

void WriteOrder::last(int64_t stream, int32_t n, const Words & visible, std::vector<int32_t> * out) const {
    const Log & log = logs_[stream];
    for (size_t i = log.cells.size(); i > log.begin && n > 0; --i) {
        if (log.counts(i - 1, visible)) {
            out->push_back(log.cells[i - 1]);
            --n;
        }
    }
    for (size_t b = std::min(visible.size(), log.known.size()); b > 0 && n > 0; --b) {
        for (uint64_t bits = visible[b - 1] & ~log.known[b - 1]; bits != 0 && n > 0; --n) {
            const int32_t c = 63 - __builtin_clzll(bits);
            out->push_back(static_cast<int32_t>((b - 1) * 64) + c);
            bits ^= uint64_t{1} << c;
        }
    }
}

void WriteOrder::forget_old_entries(Log & log) {
    size_t kept = 0;
    for (size_t i = log.begin; i < log.cells.size(); ++i) {
        const int32_t cell = log.cells[i];
        if (log.latest[cell] == static_cast<int32_t>(i)) {
            log.cells[kept]  = cell;
            log.latest[cell] = static_cast<int32_t>(kept++);
        }
    }
    log.cells.resize(kept);
    log.begin = 0;
}

} // namespace fasa
