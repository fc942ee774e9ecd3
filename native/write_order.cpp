#include "write_order.h"

#include <algorithm>
#include <numeric>

namespace fasa {

WriteOrder::WriteOrder(const ggml_tensor * root) : root_(root), logs_(root->ne[2]) {
    for (Log & log : logs_) {
        log.cells.resize(root->ne[1]);
        std::iota(log.cells.begin(), log.cells.end(), 0);
        log.latest = log.cells;
    }
}

void WriteOrder::cell_written(int64_t cell) {
    const int64_t n_cell = root_->ne[1];
    if (cell < 0 || cell >= n_cell * root_->ne[2]) {
        return;
    }
    Log & log = logs_[cell / n_cell];
    if (static_cast<int64_t>(log.cells.size()) >= 4 * n_cell) {
        forget_old_entries(log);
    }
    log.latest[cell % n_cell] = static_cast<int32_t>(log.cells.size());
    log.cells.push_back(static_cast<int32_t>(cell % n_cell));
}

void WriteOrder::bytes_written(const void * first, size_t size) {
    const auto    row   = static_cast<int64_t>(root_->nb[1]);
    const int64_t n     = root_->ne[1] * root_->ne[2];
    const int64_t begin = static_cast<const char *>(first) - static_cast<const char *>(root_->data);
    const int64_t end   = begin + static_cast<int64_t>(size);
    for (int64_t c = std::max<int64_t>(0, begin / row); c < n && c * row < end; ++c) {
        cell_written(c);
    }
}

void WriteOrder::forget_old_entries(Log & log) {
    size_t kept = 0;
    for (size_t i = 0; i < log.cells.size(); ++i) {
        const int32_t cell = log.cells[i];
        if (log.latest[cell] == static_cast<int32_t>(i)) {
            log.cells[kept]  = cell;
            log.latest[cell] = static_cast<int32_t>(kept++);
        }
    }
    log.cells.resize(kept);
}

} // namespace fasa
